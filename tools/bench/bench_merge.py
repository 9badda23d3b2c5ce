"""Two specialists, merged: how much of what each can do is left?

    python tools/bench/bench_merge.py --seeds 0 1 2

From the demo's base, one model learns to answer about a text and write JSON,
another to refuse and to keep a style, both beside replayed text. They are
merged in each of WAYS. Printed, means over seeds: prompts passed of either
kind, the least share of a specialist that is left, perplexity of general text.
Hardware: one CPU core, five minutes a seed.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import bench_forgetting
import sft_jax
from sft_jax.commands import command, evaluate
from sft_jax.evals import behaviors, forgetting
from sft_jax.models.hf.merging import Merge, merge_folders
from sft_jax.training.build import load_run

KINDS = (("context", "json"), ("refusal", "style"))
WAYS = {
  "average": Merge("average"),
  "arithmetic 0.7": Merge("arithmetic", (0.7, 0.7)),
  "arithmetic 1": Merge("arithmetic", (1.0, 1.0)),
  "ties 0.2": Merge("ties", density=0.2),
  "ties 0.5": Merge("ties", density=0.5),
  "dare 0.5": Merge("dare", density=0.5),
}
# Of either kind, the share of prompts passed; and perplexity.
Figures = tuple[float, float, float]


def specialist(folder: Path, seed: int, kinds: tuple[str, ...]) -> Any:
  """The config of a run that learns these, trained."""
  config = bench_forgetting.configured({}, folder / kinds[0], seed, True)
  names = [f"train_{kind}.jsonl" for kind in kinds]
  names.append(bench_forgetting.REPLAY)
  rows = config.data.train
  config.data.train = tuple(x for x in rows if Path(x).name in names)
  config.export = True
  sft_jax.train(config)
  return config


def measured(config: Any, path: Path) -> Figures:
  """What a folder can do."""
  asked = load_run.load(path)
  args = bench_forgetting.arguments(config)
  items = behaviors.load_sets(config.eval.behaviors)
  replies, _ = evaluate.scores(asked, items, args)
  pairs = zip(items, replies.replies, strict=True)
  passed = {kinds: list[bool]() for kinds in KINDS}
  for item, one in pairs:
    (kinds,) = (x for x in KINDS if item.group in x)
    passed[kinds].append(one["passed"])
  length, text = config.data.seq_len, bench_forgetting.TEXT
  rows = evaluate.texts(text, asked, asked.options, length)
  found = forgetting.compare_models(*asked[:2], None, rows, batch_size=16)
  first, second = (float(np.mean(passed[kinds])) for kinds in KINDS)
  value = forgetting.perplexity(found.nats, found.weight).value
  return first, second, value


def run(folder: Path, seed: int) -> dict[str, Figures]:
  configs = [specialist(folder, seed, kinds) for kinds in KINDS]
  models = [Path(config.workdir) / "export" for config in configs]
  base = Path(configs[0].model.path)
  found = {
    ", ".join(kinds): measured(configs[0], path)
    for kinds, path in zip(KINDS, models, strict=True)
  }
  for name, way in WAYS.items():
    out = folder / name.replace(" ", "_")
    given = base if way.method in ("arithmetic", "ties", "dare") else None
    merge_folders(way, models, out, base=given)
    found[name] = measured(configs[0], out)
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", type=Path, default=Path("runs/merge"))
  parser.add_argument("--seeds", type=int, nargs="+", default=[0])
  args = parser.parse_args()
  seeds = [run(args.workdir / str(seed), seed) for seed in args.seeds]
  head = ("model", *map(", ".join, KINDS), "least left", "general text")
  print("| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|")
  both = [np.mean([one[", ".join(x)] for one in seeds], axis=0) for x in KINDS]
  for name in seeds[0]:
    first, second, text = np.mean([one[name] for one in seeds], axis=0)
    left = min(first / both[0][0], second / both[1][1])
    cells = (f"{first:.1%}", f"{second:.1%}", f"{left:.0%}", f"{text:.3f}")
    print("| " + " | ".join((name, *cells)) + " |", flush=True)


if __name__ == "__main__":
  command.run(main)
