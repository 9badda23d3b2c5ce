"""Replay of raw text helps against forgetting.

    python tools/dev/run_lessons.py --only replay

The same conversations, alone or with documents of the pretraining as a third
of the rows, in as many steps. Expected: general text stays likelier with
replay, at no cost to the behavior.
"""

import ml_collections

from examples.lessons.common import Arm, Figure, Lesson, config_of

_COUNTS = {"facts": 300, "context": 300, "json": 300}
LESSON = Lesson(
  name="replay",
  claim="Replay helps against forgetting",
  arms={
    "alone": Arm(("bundled", {"counts": _COUNTS})),
    "replay": Arm(("bundled", {"counts": {**_COUNTS, "replay": 450}})),
  },
  prompts=("bundled_prompts", {"groups": ("facts", "context", "json")}),
  figures=(
    Figure(
      "general text, perplexity", "general_text/perplexity", "alone", "replay"
    ),
    Figure("prompts passed", "behavior/all/pass_rate", "replay", "alone"),
  ),
)


def get_config(arm: str = "alone") -> ml_collections.ConfigDict:
  return config_of(LESSON, arm)
