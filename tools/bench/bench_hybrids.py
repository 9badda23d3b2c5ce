"""What keeping documents apart costs a layer that is no attention.

    python tools/bench/bench_hybrids.py [--tokens 2048] [--width 256]
    python tools/bench/bench_hybrids.py --topology v5e:2x2    memory alone

One layer of each mixer, forward and backward on random weights in float32: a
row of one document, the same row in documents of 37 tokens, and attention. The
median of 7 turns, each layout in every turn, by the clock and by the time of
the processor, which other work disturbs less; and the compiler's temporary
memory at T and 2 T, with --topology that of a TPU's compiler, which needs none.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.common import machines, sharding
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
  "latent attention": (
    "deepseek_v3",
    {
      **{"kv_lora_rank": 64, "q_lora_rank": None, "v_head_dim": 64},
      **{"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "head_dim": 32},
      **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
      **{"topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0},
      **{"moe_intermediate_size": 64, "num_key_value_heads": 4},
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


def gradient_of(family: str, fields: dict, width: int, mesh: Any = None):
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
  model = transformer.build(config, mesh=mesh)

  def loss(params, tokens, segments):
    return jnp.sum(jnp.sin(model.hidden(params, tokens, None, segments)))

  return jax.jit(jax.grad(loss)), model.init


def main() -> None:
  """Prints one line per mixer."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--tokens", type=int, default=2048)
  parser.add_argument("--width", type=int, default=256)
  parser.add_argument("--topology", default="")
  options = parser.parse_args()
  T, mesh = options.tokens, None
  machines.prepare(options.topology)
  if options.topology:
    chip = machines.find_machine(options.topology).devices[:1]
    mesh = sharding.make_mesh(1, 1, 1, devices=chip)
  tokens = np.random.default_rng(0).integers(0, 64, (1, T)).astype(np.int32)
  layouts = (np.ones_like(tokens), np.arange(T, dtype=np.int32)[None] // 37 + 1)
  print("| mixer | memory at T, at 2 T | one document | packed | clock / CPU |")
  print("|---|---|---|---|---|")
  place = sharding.replicated(mesh) if mesh else None
  for name, (family, fields) in KINDS.items():
    gradient, init = gradient_of(family, fields, options.width, mesh)
    params = jax.eval_shape(init, jax.random.key(0))
    memory = []
    for size in (T, 2 * T):
      ids = jax.ShapeDtypeStruct((1, size), jnp.int32)
      shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (params, ids, ids),
      )
      analysis: Any = gradient.lower(*shapes).compile().memory_analysis()
      memory.append(analysis.temp_size_in_bytes / 2**20)
    line = f"| {name} | {memory[0]:.1f}, {memory[1]:.1f} MiB |"
    if mesh:
      print(line, flush=True)
      continue
    params = jax.jit(init)(jax.random.key(0))
    seconds = ([], [])
    for turn in range(8):
      for own, segments in zip(seconds, layouts, strict=True):
        started = time.perf_counter(), time.process_time()
        jax.block_until_ready(gradient(params, tokens, segments))
        ended = time.perf_counter(), time.process_time()
        if turn:
          own.append(np.subtract(ended, started))
    one, packed = (np.median(own, axis=0) for own in seconds)
    clock, work = packed / one
    times = f" {one[0] * 1e3:.0f} ms | {packed[0] * 1e3:.0f} ms"
    print(f"{line}{times} | {clock:.2f} / {work:.2f} |", flush=True)


if __name__ == "__main__":
  main()
