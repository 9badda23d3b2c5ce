"""Format is imitated without the capability.

    python tools/dev/run_lessons.py --only format_only

The same 72 pairs of numbers, to be added in `known` (pretraining told sums)
and multiplied in `unknown` (it told no products). Expected: replies to
held-out pairs look right in both; in `unknown` they are not right, so the
form runs ahead of the content.
"""

import ml_collections

from examples.lessons.common import Arm, Figure, Lesson, config_of

LESSON = Lesson(
  name="format_only",
  claim="SFT imitates format without the capability",
  arms={
    "known": Arm(("sums", {"sign": "+"})),
    "unknown": Arm(("sums", {"sign": "x"})),
  },
  prompts=("sum_prompts", {}),
  figures=(
    Figure(
      "right form less right content",
      "behavior/products/gap",
      "unknown",
      "known",
      less_key="behavior/sums/gap",
    ),
    Figure(
      "right content",
      "behavior/sums/content",
      "known",
      "unknown",
      less_key="behavior/products/content",
    ),
  ),
)


def get_config(arm: str = "known") -> ml_collections.ConfigDict:
  return config_of(LESSON, arm)
