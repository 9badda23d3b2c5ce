"""A process of two that loads models, and says what it fetched of each.

python range_reads.py PROCESS COORDINATOR [[URL, LOCAL COPY], ...]

prints a line of JSON for each: what the process's devices hold is compared
with the same part of the local copy, bit for bit.
"""

import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from sft_jax.common import sharding, trees
from sft_jax.common.buckets import ranges
from sft_jax.models import transformer
from sft_jax.models.config import read_config
from sft_jax.models.hf import load_save, parameter_map
from sft_jax.models.lora import token_rows


def share(folder: Path, mesh) -> float:
  """Bytes of the files that this process's devices hold."""
  config = read_config(folder)
  tensors, _ = load_save.open_folder(folder, config)
  shapes = jax.eval_shape(transformer.build(config).init, jax.random.key(0))
  total = 0.0
  for path, leaf in trees.flatten(shapes).items():
    where = NamedSharding(
      mesh, sharding.place_parameter(path, leaf.shape, mesh).spec
    )
    boxes = where.addressable_devices_indices_map(leaf.shape).values()
    held = np.zeros(leaf.shape, bool)
    for box in boxes:
      held[box] = True
    for one in parameter_map.tensor_slices(path, leaf.shape, config):
      x = tensors[one.name]
      parts = [p for p in getattr(x, "parts", (x,)) if p is not None]
      stored = sum(part.num_bytes for part in parts)
      total += stored / math.prod(x.shape) * held[one.index].sum()
  return total


def odd_rows(folder: Path) -> dict[int, str]:
  """What processes find together of rows 5 and 9 of the embedding."""
  tensors, _ = load_save.open_folder(folder, read_config(folder))
  table = next(x for name, x in tensors.items() if "embed" in name)
  return token_rows.untrained(table.read, table.shape[0], [5, 9])


def main() -> None:
  number, coordinator, asked = sys.argv[1:]
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(coordinator, 2, int(number))
  fetched, ask = [], ranges._File._ask

  def counted(self, start, stop):
    data = ask(self, start, stop)
    fetched.append(len(data))
    return data

  ranges._File._ask = counted
  mesh = sharding.make_mesh(1, 8, 1)
  one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  for url, local in json.loads(asked):
    fetched.clear()
    _, params = load_save.load_pretrained(url, mesh=mesh)
    total = sum(fetched)
    headers = sum(
      8 + int.from_bytes(file.open("rb").read(8), "little")
      for file in Path(local).glob("*.safetensors")
    )
    _, want = load_save.load_pretrained(
      local, shardings=lambda tree: jax.tree.map(lambda x: one, tree)
    )
    for path, x in trees.flatten(params).items():
      whole = np.asarray(trees.flatten(want)[path])
      for shard in x.addressable_shards:
        got = np.asarray(shard.data)
        assert got.tobytes() == whole[shard.index].tobytes(), path
    said = {"url": url, "fetched": total, "headers": headers}
    said |= {"share": share(Path(local), mesh), "requests": len(fetched)}
    said["odd"] = odd_rows(Path(local))
    print("READ", json.dumps(said), flush=True)
  jax.distributed.shutdown()


if __name__ == "__main__":
  main()
