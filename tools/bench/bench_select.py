"""Is a tenth of the rows enough? Selected against drawn at random, and all.

    python tools/bench/bench_select.py --workdir=runs/select --seeds 0 1 2

On the short rows of `bench_forgetting --small`, and on the same rows of which
half are spoilt as in `bench_scores`: the base is trained for as many steps on
all rows, on a tenth by `sft-jax select`, on a tenth by it with the model that
was trained on all rows ("warmed": twice the steps in all), and on a tenth drawn
at random. Printed is the share of prompts passed, of each seed and on average,
and in brackets the share of the rows that are spoilt. --orders: once on
300 rows of each kind, by their lengths, by their nats, and shuffled. --rows and
--model: no training; the share of spoilt rows among what is kept of a file.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import bench_forgetting
import bench_scores
from sft_jax.commands import command, score
from sft_jax.data import packing, selection
from sft_jax.data.readers import files
from sft_jax.data.selection import RowScore

KEEP = 0.1
WAYS = ("all", "selected", "warmed", "random")
ORDERS = ("shuffled", "short first", "likely first")
Share = tuple[float, float]  # Of prompts passed; of rows spoilt.


def write_rows(
  config: Any, folder: Path, seed: int, spoilt: float
) -> dict[str, str]:
  """The conversations of a config, a share spoilt; and a tenth of them.

  Returns {"name of a file:line": how that row is spoilt; '' = it is not}.
  """
  rng, found = random.Random(seed), dict[str, str]()
  for path in config.data.train:
    if Path(path).name == bench_forgetting.REPLAY:
      continue  # Raw text has no answers.
    rows = [row for _, row in files.read_rows(path)]
    rows, kinds = bench_scores.plant(rows, spoilt, rng)
    name = Path(path).name
    found |= {f"{name}:{n}": kind for n, kind in enumerate(kinds, 1)}
    some = sorted(rng.sample(range(len(rows)), round(KEEP * len(rows))))
    for way, those in (("all", range(len(rows))), ("random", some)):
      out = folder / way / name
      out.parent.mkdir(parents=True, exist_ok=True)
      out.write_text("".join(json.dumps(rows[i]) + "\n" for i in those))
    found |= {f"random {name}:{i}": kinds[i] for i in some}
  return found


def run(folder: Path, seed: int, spoilt: float, steps: int) -> list[Share]:
  """What came of each of WAYS."""
  make = lambda way: bench_forgetting.configured({}, folder / way, seed, True)
  kinds = write_rows(make("all"), folder / "rows", seed, spoilt)
  drawn = [x for x in kinds if x.startswith("random ")]
  found = []
  for way in WAYS:
    config = make(f"run_{way}")
    rows = folder / "rows" / ("random" if way == "random" else "all")
    config.data.train = f"{rows}/*.jsonl"
    config.steps, config.export = steps or config.steps, way == "all"
    mine = drawn if way == "random" else [x for x in kinds if x not in drawn]
    if way in ("selected", "warmed"):
      config.data.scores = str(folder / f"scores_{way}")
      by = config.copy_and_resolve_references()
      if way == "warmed":
        by.model.path = str(folder / "run_all" / "export")
      chosen = score.score(by, lambda line: None, KEEP)
      mine = [x.place for of in chosen.values() for x in of if is_kept(x)]
      config.data.filter = (("rank", "<", 1.0),)
    passed = bench_forgetting.trained(config)[0]
    found.append((passed, float(np.mean([kinds[x] != "" for x in mine]))))
  return found


def run_orders(folder: Path, seed: int) -> list[float]:
  """Prompts passed after one pass over some rows in each of ORDERS."""
  make = lambda way: bench_forgetting.configured({}, folder / way, seed, True)
  write_rows(make(""), folder / "rows", seed, 0.0)
  for path in (folder / "rows" / "all").iterdir():
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:300]))
  nats, found, usual = np.empty(0), [], packing.assign_rows
  for way in ORDERS:
    config = make(way.replace(" ", "_"))
    config.data.train = f"{folder}/rows/all/*.jsonl"
    config.data.scores = str(folder / "scores")
    # One document a pack, so that the order is that of the rows.
    config.data.packing, config.data.seq_len, config.batch_size = False, 96, 16
    config.steps, config.epochs = 0, 1
    if not len(nats):
      by = score.score(config, lambda line: None)
      nats = np.array([x.values[0] for of in by.values() for x in of])
    shuffled = np.random.default_rng(seed).permutation(len(nats))

    def assign(
      lengths: np.ndarray,
      patterns: Any,
      *,
      seed: Any,
      key: str = way,
      nats: np.ndarray = nats,
      order: np.ndarray = shuffled,
    ) -> packing.Plan:
      if len(lengths) != len(nats):  # Of general text.
        return usual(lengths, patterns, seed=seed)
      by = {"short first": lengths, "likely first": nats, "shuffled": 0 * nats}
      order = order[np.argsort(by[key][order], kind="stable")]
      return packing.Plan(order, np.arange(len(order) + 1))

    with mock.patch.object(packing, "assign_rows", assign):
      found.append(bench_forgetting.trained(config)[0])
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--workdir", type=Path, default=Path("runs/select"))
  add("--seeds", type=int, nargs="+", default=[0])
  add("--steps", type=int, default=0, help="of each; 0 = bench_forgetting's")
  add("--spoilt", type=float, nargs="+", default=[0.0, 0.5])
  add("--orders", action="store_true", help="compare these in place of ways")
  add("--rows", default="")
  add("--model", default="")
  args = parser.parse_args()
  if args.rows:
    for seed in args.seeds:
      folder = args.workdir / f"rows{seed}"
      found = kept_spoilt(folder, args.rows, args.model, seed)
      line(str(seed), *(f"{x:.0%}" for x in found))
    return
  if args.orders:
    print("| seed | " + " | ".join(ORDERS) + " |", flush=True)
    shares = [run_orders(args.workdir / f"o{s}", s) for s in args.seeds]
    for name, one in (*zip(args.seeds, shares, strict=True), mean(shares)):
      line(str(name), *(f"{x:.1%}" for x in one))
    return
  print("| spoilt | seed | " + " | ".join(WAYS) + " |", flush=True)
  for spoilt in args.spoilt:
    found = []
    for seed in args.seeds:
      folder = args.workdir / f"{spoilt:.0%}" / str(seed)
      found.append(run(folder, seed, spoilt, args.steps))
      show(f"{spoilt:.0%}", seed, found[-1])
    show(f"{spoilt:.0%}", *mean(found))


def kept_spoilt(folder: Path, rows: str, model: str, seed: int) -> Share:
  """Shares of 300 short rows of a file, half spoilt: of all, of those kept."""
  rng = random.Random(seed)
  short = [row for _, row in files.read_rows(rows) if len(str(row)) < 400]
  made, kinds = bench_scores.plant(rng.sample(short, 300), 0.5, rng)
  path = folder / "rows.jsonl"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in made))
  config = bench_forgetting.configured({}, folder / "run", seed, True)
  config.model.path, config.data.train = model, str(path)
  config.data.seq_len = 256
  (found,) = score.score(config, print, KEEP).values()
  at = [int(x.place.split(":")[1]) - 1 for x in found if is_kept(x)]
  bad = np.array([kind != "" for kind in kinds])
  return float(bad.mean()), float(bad[at].mean())


def is_kept(row: RowScore) -> bool:
  rank = row.values[selection.SCORES.index("rank")]
  return rank is not None and rank < 1


def mean(found: list[Any]) -> tuple[str, list[Any]]:
  return "mean", np.mean(found, axis=0).tolist()


def show(spoilt: str, seed: Any, found: list[Share]) -> None:
  """Prints a row of the table."""
  line(spoilt, str(seed), *(f"{x:.1%} ({bad:.0%})" for x, bad in found))


def line(*cells: str) -> None:
  print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
  command.run(main)
