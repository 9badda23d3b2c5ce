"""Do scores find bad rows? Plants some among good ones, and ranks them.

    python tools/bench/bench_scores.py --config=configs/base.py --steps=60

Of the rows of data.train a tenth is spoilt: a third each gets the answer of
another row of its file (shuffled), loses the second half of its answer
(truncated), or is followed by a copy with another row's answer (conflicting).
The spoilt set is scored by the model of the config, and by one tuned on that
set for --steps steps. Of each ranking: precision among as many rows as were
planted (which is recall, too), overall and by kind, and the chance that a
planted row ranks above a good one (AUC; 0.5 is blind). See docs/selection.md.
"""

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import sft_jax
from sft_jax.commands import command, score
from sft_jax.data import selection
from sft_jax.data.readers import files
from sft_jax.reporting import terminal
from sft_jax.training.build import data

CONFIG = command.config_flag()
STEPS = flags.DEFINE_integer("steps", 60, "Of the tuned model; 0 = none.")
SHARE = flags.DEFINE_float("share", 0.1, "Of the rows that are spoilt.")
KINDS = ("shuffled", "truncated", "conflicting")
_RANKINGS = ("nats", "ifd", "alone")

Row = dict[str, Any]


def answer_of(row: Row) -> str | None:
  """The last answer of a row; None where it is not in plain words."""
  for key in ("output", "completion"):
    if key in row:
      return row[key] or None
  turns = row.get("messages") or [{}]
  return turns[-1].get("content") or None


def with_answer(row: Row, answer: str) -> Row:
  """A copy of a row that says something else."""
  row = copy.deepcopy(row)
  for key in ("output", "completion"):
    if key in row:
      row[key] = answer
      return row
  row["messages"][-1]["content"] = answer
  return row


def plant(
  given: list[Row], share: float, rng: random.Random
) -> tuple[list[Row], list[str]]:
  """Rows with some spoilt, and of each which kind it is; '' is none.

  Rows without an answer in words, such as raw text, stay as they are.
  """
  answers = [answer_of(row) for row in given]
  able = [i for i, one in enumerate(answers) if one and len(one.split()) > 3]
  chosen = rng.sample(able, round(share * len(able)))
  kind_of = {i: KINDS[n % len(KINDS)] for n, i in enumerate(chosen)}
  made: list[Row] = []
  kinds: list[str] = []
  for i, row in enumerate(given):
    kind = kind_of.get(i, "")
    others = [answers[k] for k in able if answers[k] != answers[i]]
    if not kind or not others:
      made.append(row)
      kinds.append("")
      continue
    words = str(answers[i]).split()
    other = str(rng.choice(others))
    said = " ".join(words[: len(words) // 2]) if kind == "truncated" else other
    if kind == "conflicting":
      made.append(row)
      kinds.append("")
    made.append(with_answer(row, said))
    kinds.append(kind)
  return made, kinds


def auc(good: np.ndarray, bad: np.ndarray) -> float:
  """The chance that a bad row has a higher score than a good one."""
  both = np.concatenate([good, bad])
  _, which, count = np.unique(both, return_inverse=True, return_counts=True)
  # Ranks from 1; rows that tie share the mean of theirs.
  rank = (np.cumsum(count) - (count - 1) / 2)[which][len(good) :]
  pairs = len(good) * len(bad)
  return float((rank.sum() - len(bad) * (len(bad) + 1) / 2) / pairs)


def figures(values: np.ndarray, kinds: np.ndarray) -> list[str]:
  """Precision among the top, recall by kind there, and AUC by kind."""
  known = ~np.isnan(values)
  values, kinds = values[known], kinds[known]
  bad = kinds != ""
  top = np.argsort(-values, kind="stable")[: bad.sum()]
  cells = [f"{bad[top].mean():.0%}"]
  cells += [
    f"{(kinds[top] == kind).sum() / (kinds == kind).sum():.0%}"
    for kind in KINDS
  ]
  cells += [f"{auc(values[~bad], values[bad]):.2f}"]
  cells += [f"{auc(values[~bad], values[kinds == k]):.2f}" for k in KINDS]
  return cells


def measure(config: Any, folder: Path, say: data.Log) -> list[tuple]:
  """Rows of the table: model, score, and `figures`."""
  kinds: dict[str, dict[str, str]] = {}
  rng = random.Random(config.seed)
  for source in score.files_of(config):
    given = [row for _, row in files.read_rows(source.path)]
    made, of_row = plant(given, SHARE.value, rng)
    path = folder / Path(source.path).with_suffix(".jsonl").name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    kinds[str(path)] = {
      f"{path.name}:{n}": kind for n, kind in enumerate(of_row, 1)
    }
  with config.unlocked():
    config.data.train = str(folder / "*.jsonl")
    config.data.eval, config.data.holdout = "", 0.0  # What is planted overlaps.
    config.eval.behaviors = config.eval.general_text = ""
  models = {"the config's": config.model.path}
  if STEPS.value:
    tuned = config.copy_and_resolve_references()
    tuned.workdir = str(folder / "tuned")
    tuned.steps = STEPS.value
    sft_jax.train(tuned)
    models[f"tuned, {STEPS.value} steps"] = f"{tuned.workdir}/export"
  table = []
  for name, path in models.items():
    config.model.path = path
    found = score.score(config, say)
    every = [(file, row) for file, those in found.items() for row in those]
    labels = np.array([kinds[file][row.place] for file, row in every])
    for ranking in _RANKINGS:
      at = selection.SCORES.index(ranking)
      values = np.array([row.values[at] for _, row in every], np.float64)
      table.append((name, ranking, *figures(values, labels)))
  return table


def main() -> None:
  out = terminal.console()
  config = CONFIG.value
  folder = Path(config.workdir) / "planted"
  table = measure(config, folder, print)
  head = ("model", "ranked by", "found", *KINDS, "AUC", *KINDS)
  terminal.print_table(
    out, "Planted rows among as many of the top", head, table
  )


if __name__ == "__main__":
  command.run_with_flags(main)
