"""What keeping documents apart costs a layer that is no attention.

    python tools/bench/bench_hybrids.py [--tokens 2048] [--width 256]

One layer of each mixer, forward and backward on random weights in float32: a
row of one document, the same row in documents of 37 tokens, and attention. The
median of 7 turns, each layout in every turn; and the compiler's temporary
memory at T and 2 T.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.models import transformer
from sft_jax.models.config import parse_config

KINDS = {
  "attention": ("llama", {}),
  "short convolution": ("lfm2", {"layer_types": ["conv"]}),
  "delta net": (
    "qwen3_5_text",
    {
      "layer_types": ["linear_attention"],
      **{"linear_num_key_heads": 4, "linear_num_value_heads": 8},
      **{"linear_key_head_dim": 64, "linear_value_head_dim": 64},
    },
  ),
  "Mamba-2": (
    "granitemoehybrid",
    {
      **{"layer_types": ["linear_attention"], "num_local_experts": 0},
      **{"mamba_n_heads": 8, "mamba_d_state": 64, "mamba_expand": 2},
    },
  ),
}


def gradient_of(family: str, fields: dict, width: int):
  """(a compiled gradient by tokens and segments, parameters)."""
  config = parse_config(
    {
      **{"model_type": family, "vocab_size": 64, "num_hidden_layers": 1},
      **{"hidden_size": width, "intermediate_size": width},
      **{"num_attention_heads": width // 64, "num_key_value_heads": 2},
      "head_dim": 64,
      **fields,
    }
  )
  model = transformer.build(config)

  def loss(params, tokens, segments):
    return jnp.sum(jnp.sin(model.hidden(params, tokens, None, segments)))

  params = jax.jit(model.init)(jax.random.key(0))
  return jax.jit(jax.grad(loss)), params


def main() -> None:
  """Prints one line per mixer."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--tokens", type=int, default=2048)
  parser.add_argument("--width", type=int, default=256)
  options = parser.parse_args()
  T = options.tokens
  tokens = np.random.default_rng(0).integers(0, 64, (1, T)).astype(np.int32)
  layouts = (np.ones_like(tokens), np.arange(T, dtype=np.int32)[None] // 37 + 1)
  print("| mixer | one document | packed | ratio | memory at T, at 2 T |")
  print("|---|---|---|---|---|")
  for name, (family, fields) in KINDS.items():
    gradient, params = gradient_of(family, fields, options.width)
    seconds = ([], [])
    for turn in range(8):
      for own, segments in zip(seconds, layouts, strict=True):
        started = time.perf_counter()
        jax.block_until_ready(gradient(params, tokens, segments))
        if turn:
          own.append(time.perf_counter() - started)
    one, packed = map(statistics.median, seconds)
    memory = []
    for size in (T, 2 * T):
      ids = jax.ShapeDtypeStruct((1, size), jnp.int32)
      program = gradient.lower(params, ids, ids).compile()
      analysis: Any = program.memory_analysis()
      memory.append(analysis.temp_size_in_bytes / 2**20)
    print(
      f"| {name} | {one * 1e3:.0f} ms | {packed * 1e3:.0f} ms "
      f"| {packed / one:.2f} | {memory[0]:.0f}, {memory[1]:.0f} MiB |"
    )


if __name__ == "__main__":
  main()
