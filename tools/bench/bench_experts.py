"""Times the product of tokens and experts, forward and backward.

    python tools/bench/bench_experts.py [--tokens=2048] [--experts=64] ...

Four ways side by side: `grouped_matmul`; `jax.lax.ragged_dot`; every expert
for every token; and, as the floor, one matrix for as many rows.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sft_jax.common import flops
from sft_jax.models.layers.grouped import grouped_matmul


def seconds(fn: Callable[..., Any], *args: Any) -> float:
  """The best of seven runs."""
  best = float("inf")
  for _ in range(7):
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    best = min(best, time.perf_counter() - start)
  return best


def main() -> None:
  """Prints a table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--tokens", type=int, default=2048)
  parser.add_argument("--experts", type=int, default=64)
  parser.add_argument("--per_token", type=int, default=8)
  parser.add_argument("--d_model", type=int, default=256)
  parser.add_argument("--d_ff", type=int, default=128)
  parser.add_argument("--dtype", default="float32")
  args = parser.parse_args()
  rows, E = args.tokens * args.per_token, args.experts
  keys = jax.random.split(jax.random.key(0), 3)
  tokens = jax.random.normal(keys[0], (args.tokens, args.d_model), args.dtype)
  shape = (E, args.d_model, args.d_ff)
  kernel = jax.random.normal(keys[1], shape, args.dtype)
  chosen = jax.random.randint(keys[2], (rows,), 0, E)
  sizes = jnp.bincount(chosen, length=E)
  repeated = jnp.repeat(tokens, args.per_token, axis=0)
  ways: dict[str, tuple[Callable[..., jax.Array], jax.Array]] = {
    "grouped_matmul": (lambda x, w: grouped_matmul(x, w, sizes), repeated),
    "ragged_dot": (lambda x, w: jax.lax.ragged_dot(x, w, sizes), repeated),
    "every expert": (lambda x, w: jnp.einsum("md,edf->mef", x, w), tokens),
    "one matrix": (lambda x, w: x @ w[0], repeated),
  }
  print(f"{args} on {jax.devices()[0].device_kind}")
  for name, (product, x) in ways.items():
    # cos keeps the compiler from shortening the sum of a product.
    total = lambda x, w, f=product: jnp.sum(jnp.cos(f(x, w)))
    step = jax.jit(jax.grad(total, (0, 1))).lower(x, kernel).compile()
    step(x, kernel)
    memory = flops.program(step).temporaries / 1e6
    took = seconds(step, x, kernel) * 1e3
    print(f"{name:16} {took:8.1f} ms  {memory:8.0f} MB")


if __name__ == "__main__":
  main()
