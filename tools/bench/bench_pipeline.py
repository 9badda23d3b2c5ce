"""The input pipeline alone: batches and tokens per second.

    python tools/bench/bench_pipeline.py --step_tokens_per_s=8500

Reads random examples of 200 tokens from a store in memory: what is measured
is laying out rows and handing over batches. The first line is the demo's
batch, against what a training step consumes; see docs/benchmarks.md.
"""

import argparse
import itertools
import time

import numpy as np

import bench_data
from sft_jax.commands import command
from sft_jax.data.pipeline import Stream
from sft_jax.data.sources import Source
from sft_jax.data.store.stats import DatasetStats
from sft_jax.data.store.store import INDEX, RUN, Store, count


def store_of(lengths: np.ndarray) -> Store:
  """Examples of a prompt and an answer of the same length."""
  number, tokens = len(lengths), int(lengths.sum())
  index = np.zeros(number, INDEX)
  index["length"] = lengths
  index["start"] = np.cumsum(lengths) - lengths
  index["trained"] = lengths // 2
  index["row"] = index["content"] = np.arange(number)
  index["run"], index["runs"] = 2 * np.arange(number), 2
  runs = np.zeros(2 * number, RUN)
  runs["length"][::2], runs["length"][1::2] = (
    lengths - lengths // 2,
    lengths // 2,
  )
  runs["weight"][1::2] = 1
  sources = (Source("random"),)
  stats = count(index, runs, sources, DatasetStats())
  stats.source("random").rows_in = number
  ids = np.random.default_rng(0).integers(0, 32_000, tokens)
  return Store(
    tokens=ids.astype(np.uint16),
    runs=runs,
    places=np.empty(0, np.uint8),
    index=index,
    sources=sources,
    fingerprint="random",
    fingerprint_inputs={},
    stats=stats,
  )


def measure(
  store: Store, seq_len: int, batch_size: int, seconds: float
) -> float:
  """Batches per second, after the first."""
  stream = Stream(store, seq_len=seq_len, batch_size=batch_size)
  batches = stream.batches()
  next(batches)
  begin, number = time.perf_counter(), 0
  while time.perf_counter() - begin < seconds:
    number += len(list(itertools.islice(batches, 10)))
  return number / (time.perf_counter() - begin)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--step_tokens_per_s", type=float, default=8500)
  parser.add_argument("--seconds", type=float, default=3)
  flags = parser.parse_args()
  print(bench_data.machine())
  rng = np.random.default_rng(0)
  for seq_len, batch_size, longest in ((256, 16, 160), (2048, 16, 400)):
    store = store_of(rng.integers(20, longest, 50_000))
    speed = max(
      measure(store, seq_len, batch_size, flags.seconds) for _ in range(3)
    )
    tokens = speed * seq_len * batch_size
    print(
      f"{batch_size} x {seq_len}: {speed:,.0f} batches/s, {tokens:,.0f} "
      f"tokens/s, {tokens / flags.step_tokens_per_s:,.0f} times the step"
    )


if __name__ == "__main__":
  command.run(main)
