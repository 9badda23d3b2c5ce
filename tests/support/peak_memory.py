"""One step's peak memory beside what its plan says; a program of its own.

    PYTHONPATH=.:tests/support python tests/support/peak_memory.py none

Prints two numbers of bytes of one of the cases below, predicted and taken. The
first is the compiler's: arguments + outputs + temporaries - what is donated.
The second is Linux's: the state and the batch, and what of this process came
into main memory beyond them while a step ran, at its peak. It is of the second
step: the first also brings in the program itself and starts its threads.
"""

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tiny
from sft_jax.common import machines, sharding
from sft_jax.models.config import parse_config
from sft_jax.training.build import abstract
from sft_jax.training.planning import plan

# 22 M parameters, 8 rows of 512.
SIZES = {
  **{"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6},
  **{"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64},
  **{"vocab_size": 4096, "max_position_embeddings": 1024},
}
# A vocabulary that outweighs the layers: 13 M parameters, 8 of them its own.
WIDE = {
  **{"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4},
  **{"vocab_size": 32_000, "num_key_value_heads": 2},
}
CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
  "none": ({}, {"model__remat": "none"}),
  "full": ({}, {"model__remat": "full"}),
  "wide": (WIDE, {"accum_steps": 2, "data__seq_len": 1024}),
  "adapters": ({}, {"lora__rank": 8, "batch_size": 4}),
}
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # Of malloc.h.


def status(key: str) -> int:
  """Bytes that the kernel gives for this process."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(
    int(line.split()[1]) * 1024 for line in lines if line.startswith(key)
  )


def main() -> None:
  libc = ctypes.CDLL("libc.so.6")
  # What is freed goes back to the system, and is not kept for later.
  libc.mallopt(_MMAP_THRESHOLD, 1 << 16)
  libc.mallopt(_TRIM_THRESHOLD, 1 << 16)
  machines.prepare("cpu")
  machine, nowhere = machines.find_machine("cpu"), Path("nowhere")
  sizes, changes = CASES[sys.argv[1]]
  config = tiny.config(
    *(nowhere, nowhere, nowhere),
    **{"batch_size": 8, "data__seq_len": 512} | changes,
  )
  mesh = sharding.make_mesh(**config.mesh, devices=machine.devices)
  shape = parse_config(tiny.SHAPE | SIZES | sizes)
  outline = abstract.outline(config, shape, mesh)
  predicted = plan.plan(outline, machine).memory.total
  step = outline.lower().compile()
  # Made by a program: what NumPy has made cannot be donated.
  state, batch = jax.jit(
    lambda: jax.tree.map(
      lambda x: jnp.ones(x.shape, x.dtype), (outline.state, outline.batch)
    ),
    out_shardings=jax.tree.map(
      lambda x: x.sharding, (outline.state, outline.batch)
    ),
  )()
  held = sum(x.nbytes for x in jax.tree.leaves((state, batch)))
  for _ in range(2):
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Forgets the peak.
    before = status("VmRSS")
    state, *_ = step(state, batch, np.float32(np.inf), np.int32(0))
    jax.block_until_ready(state)
    taken = status("VmHWM") - before + held
  print(predicted, taken)


if __name__ == "__main__":
  main()
