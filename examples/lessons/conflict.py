"""Conflicting examples make replies inconsistent.

    python tools/dev/run_lessons.py --only conflict

The harbour office answers 150 prompts in its house style; in `conflicting`
each prompt stands there once more with a plain reply. Expected: of replies
sampled at temperature 1 for held-out prompts, fewer pairs agree.
"""

import ml_collections

from examples.lessons.common import Arm, Figure, Lesson, config_of

LESSON = Lesson(
  name="conflict",
  claim="Conflicting examples make replies inconsistent",
  arms={
    "agreeing": Arm(("harbour", {"conflicting": False})),
    "conflicting": Arm(("harbour", {"conflicting": True})),
  },
  prompts=("bundled_prompts", {"groups": ("style",)}),
  figures=(
    Figure("samples that agree", "agreement", "agreeing", "conflicting"),
    Figure(
      "style prompts passed",
      "behavior/style/pass_rate",
      "agreeing",
      "conflicting",
    ),
  ),
  samples=4,
)


def get_config(arm: str = "agreeing") -> ml_collections.ConfigDict:
  return config_of(LESSON, arm)
