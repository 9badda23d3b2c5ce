"""Times the loss head: only trained tokens pay, against every slot paying.

    python tools/bench/bench_head.py

Forward and backward of the head alone, in CPU seconds of all threads, so that
other work on the machine disturbs little. 'Every slot' gives the untrained ones
a weight too small to matter.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.step.loss import linear_cross_entropy

ROWS, LENGTH, SEGMENT, GROUPS = 8, 512, 128, 14


def main() -> None:
  """Prints a line per share of trained tokens."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--width", type=int, default=288)
  parser.add_argument("--vocab", type=int, default=32_000)
  parser.add_argument("--chunk", type=int, default=512)
  parser.add_argument("--rounds", type=int, default=3)
  args = parser.parse_args()
  rng = np.random.default_rng(0)
  slots = (ROWS, LENGTH)
  hidden = jnp.asarray(rng.normal(size=(*slots, args.width)), jnp.float32)
  head = jnp.asarray(
    0.02 * rng.normal(size=(args.vocab, args.width)), jnp.float32
  )
  targets = jnp.asarray(rng.integers(0, args.vocab, slots), jnp.int32)
  groups = jnp.asarray(rng.integers(-1, GROUPS, (*slots, 3)), jnp.int32)

  def loss(hidden, head, weights):
    sums = linear_cross_entropy(
      *(hidden, head, targets, weights, groups),
      num_groups=GROUPS,
      chunk_tokens=args.chunk,
    )
    return sums.objective, sums

  run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  inside = np.arange(LENGTH) % SEGMENT
  for share in (0.3, 0.6, 1.0):
    row = (inside >= SEGMENT * (1 - share)).astype(np.float32)
    weights = jnp.asarray(np.tile(row, (ROWS, 1)))
    kinds = {"trained": weights, "every slot": jnp.maximum(weights, 1e-30)}
    best = dict.fromkeys(kinds, np.inf)
    for _ in range(args.rounds + 1):  # The first compiles.
      for kind, w in kinds.items():
        started = time.process_time()
        jax.block_until_ready(run(hidden, head, w))
        best[kind] = min(best[kind], time.process_time() - started)
    print(
      f"{share:4.0%} trained: {best['trained']:.2f} s, every slot "
      f"{best['every slot']:.2f} s, {best['every slot'] / best['trained']:.2f} "
      "times"
    )


if __name__ == "__main__":
  main()
