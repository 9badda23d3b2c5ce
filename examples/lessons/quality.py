"""Quality beats quantity: few right rows against eight times as many.

    python tools/dev/run_lessons.py --only quality

Of the large sets half the replies are bad: `swapped` has there the reply of
another row, `lazy` has "I do not know.". Expected: the small clean set answers
more than either, in as many steps.
"""

import ml_collections

from examples.lessons.common import Arm, Figure, Lesson, config_of

_FEW = {"facts": 50, "context": 80, "json": 70}
_MANY = {kind: 8 * count for kind, count in _FEW.items()}
LESSON = Lesson(
  name="quality",
  claim="Quality beats quantity",
  arms={
    "clean": Arm(("bundled", {"counts": _FEW})),
    "swapped": Arm(("bundled", {"counts": _MANY, "swapped": 0.5})),
    "lazy": Arm(("bundled", {"counts": _MANY, "lazy": 0.5})),
  },
  prompts=("bundled_prompts", {"groups": ("facts", "context", "json")}),
  figures=(
    Figure("prompts passed", "behavior/all/pass_rate", "clean", "swapped"),
    Figure("prompts passed", "behavior/all/pass_rate", "clean", "lazy"),
  ),
)


def get_config(arm: str = "clean") -> ml_collections.ConfigDict:
  return config_of(LESSON, arm)
