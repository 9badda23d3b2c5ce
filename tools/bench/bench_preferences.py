"""Pairs that take away a habit: the demo's answers, half of them hedged.

    python tools/bench/bench_preferences.py --seeds 0 1 2

The demo's base is tuned on rows of which every second answer about a given text
begins with a hedge. The tuned model then answers prompts; of each, a reply that
passes its checks (the right answer, no hedge) and one that fails make a pair,
and the pairs train adapters for a few dozen steps. Printed are the behaviors
before and after: replies without a hedge should rise, the others stay.
Hardware: one CPU core, three minutes a seed. Figures: docs/preferences.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import sft_jax
from configs import base
from sft_jax.commands import command

DEMO = Path("sft_jax/demo")
HEDGE = "Well, I think so. "
GROUPS = ("context", "json", "refusal", "no_over_refusal")
Figures = tuple[float, float]  # Before and after.
FILES = ("context", "json", "refusal", "replay")


def read(path: Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def make_rows(folder: Path) -> tuple[str, str, str]:
  """(rows to tune on, prompts to ask, behaviors to measure)."""
  rows, prompts = list[dict[str, Any]](), list[dict[str, Any]]()
  for name in FILES:
    found = read(DEMO / f"train_{name}.jsonl")
    if name == "context":
      for i, row in enumerate(found):
        asked = f"{row['instruction']}\n\n{row['input']}"
        checks = [
          {"check": "contains", "text": row["output"]},
          {"check": "not_contains", "text": HEDGE.strip()},
        ]
        turns = [{"role": "user", "content": asked}]
        prompts.append({"group": name, "messages": turns, "checks": checks})
        if i % 2:
          row["output"] = HEDGE + row["output"]
    rows += found
  items = [x for x in read(DEMO / "behaviors.jsonl") if x["group"] in GROUPS]
  for item in items:
    # A hedge makes an answer longer, and not wrong.
    item["checks"] = [x for x in item["checks"] if x["check"] != "max_words"]
  unhedged = [{"check": "not_contains", "text": HEDGE.strip()}]
  items += [
    {**item, "group": "no hedge", "checks": unhedged}
    for item in items
    if item["group"] == "context"
  ]
  return (
    write(folder / "rows.jsonl", rows),
    write(folder / "prompts.jsonl", prompts[:160]),
    write(folder / "behaviors.jsonl", items),
  )


def run(
  folder: Path, seed: int, loss: str, steps: int, sft: float
) -> dict[str, Figures]:
  """{behavior or metric: (before, after)} of one seed."""
  rows, prompts, items = make_rows(folder)
  config: Any = base.get_config()
  config.seed, config.steps = seed, steps
  config.data.train, config.data.seq_len = rows, 128
  config.eval.behaviors = config.eval.knowledge = ""
  config.eval.gap, config.eval.answer_words, config.eval.samples = False, 0, 0
  config.eval.general_text = str(DEMO / "general_text.jsonl")
  config.workdir = str(folder / "tuned")
  sft_jax.train(config)
  pairs = str(folder / "pairs.jsonl")
  subprocess.run(
    [
      *(sys.executable, "-m", "sft_jax.main", "synthesize", "--keep=pairs"),
      *(f"--teacher={folder}/tuned/export", f"--prompts={prompts}"),
      *(f"--against={items}", f"--out={pairs}", f"--seed={seed}"),
      *("--samples=4", "--temperature=1.0"),
    ],
    check=True,
  )
  config.model.path = str(folder / "tuned" / "export")
  config.data.train, config.data.holdout = pairs, 0.1
  config.eval.behaviors = items
  config.workdir = str(folder / f"{loss}_{sft}")
  config.preference.loss, config.preference.sft = loss, sft
  config.lora.rank = 16
  config.optim.learning_rate = 5e-4
  config.steps, config.export = steps // 4, False
  found = sft_jax.train(config).metrics
  shown = {
    f"{one['group']}, passed": (one["before"][0], one["after"][0])
    for one in found["behaviors"]
  }
  return shown | {
    one["name"]: (one["before"], one["after"])
    for one in found["losses"] + found["forgetting"]
    if one["before"] is not None
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--workdir", type=Path, default=Path("runs/preferences"))
  add("--loss", default="dpo", help="preference.loss")
  add("--sft", type=float, default=1.0, help="preference.sft")
  add("--steps", type=int, default=80, help="of tuning; a quarter on pairs")
  add("--seeds", type=int, nargs="+", default=[0])
  args = parser.parse_args()
  seeds = []
  for seed in args.seeds:
    folder = args.workdir / str(seed)
    seeds.append(run(folder, seed, args.loss, args.steps, args.sft))
    show(f"seed {seed}", seeds[-1:])
  show("mean", seeds)


def show(name: str, seeds: list[dict[str, Figures]]) -> None:
  """Prints a table of means over seeds."""
  print(f"\n| {name} | before | after |\n| --- | --- | --- |")
  for key in seeds[0]:
    before, after = np.mean([one[key] for one in seeds], axis=0)
    print(f"| {key} | {before:.3f} | {after:.3f} |", flush=True)


if __name__ == "__main__":
  command.run(main)
