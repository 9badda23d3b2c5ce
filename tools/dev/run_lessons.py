"""Puts what is said about SFT to the test, on the demo.

    python tools/dev/run_lessons.py                     all lessons, three seeds
    python tools/dev/run_lessons.py --only quality --only lora
    python tools/dev/run_lessons.py --docs docs/lessons.md

Every examples/lessons/NAME.py is a claim and arms (`common.py` says what they
are). Each arm is trained once per seed in OUT/NAME/ARM/SEED, as an ordinary
run that goes on where it was killed; its figures are kept in figures.json
there, and what has them is not run again. --docs puts the table into a page,
between its markers; without it the table is printed.
"""

import argparse
import hashlib
import importlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sft_jax
from examples.lessons import common
from examples.lessons.common import Lesson
from lessons import figures, rows, teacher, verdict
from sft_jax.commands import command

CONFIGS = Path(common.__file__).parent
ASKED = "asked.jsonl"  # What an arm's teacher is asked.
MARKERS = ("<!-- lessons -->", "<!-- end of lessons -->")


def load() -> dict[str, Lesson]:
  """All lessons, by name."""
  names = sorted(path.stem for path in CONFIGS.glob("*.py"))
  names.remove("common")
  return {
    name: importlib.import_module(f"examples.lessons.{name}").LESSON
    for name in names
  }


def run_arm(lesson: Lesson, arm: str, seed: int, out: Path) -> dict[str, float]:
  """The figures of one arm and seed, trained unless they are there.

  Raises:
    ValueError: the figures that are there are of another arm than this is.
  """
  config: Any = common.config_of(lesson, arm)
  workdir = out / lesson.name / arm / str(seed)
  config.workdir, config.seed = str(workdir), seed
  make, arguments = lesson.arms[arm].rows
  given = rows.ROWS[make](seed, **arguments)
  answers, told = lesson.arms[arm].answers, ""
  if answers:
    run_arm(lesson, answers.by, seed, out)
    by = out / lesson.name / answers.by / str(seed)
    told = f" {_kept(by)['of']} {answers}"
    rows.write(workdir / ASKED, teacher.prompts(given, answers))
  else:
    rows.write(workdir / "rows.jsonl", given)
  make, arguments = lesson.prompts
  rows.write(workdir / "prompts.jsonl", rows.PROMPTS[make](**arguments))
  if lesson.held_out:
    make, arguments = lesson.held_out
    rows.write(workdir / "held_out.jsonl", rows.ROWS[make](seed, **arguments))
  of = _digest(config, workdir, f"{lesson.samples}{told}")
  path = workdir / "figures.json"
  if path.exists():
    kept = _kept(workdir)
    if kept["of"] != of:
      raise ValueError(
        f"{path}: got figures of another config or other rows, expected those "
        f"of {lesson.name}'s arm {arm} as it is now. Remove {workdir}."
      )
    return kept["figures"]
  started = time.perf_counter()
  if answers:
    teacher.write(
      workdir / "rows.jsonl",
      out / lesson.name / answers.by / str(seed) / "export",
      workdir / ASKED,
      workdir / "prompts.jsonl",
      answers,
      seed=seed,
      max_new_tokens=config.eval.max_new_tokens,
    )
  sft_jax.train(config)
  found = figures.of_run(workdir)
  if lesson.samples:
    drawn = figures.sample(
      workdir,
      lesson.samples,
      seed=seed,
      max_new_tokens=config.eval.max_new_tokens,
    )
    found["agreement"] = figures.agreement(drawn)
  seconds = time.perf_counter() - started
  kept = {"of": of, "seconds": seconds, "figures": found}
  path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
  # Of sixty runs they would be a gigabyte.
  shutil.rmtree(workdir / "checkpoints")
  return found


def _kept(workdir: Path) -> dict[str, Any]:
  return json.loads((workdir / "figures.json").read_text("utf-8"))


def _digest(config: Any, workdir: Path, measured: str) -> str:
  """Changes when the config or what it reads in its workdir does.

  What a teacher wrote is left out, for it may differ between machines; it is
  told by what was asked, and of whom.
  """
  # Not where it lies.
  settings = config.to_json().replace(json.dumps(str(workdir))[1:-1], "")
  digest = hashlib.sha256(f"{settings} {measured}".encode())
  own = ASKED if (workdir / ASKED).exists() else "rows.jsonl"
  for name in ("held_out.jsonl", "prompts.jsonl", own):
    path = workdir / name
    if path.exists():
      digest.update(name.encode() + path.read_bytes())
  return digest.hexdigest()


def put(page: Path, table: str) -> None:
  """Puts a table between the markers of a page.

  Raises:
    ValueError: the page lacks them.
  """
  text = page.read_text("utf-8")
  parts = text.split(MARKERS[0])
  if len(parts) != 2 or parts[1].count(MARKERS[1]) != 1:
    raise ValueError(
      f"{page}: got no single pair of {MARKERS[0]} and {MARKERS[1]}, expected "
      "the table to go between them. Add them, a line each."
    )
  after = parts[1].split(MARKERS[1])[1]
  page.write_text(
    f"{parts[0]}{MARKERS[0]}\n{table}\n{MARKERS[1]}{after}", encoding="utf-8"
  )


def run(
  lessons: Mapping[str, Lesson], names: Sequence[str], seeds: int, out: Path
) -> str:
  """Runs the lessons of these names; returns their table.

  Raises:
    ValueError: there is no lesson of such a name; fewer than two seeds.
  """
  if unknown := set(names) - set(lessons):
    raise ValueError(
      f"--only: got {sorted(unknown)}, expected some of {sorted(lessons)}. "
      "Name one of these."
    )
  if seeds < 2:
    raise ValueError(
      f"--seeds: got {seeds}, expected 2 or more. One has no spread to judge "
      "a difference by."
    )
  chosen = [lesson for name, lesson in lessons.items() if name in names]
  found = {
    lesson.name: {
      arm: [run_arm(lesson, arm, seed, out) for seed in range(seeds)]
      for arm in lesson.arms
    }
    for lesson in chosen
  }
  return verdict.table(chosen, found)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--only", action="append", help="a lesson; may repeat")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--out", type=Path, default=Path("runs/lessons"))
  parser.add_argument("--docs", type=Path, help="a page to put the table into")
  flags = parser.parse_args()
  lessons = load()
  table = run(lessons, flags.only or list(lessons), flags.seeds, flags.out)
  if flags.docs:
    put(flags.docs, table)
  else:
    print(table)


if __name__ == "__main__":
  command.run(main)
