"""What 8B, 70B and a 235B mixture need on many chips: docs/scaling.md.

    python tools/bench/scale_table.py           models x machines
    python tools/bench/scale_table.py --growth  8B, by length of rows, by chips

Arithmetic, no compiler; needs libtpu for the names of slices alone. State,
gradients and kept activations are those of `sft-jax plan`, from shapes and
shardings; FLOPs are those of its trace. What the compiler would say is guessed
by formula: `working` memory is two layers' gathered weights and twice what a
layer's products give; what a device receives is beside each term of `received`.
Times are the bounds of `plan`, at the published peaks; `sft-jax plan` compiles
any of the rows.
"""

import argparse
import math
from typing import Any, cast

import jax

from configs import base
from sft_jax.commands import command
from sft_jax.commands.plan import find_shape
from sft_jax.common import machines, sharding, trees
from sft_jax.training.build import abstract, state
from sft_jax.training.build.abstract import Outline
from sft_jax.training.planning import cost_model, plan
from sft_jax.training.planning.cost_model import ACROSS, Traffic

MODELS = {
  "8B": "meta-llama/Llama-3.1-8B-Instruct",
  "70B": "meta-llama/Llama-3.3-70B-Instruct",
  "235B-A22B": "Qwen/Qwen3-235B-A22B",
}
# Of 128, 256 and 64 chips (of two devices each), two of them, one host.
MACHINES = {
  "v5p-256": "v5p:4x4x8",
  "2 x v5p-256": "v5p:4x4x8*2",
  "v6e-256": "v6e:16x16",
  "2 x v6e-256": "v6e:16x16*2",
  "TPU7x-64": "tpu7x:4x4x4",
  "2 x TPU7x-64": "tpu7x:4x4x4*2",
  "8 x H200": "gpu-141GB:8",
}
LENGTHS = [2**n for n in range(9, 18)]
CHIPS = ["v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4", "v5p:8x8x4", "v5p:8x8x16"]
CHIPS += ["v5p:16x16x16"]


def make_config(model: str, mesh: dict[str, int], T: int, lora: bool) -> Any:
  """One row of T slots for each device that takes rows."""
  config = cast(Any, base.get_config())
  config.steps, config.data.seq_len = 1000, T
  config.model.path, config.model.dtype = MODELS[model], "bfloat16"
  config.model.remat, config.loss.chunk_tokens = "full", 2048
  config.mesh.update(mesh)
  config.batch_size = math.prod(mesh[axis] for axis in sharding.ROWS)
  if lora:
    config.lora.rank, config.model.param_dtype = 16, "bfloat16"
    config.lora.targets = "attention"
  return config


def received(one: Outline, slices: int) -> dict[str, Traffic]:
  """Bytes that a device receives in a step, within its slice and across."""
  mesh, c = one.mesh, one.model.config
  shape, bf16 = dict(mesh.shape), 2
  parts, B, T = one.batch.tokens.shape
  slots = B * T / sharding.size(mesh) / shape["context"]
  trained = trees.flatten(one.state.params)
  within = across = 0.0
  share = lambda n: (n - 1) / n
  for path, dims, spec, _ in sharding.placements(one.params, mesh):
    over = [axis for axis in spec if axis in ("fsdp", ("fsdp", "expert"))]
    n = math.prod(sharding.size(mesh, axis) for axis in over)
    own = sharding.size(mesh, {"tensor", "expert"} & {*spec})
    size = math.prod(dims) / own
    within += 2 * bf16 * size * share(n)  # Gathered forward and backward.
    if path in trained:
      size *= trained[path].dtype.itemsize
      within += size * share(n)  # Gradients, summed and cut.
      copies, sums = shape["data"], 2 * size / n
      within += sums * share(copies // slices)
      across += sums / (copies // slices) * share(slices)
  tokens = slots * c.d_model * (shape["expert"] - 1)
  moe = sum(not kind.dense for kind in c.layers) if c.num_experts else 0
  # Forward x and float32 results, backward x again and both gradients.
  within += moe * tokens * (2 + 4 + 2 + 4 + 2)
  # q, k, v and the output change sides, forward, again, and backward.
  heads = 2 * c.num_heads + 2 * c.num_kv_heads
  swapped = slots * heads * c.head_dim * bf16 * share(shape["context"])
  within += 3 * c.num_layers * swapped
  of = lambda size: Traffic(0, int(parts * size), False)
  return {"all-gather": of(within), ACROSS: of(across)}


def working(one: Outline) -> float:
  """Two layers' weights as they are multiplied by, and a layer's products."""
  mesh, c = one.mesh, one.model.config
  layers = sum(
    math.prod(x.shape) / sharding.size(mesh, {"tensor", "expert"} & {*x.spec})
    for x in sharding.placements(one.params, mesh)
    if x.path.startswith("layers/")
  )
  _, B, T = one.batch.tokens.shape
  slots = B * T / sharding.size(mesh) / mesh.shape["context"]
  rows = slots * max(1, c.experts_per_token * mesh.shape["expert"])
  products = rows * (2 * c.d_model + 3 * c.d_ff) / mesh.shape["tensor"]
  return 2 * 2 * (layers / c.num_layers + products)


def row(model: str, topology: str, mesh: dict[str, int], T: int, lora: bool):
  """(figures of one plan by arithmetic, its machine)."""
  machine = machines.find_machine(topology)
  config = make_config(model, mesh, T, lora)
  shape = find_shape(config.model.path)
  placed = sharding.make_mesh(**config.mesh, devices=machine.devices)
  one = abstract.outline(config, shape, placed)
  parts = plan.known_bytes(one.step.loss_fn, one.state, one.batch)
  memory = plan.Memory(
    *parts, int(working(one)), int(sum(parts) + working(one))
  )
  useful = (
    config.batch_size
    * T
    * state.flops_per_token(*(one.step, one.model, one.params, [T]))
  )
  executed = cost_model.matmul_flops(one.step.train_step, one.state, one.batch)
  slices = int(topology.partition("*")[2] or 1)
  traffic = received(one, slices)
  times = plan.bounds(one, machine, memory, max(useful, executed), traffic)
  return memory, traffic, times, machine, config.batch_size * T


def cells(memory, traffic, times, machine, tokens) -> list[str]:
  total, limit = memory.total / 1e9, machine.chip.memory / 1e9
  # A compiler's temporaries have been 10 GB more than `working`.
  share = total / limit
  fits = "fits" if share < 0.7 else "perhaps" if share < 1 else "does not fit"
  inside, across = (
    traffic[kind].bytes / 1e9 for kind in ("all-gather", ACROSS)
  )
  return [
    f"{total:,.1f} of {limit:,.0f} GB, {fits}",
    f"{inside:,.1f} GB" + (f", {across:.2f} GB" if across else ""),
    f"{times.step:,.2f} s, {times.bound}",
    f"{tokens / times.step:,.0f}",
  ]


def head(*names: str) -> None:
  names += ("mesh", "memory per device", "received", "step", "tokens/s")
  print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")


def machine_mesh(model: str, topology: str) -> dict[str, int]:
  """`data` across slices, `fsdp` within; experts over eight devices."""
  slices = int(topology.partition("*")[2] or 1)
  count = len(machines.find_machine(topology).devices)
  # Over four they send more weights, and fit in the smaller memory.
  expert = (4 if "v6e" in topology else 8) if "A22B" in model else 1
  rest = {"tensor": 1, "context": 1, "expert": expert}
  return {"data": slices, "fsdp": count // slices // expert, **rest}


def table() -> None:
  head("model", "machine")
  for name, topology in MACHINES.items():
    for model in MODELS:
      mesh = machine_mesh(model, topology)
      for lora in (False, True) if "H200" in name else (False,):
        found = cells(*row(model, topology, mesh, 4096, lora))
        sizes = " ".join(f"{a}={n}" for a, n in mesh.items() if n > 1)
        what = model + (", LoRA" if lora else "")
        print("|", " | ".join([what, name, sizes, *found]), "|", flush=True)


def growth() -> None:
  """By the length of rows on 64 chips, and by chips at 4,096."""
  head("8B", "T")
  cases = [("v5p:4x4x4", T, lora) for lora in (False, True) for T in LENGTHS]
  for topology, T, lora in [*cases, *((x, 4096, False) for x in CHIPS)]:
    mesh = machine_mesh("8B", topology)
    mesh["context"] = max(1, T // 16_384)
    mesh["fsdp"] //= mesh["context"]
    found = cells(*row("8B", topology, mesh, T, lora))
    sizes = " ".join(f"{a}={n}" for a, n in mesh.items() if n > 1)
    how = ("LoRA" if lora else "full") + f", {topology}"
    print("|", " | ".join([how, f"{T:,}", sizes, *found]), "|", flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--growth", action="store_true")
  options = parser.parse_args()
  machines.prepare("gpu-141GB:8")
  jax.config.update("jax_enable_compilation_cache", False)
  growth() if options.growth else table()


if __name__ == "__main__":
  command.run(main)
