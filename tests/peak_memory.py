"""One run's peak memory beside what its plan says; a program of its own.

    PYTHONPATH=.:tests:tests/data python tests/peak_memory.py none

Prints two numbers of bytes, predicted and taken, of three steps of a model of
22 M parameters with that `model.remat`. Linux tells the peak since a moment of
our choice.
"""

import ctypes
import gc
import sys
from pathlib import Path

import jax
import numpy as np

import tiny
from sft_jax import plan, setup_plan, sharding, topology
from sft_jax.models.config import parse_config

SIZES = {
  **{"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6},
  **{"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64},
  **{"vocab_size": 4096, "max_position_embeddings": 1024},
}


def status(key: str) -> int:
  """Bytes that the kernel gives for this process."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(
    int(line.split()[1]) * 1024 for line in lines if line.startswith(key)
  )


def main() -> None:
  topology.prepare("cpu")
  machine, nowhere = topology.find("cpu"), Path("nowhere")
  config = tiny.config(
    *(nowhere, nowhere, nowhere),
    batch_size=8,
    data__seq_len=512,
    model__remat=sys.argv[1],
  )
  mesh = sharding.make_mesh(**config.mesh, devices=machine.devices)
  shape = parse_config(tiny.SHAPE | SIZES)
  outline = setup_plan.outline(config, shape, mesh)
  predicted = plan.plan(outline, machine).memory.total
  step = outline.lower().compile()
  state, batch = jax.tree.map(
    lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding),
    (outline.state, outline.batch),
  )
  held = sum(x.nbytes for x in jax.tree.leaves((state, batch)))
  # What compiling left behind is given back, and the peak forgotten.
  gc.collect()
  ctypes.CDLL("libc.so.6").malloc_trim(0)
  Path("/proc/self/clear_refs").write_text("5")
  before = status("VmRSS")
  for _ in range(3):
    state, *_ = step(state, batch, np.float32(np.inf), np.int32(0))
    jax.block_until_ready(state)
  print(predicted, status("VmHWM") - before + held)


if __name__ == "__main__":
  main()
