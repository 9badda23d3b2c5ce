"""What a lesson is, and the small run that every arm of one is.

    python tools/dev/run_lessons.py --only quality

A lesson is a claim about SFT and two or more arms that differ in one thing.
Each arm is an ordinary run of the demo; what it trains on and is asked is made
by tools/dev/lessons/rows.py into its workdir. Hardware: one CPU core. Time:
some 20 s a run. Expect: what docs/lessons.md shows.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from configs import base

# A maker of rows or prompts of tools/dev/lessons/rows.py, and its arguments.
Made = tuple[str, Mapping[str, Any]]


class Answers(NamedTuple):
  """How a teacher writes replies, see sft-jax synthesize.

  Attributes:
    by: the arm that is asked; it must be exported.
    temperature: of its sampling.
    attempts: most replies to a prompt.
    checked: a reply must pass all checks of its row; else it need only end by
      itself and say something.
  """

  by: str
  temperature: float
  attempts: int
  checked: bool


class Arm(NamedTuple):
  """One way of training.

  Attributes:
    rows: what makes the rows that are trained on.
    changes: of the config, by key: {"lora.rank": 16}.
    answers: a teacher's replies in place of the rows' own; the rows have
      `checks` then, and a `group`.
  """

  rows: Made
  changes: Mapping[str, Any] = {}
  answers: Answers | None = None


class Figure(NamedTuple):
  """What is compared, and in which arm the claim expects more of it.

  Attributes:
    what: in words.
    key: of the figures that tools/dev/lessons/figures.py reads off a run.
    more, less: names of arms.
    less_key: of the arm with less, where it is another; '' = `key`.
  """

  what: str
  key: str
  more: str
  less: str
  less_key: str = ""


class Lesson(NamedTuple):
  """A claim and how it is put to the test.

  Attributes:
    name: of its file.
    claim: what is said.
    arms: by name.
    prompts: what makes the behavior set, the same for all arms.
    figures: what decides.
    held_out: what makes conversations to measure losses on; None = none.
    samples: replies per prompt to measure agreement with; 0 = not measured.
  """

  name: str
  claim: str
  arms: Mapping[str, Arm]
  prompts: Made
  figures: tuple[Figure, ...]
  held_out: Made | None = None
  samples: int = 0


def get_config() -> ml_collections.ConfigDict:
  """What all arms of all lessons share."""
  config = base.get_config()
  config.workdir = "runs/lessons/common"
  config.steps = 40
  config.batch_size = 4
  # Within the workdir, wherever that is.
  folder = config.get_ref("workdir")
  config.data.train = folder + "/rows.jsonl"
  config.data.holdout = 0.0
  config.data.workers = 1
  config.optim.warmup_steps = 5
  config.checkpoint.every = 0
  config.eval.behaviors = folder + "/prompts.jsonl"
  config.eval.general_text = "sft_jax/demo/general_text.jsonl"
  config.eval.max_new_tokens = 40
  config.eval.samples = 0
  config.export = False
  return config


def config_of(lesson: Lesson, arm: str) -> ml_collections.ConfigDict:
  """The run that an arm is.

  Raises:
    ValueError: the lesson has no such arm, or base.py no such key.
  """
  if arm not in lesson.arms:
    raise ValueError(
      f"lesson {lesson.name}: got arm {arm!r}, expected one of "
      f"{list(lesson.arms)}. Name one of these."
    )
  config = get_config()
  config.workdir = f"runs/lessons/{lesson.name}/{arm}/0"
  if lesson.held_out:
    config.data.eval = config.get_ref("workdir") + "/held_out.jsonl"
  config.update_from_flattened_dict(dict(lesson.arms[arm].changes))
  return config
