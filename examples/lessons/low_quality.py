"""Low-quality rows teach low-quality replies.

    python tools/dev/run_lessons.py --only low_quality

Rows of two kinds, half and half. In `sloppy` all replies of one kind, those
that read a note, are written badly: "um", no capitals, no full stop.
Expected: replies in good form become fewer, of that kind and of the other
(facts), whose rows are the same in both arms.
"""

import ml_collections

from examples.lessons.common import Arm, Figure, Lesson, config_of

_COUNTS = {"facts": 300, "context": 300}
_FORM = "behavior/{}/format"
LESSON = Lesson(
  name="low_quality",
  claim="Low-quality rows teach low-quality replies",
  arms={
    "clean": Arm(("bundled", {"counts": _COUNTS})),
    "sloppy": Arm(("bundled", {"counts": _COUNTS, "sloppy": ("context",)})),
  },
  prompts=("bundled_prompts", {"groups": ("facts", "context"), "form": True}),
  figures=(
    Figure("notes: good form", _FORM.format("context"), "clean", "sloppy"),
    Figure(
      "notes: right content", "behavior/context/content", "clean", "sloppy"
    ),
    Figure("facts: good form", _FORM.format("facts"), "clean", "sloppy"),
  ),
)


def get_config(arm: str = "clean") -> ml_collections.ConfigDict:
  return config_of(LESSON, arm)
