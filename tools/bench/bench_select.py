"""Is a tenth of the rows enough? Selected against drawn at random, and all.

    python tools/bench/bench_select.py --workdir=runs/select --seeds 0 1 2

On the short rows of `bench_forgetting --small`, and on the same rows of which
half are spoilt as in `bench_scores`: the base is trained for as many steps on
all rows, on a tenth by `sft-jax select`, and on a tenth drawn at random.
Printed is the share of prompts passed, of each seed and on average.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

import bench_forgetting
import bench_scores
from sft_jax.commands import command, score
from sft_jax.data.readers import files

KEEP = 0.1
WAYS = ("all", "selected", "random")


def write_rows(config: Any, folder: Path, seed: int, spoilt: float) -> None:
  """The conversations of a config, a share spoilt; and a tenth of them."""
  rng = random.Random(seed)
  for path in config.data.train:
    if Path(path).name == bench_forgetting.REPLAY:
      continue  # Raw text has no rank.
    rows = [row for _, row in files.read_rows(path)]
    rows, _ = bench_scores.plant(rows, spoilt, rng)
    for name, some in (
      ("all", rows),
      ("random", rng.sample(rows, round(KEEP * len(rows)))),
    ):
      out = folder / name / Path(path).name
      out.parent.mkdir(parents=True, exist_ok=True)
      out.write_text("".join(json.dumps(row) + "\n" for row in some))


def run(folder: Path, seed: int, spoilt: float, steps: int) -> list[float]:
  """Share of prompts passed in each of WAYS."""
  make = lambda way: bench_forgetting.configured({}, folder / way, seed, True)
  write_rows(make("all"), folder / "rows", seed, spoilt)
  found = []
  for way in WAYS:
    config = make(f"run_{way}")
    rows = folder / "rows" / ("random" if way == "random" else "all")
    config.data.train = f"{rows}/*.jsonl"
    config.steps = steps or config.steps
    if way == "selected":
      score.score(config, lambda line: None, KEEP)
      config.data.filter = (("rank", "<", 1.0),)
    found.append(bench_forgetting.trained(config)[0])
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--workdir", type=Path, default=Path("runs/select"))
  add("--seeds", type=int, nargs="+", default=[0])
  add("--steps", type=int, default=0, help="of each; 0 = bench_forgetting's")
  add("--spoilt", type=float, nargs="+", default=[0.0, 0.5])
  args = parser.parse_args()
  print("| spoilt | seed | " + " | ".join(WAYS) + " |", flush=True)
  for spoilt in args.spoilt:
    found = []
    for seed in args.seeds:
      folder = args.workdir / f"{spoilt:.0%}" / str(seed)
      found.append(run(folder, seed, spoilt, args.steps))
      line(f"{spoilt:.0%}", str(seed), found[-1])
    line(f"{spoilt:.0%}", "mean", np.mean(found, axis=0).tolist())


def line(spoilt: str, seed: str, shares: list[float]) -> None:
  """Prints a row of the table."""
  cells = [spoilt, seed, *(f"{x:.1%}" for x in shares)]
  print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
  command.run(main)
