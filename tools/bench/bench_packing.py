"""Packing: fill and speed, beside Grain's packers and TRL's `bfd`.

    python tools/bench/bench_packing.py --shared=../shared/data

Fill is the share of slots with a token, the last pack left out. Grain packs
examples as they stream by, in the order given (here shuffled), with 64 open
bins; TRL plans each 1,000 rows by themselves, as its trainer does, and all
rows at once. Seconds of TRL and Grain include the making of packed rows.
"""

import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grain
import grain.experimental
import numpy as np

import bench_data
from sft_jax.commands import command
from sft_jax.data import packing
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.store import build
from sft_jax.data.tokenizers.tokenizer import load_tokenizer

CAPACITY = 2048


def ours(lengths: np.ndarray) -> list[int]:
  plan = packing.plan(lengths, CAPACITY, seed=0)
  return np.add.reduceat(lengths[plan.rows], plan.starts[:-1]).tolist()


def by_grain(packer: Callable, lengths: np.ndarray) -> list[int]:
  rows = grain.MapDataset.source(
    [{"tokens": np.ones(n, np.int32)} for n in lengths]
  )
  packed = packer(
    rows.seed(0).shuffle().to_iter_dataset(),
    length_struct={"tokens": CAPACITY},
    num_packing_bins=64,
    shuffle_bins=False,
  )
  return [int(one["tokens"].sum()) for one in packed]


def by_trl(lengths: np.ndarray, batch_size: int | None) -> list[int]:
  import datasets  # pyright: ignore[reportMissingImports]
  import trl  # pyright: ignore[reportMissingImports]

  datasets.disable_progress_bars()
  datasets.disable_caching()
  rows = datasets.Dataset.from_dict(
    {"input_ids": [np.ones(n, np.int32) for n in lengths]}
  )
  packed = trl.pack_dataset(
    rows, CAPACITY, "bfd", map_kwargs={"batch_size": batch_size}
  )
  return [len(one) for one in packed["input_ids"]]


def measure(name: str, pack: Callable[[], list[int]]) -> None:
  begin = time.process_time()
  sizes = pack()
  seconds = time.process_time() - begin
  fill = sum(sizes[:-1]) / (len(sizes[:-1]) * CAPACITY)
  print(
    f"  {name:26} {len(sizes):6,} packs  {fill:7.2%}  {seconds * 1e3:8.0f} ms"
  )


def real_lengths(shared: Path) -> dict[str, np.ndarray]:
  with tempfile.TemporaryDirectory() as folder:
    tokenizer = load_tokenizer(
      bench_data.tokenizer_folder(shared, Path(folder) / "model")
    )
    return {
      name: build.build(
        str(file),
        tokenizer,
        # T0's answers end in the text of another model's stop token.
        RenderOptions(control_tokens="allow"),
        directory=Path(folder) / "cache",
        max_length=CAPACITY,
        log=lambda line: None,
      ).lengths.copy()
      for name, file in bench_data.files(shared).items()
    }


def main() -> None:
  flags = bench_data.parser(__doc__).parse_args()
  print(bench_data.machine())
  real = real_lengths(flags.shared)
  for name, lengths in real.items():
    print(f"{name}: {len(lengths):,} rows, {lengths.mean():.0f} tokens each")
    measure("ours", lambda: ours(lengths))  # noqa: B023, called at once
    for packer in ("BestFitPackIterDataset", "FirstFitPackIterDataset"):
      made = getattr(grain.experimental, packer)
      measure(f"Grain {packer[:8]}", lambda: by_grain(made, lengths))  # noqa: B023
    if importlib.util.find_spec("trl") is None:
      print("  trl is not installed: pip install trl")
    else:
      measure("TRL bfd, 1,000 at a time", lambda: by_trl(lengths, 1000))  # noqa: B023
      measure("TRL bfd, all at once", lambda: by_trl(lengths, len(lengths)))  # noqa: B023
  everything = np.concatenate(list(real.values()))
  for number in (1_000_000, 10_000_000):
    many = np.random.default_rng(0).choice(everything, number)
    best = min(_seconds(many) for _ in range(3))
    print(f"plan of {number:,} rows, dealt: {best:.2f} s of one core")


def _seconds(lengths: np.ndarray) -> float:
  begin = time.process_time()
  packing.plan(lengths, CAPACITY, seed=0)
  return time.process_time() - begin


if __name__ == "__main__":
  command.run(main)
