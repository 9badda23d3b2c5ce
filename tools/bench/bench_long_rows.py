"""The same documents in rows of 512 to 4,096 tokens: speed and memory.

    python tools/bench/bench_long_rows.py [--backends=auto,xla] [--layers=6] ...

Times the whole training step (float32, AdamW) of a model of Llama's shape on
as many tokens as --tokens, cut into rows of each length. Documents are as long
as those of GSM8K in its chat template (184 tokens on average, 315 at the 95th
percentile); one that the shortest row cuts is cut in the longer ones too, so
the work of attention that cannot be avoided is the same. Programs take turns
and the best of --rounds counts, by the clock and by the CPU time of all
threads, which busy neighbors disturb less; memory is what XLA reserves for
temporaries.
"""

import argparse
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bench_data
from sft_jax.commands import command
from sft_jax.common import flops
from sft_jax.common.batch import Batch
from sft_jax.models import transformer
from sft_jax.models.config import config_from_fields
from sft_jax.step.loss import linear_cross_entropy
from sft_jax.step.train_step import init_state, make_train_step

_LENGTHS = (512, 1024, 2048, 4096)


def documents(tokens: int, cut: int, seed: int = 0) -> np.ndarray:
  """The document of each token, from 1; no document goes over a `cut`."""
  rng, ids = np.random.default_rng(seed), np.zeros(tokens, np.int32)
  start = number = 0
  while start < tokens:
    length = int(np.clip(rng.lognormal(math.log(172), 0.36), 16, 539))
    end = min(start + length, start - start % cut + cut)
    number += 1
    ids[start:end] = number
    start = end
  return ids


def batch_of(ids: np.ndarray, length: int, vocab: int) -> Batch:
  """Rows of `length` slots of the documents, random tokens, half trained."""
  begins = np.flatnonzero(np.diff(ids, prepend=0))
  positions = np.arange(len(ids)) - np.repeat(
    begins, np.diff(begins, append=len(ids))
  )
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, vocab, len(ids))
  last = np.append(ids[1:] != ids[:-1], True)
  flat = Batch(
    tokens=tokens.astype(np.int32),
    targets=np.where(last, 0, np.roll(tokens, -1)).astype(np.int32),
    loss_weights=(~last & (positions >= 60)).astype(np.float32),
    segment_ids=ids,
    positions=positions.astype(np.int32),
  )
  return jax.tree.map(lambda x: x.reshape(1, -1, length), flat)


def make_step(backend: str, args: argparse.Namespace):
  """(init, step) of a model whose attention is of a backend."""
  config = config_from_fields(
    "llama",
    vocab_size=args.vocab,
    num_layers=args.layers,
    d_model=args.d_model,
    d_ff=args.d_ff,
    num_heads=args.heads,
    num_kv_heads=args.heads,
    head_dim=args.d_model // args.heads,
    max_positions=max(_LENGTHS),
  )
  model = transformer.build(config, attention=backend)
  tx = optax.adamw(1e-4)

  def loss(params, batch: Batch):
    hidden = model.hidden(
      params, batch.tokens, batch.positions, batch.segment_ids
    )
    where = (batch.targets, batch.loss_weights)
    return linear_cross_entropy(hidden, model.head(params), *where)

  def init(key):
    return init_state(model.init(key), lambda path: True, tx)

  return init, make_train_step(loss, tx, optax.constant_schedule(1e-4))


def main() -> None:
  """Prints a table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--backends", default="auto,xla")
  parser.add_argument("--tokens", type=int, default=4096)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--layers", type=int, default=6)
  parser.add_argument("--d_model", type=int, default=288)
  parser.add_argument("--d_ff", type=int, default=768)
  parser.add_argument("--heads", type=int, default=6)
  parser.add_argument("--vocab", type=int, default=32_000)
  args = parser.parse_args()
  ids = documents(args.tokens, _LENGTHS[0])
  print(f"{bench_data.machine()}\n{ids[-1]} documents, {args}")
  steps, memory = {}, {}
  for backend in args.backends.split(","):
    init, step = make_step(backend, args)
    state = jax.jit(init)(jax.random.key(0))
    for length in _LENGTHS:
      batch = jax.device_put(batch_of(ids, length, args.vocab))
      compiled = jax.jit(step).lower(state, batch).compile()
      memory[backend, length] = flops.program(compiled).temporaries / 1e6
      steps[backend, length] = (compiled, state, batch)
  best = dict.fromkeys(steps, (math.inf, math.inf))
  nats = {}
  for _ in range(args.rounds):
    for name, (compiled, state, batch) in steps.items():
      start, start_cpu = time.perf_counter(), time.process_time()
      _, metrics = jax.block_until_ready(compiled(state, batch))
      took = time.perf_counter() - start, time.process_time() - start_cpu
      best[name] = min(best[name][0], took[0]), min(best[name][1], took[1])
      nats[name] = float(metrics["loss/nats_per_token"][0])
  spread = jnp.ptp(jnp.array(list(nats.values())))
  print(f"loss of all programs within {spread / nats[name]:.1e} of each other")
  print("backend   row  tokens/s  of 512's  per CPU-s  of 512's  temporaries")
  for (backend, length), (took, cpu) in best.items():
    first, first_cpu = best[backend, _LENGTHS[0]]
    print(
      f"{backend:8} {length:5}  {args.tokens / took:8,.0f}  {first / took:8.2f}"
      f"  {args.tokens / cpu:9,.0f}  {first_cpu / cpu:8.2f}  "
      f"{memory[backend, length]:8,.0f} MB"
    )


if __name__ == "__main__":
  command.run(main)
