"""How fast a checkpoint loads, beside how fast the disk gives its bytes.

python tools/bench/bench_load.py --gigabytes=1.2 --dtype=bfloat16

Writes a random checkpoint of a llama into a temporary folder, then reads its
files plainly and loads it, in turn, each time with the files first dropped from
the page cache ("cold") and then from it ("warm"). Prints bytes of the
file per second, best of the rounds, and the memory of the loading process.
"kept" is reading them into memory that stays, which no loader can do without:
on a virtual machine new memory can cost more than the disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.text import Text

from sft_jax.commands import command
from sft_jax.models.hf.safetensors_files import (
  Pending,
  write_json,
  write_tensors,
)
from sft_jax.reporting import terminal

_DTYPES = {
  "float32": np.float32,
  "bfloat16": ml_dtypes.bfloat16,
  "float16": np.float16,
}
_CHUNK = 16 << 20


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--gigabytes", type=float, default=1.2, help="size of the checkpoint")
  add("--shards", type=int, default=3, help="files to split it over")
  add("--dtype", choices=_DTYPES, default="bfloat16", help="in the files")
  add("--param_dtype", choices=_DTYPES, help="in memory; as in the files")
  add("--rounds", type=int, default=3, help="of which the best counts")
  add("--folder", help="load this model, and write none")
  add("--load", help=argparse.SUPPRESS)  # What the child processes do.
  args = parser.parse_args()
  args.param_dtype = args.param_dtype or args.dtype
  if args.load:
    print(json.dumps(load(Path(args.load), args.param_dtype)))
    return
  out = terminal.console()
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(args.folder or Path(temporary) / "model")
    if not args.folder:
      out.print(Text(f"Writing {args.gigabytes} GB of {args.dtype} ..."))
      write(folder, int(args.gigabytes * 1e9), args.shards, args.dtype)
    files = sorted(folder.glob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    seconds: dict[tuple[str, str], list[float]] = {}
    memory = []
    for _ in range(args.rounds):
      for state in ("cold", "warm"):
        drop(files, state)
        seconds.setdefault(("read", state), []).append(read(files))
        drop(files, state)
        seconds.setdefault(("kept", state), []).append(keep(files))
        drop(files, state)
        found = json.loads(
          subprocess.run(
            [
              *(sys.executable, __file__, f"--load={folder}"),
              f"--param_dtype={args.param_dtype}",
            ],
            check=True,
            capture_output=True,
            text=True,
          ).stdout
        )
        seconds.setdefault(("load", state), []).append(found["seconds"])
        memory.append(found)
  speed = {key: sum(sizes) / 1e9 / min(all_) for key, all_ in seconds.items()}
  terminal.print_table(
    out,
    f"{sum(sizes) / 1e9:.2f} GB of {args.dtype} as {args.param_dtype}, GB/s",
    ("files are", "read()", "kept", "load_pretrained", "load / read()"),
    [
      (
        state,
        f"{speed['read', state]:.2f}",
        f"{speed['kept', state]:.2f}",
        f"{speed['load', state]:.2f}",
        f"{speed['load', state] / speed['read', state]:.2f}",
      )
      for state in ("cold", "warm")
    ],
  )
  terminal.facts(
    out,
    "Memory of the loading process, GB",
    {
      "parameters": f"{memory[0]['params'] / 1e9:.2f}",
      "peak, above the start": f"{max(m['peak'] for m in memory) / 1e9:.2f}",
      "largest file": f"{max(sizes) / 1e9:.2f}",
    },
  )


def write(folder: Path, size: int, shards: int, dtype: str) -> None:
  """A llama of about `size` bytes, its tensors cut from one random block."""
  d, heads, vocab = 1536, 12, 16_000
  layer = 4 * d * d + 3 * d * 4 * d + 2 * d
  one = np.dtype(_DTYPES[dtype]).itemsize
  layers = max(1, (size // one - vocab * d) // layer)
  folder.mkdir()
  write_json(
    folder / "config.json",
    {
      "architectures": ["LlamaForCausalLM"],
      "model_type": "llama",
      "vocab_size": vocab,
      "hidden_size": d,
      "intermediate_size": 4 * d,
      "num_hidden_layers": layers,
      "num_attention_heads": heads,
      "num_key_value_heads": heads,
      "hidden_act": "silu",
      "max_position_embeddings": 1024,
      "rms_norm_eps": 1e-6,
      "rope_theta": 1e4,
      "tie_word_embeddings": True,
      "torch_dtype": dtype,
    },
  )
  shapes = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
  for i in range(layers):
    at = f"model.layers.{i}"
    shapes |= {f"{at}.self_attn.{x}_proj.weight": (d, d) for x in "qkvo"}
    shapes |= {f"{at}.mlp.{x}_proj.weight": (4 * d, d) for x in ("gate", "up")}
    shapes |= {
      f"{at}.mlp.down_proj.weight": (d, 4 * d),
      f"{at}.input_layernorm.weight": (d,),
      f"{at}.post_attention_layernorm.weight": (d,),
    }
  block = np.random.default_rng(0).standard_normal(vocab * d, np.float32)
  block = block.astype(_DTYPES[dtype])

  def make(shape: tuple[int, ...]) -> np.ndarray:
    return block[: int(np.prod(shape))].reshape(shape)

  tensors = [
    Pending(name, block.dtype, shape, lambda shape=shape: make(shape))
    for name, shape in shapes.items()
  ]
  total = sum(tensor.num_bytes for tensor in tensors)
  # The first shard that overflows opens the next: a little room for it.
  write_tensors(folder, tensors, max_shard_bytes=int(total / shards * 1.02))
  for file in folder.glob("*.safetensors"):
    with file.open("rb") as opened:
      os.fsync(opened.fileno())  # Only what is on the disk can be dropped.


def drop(files: list[Path], state: str) -> None:
  """Makes the files cold (out of the page cache) or warm (in it)."""
  for file in files:
    with file.open("rb") as opened:
      if state == "cold":
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
      else:
        while opened.read(_CHUNK):
          pass


def read(files: list[Path]) -> float:
  """Seconds to read every byte of the files, one after the other."""
  buffer = bytearray(_CHUNK)
  start = time.perf_counter()
  for file in files:
    with file.open("rb", buffering=0) as opened:
      while opened.readinto(buffer):
        pass
  return time.perf_counter() - start


def keep(files: list[Path]) -> float:
  """Seconds to read the files into new memory."""
  start = time.perf_counter()
  kept = [np.fromfile(file, np.uint8) for file in files]
  seconds = time.perf_counter() - start
  del kept
  return seconds


def load(folder: Path, param_dtype: str) -> dict[str, float]:
  """Loads in this process, with the compiler and the devices warmed up."""
  import jax

  from sft_jax.common import trees
  from sft_jax.models.hf import load_save

  jax.numpy.zeros((8, 8)).block_until_ready()
  before = peak_memory()
  start = time.perf_counter()
  _, params = load_save.load_pretrained(folder, param_dtype=param_dtype)
  jax.block_until_ready(params)
  seconds = time.perf_counter() - start
  return {
    "seconds": seconds,
    "params": trees.num_bytes(params),
    "peak": peak_memory() - before,
  }


def peak_memory() -> int:
  """The most bytes of memory that this program ever held (Linux).

  Unlike `ru_maxrss` it does not count what its parent held.
  """
  status = Path("/proc/self/status").read_text()
  line = next(x for x in status.splitlines() if x.startswith("VmHWM"))
  return int(line.split()[1]) * 1024


if __name__ == "__main__":
  command.run(main)
