"""Narrow data overfits and forgets; diverse prompts reduce it.

    python tools/dev/run_lessons.py --only narrow

As many rows and steps in both arms: `narrow` asks of people where they live,
in one wording; `diverse` asks all there is about people, places and things in
all wordings. Expected: `narrow` answers fewer questions about others, finds
held-out answers less likely and forgets more of the general text.
"""

import ml_collections

from examples.lessons.common import Arm, Figure, Lesson, config_of

LESSON = Lesson(
  name="narrow",
  claim="Narrow data overfits and forgets; diverse prompts reduce it",
  arms={
    "narrow": Arm(("homes", {})),
    "diverse": Arm(("bundled", {"counts": {"facts": 28}})),
  },
  prompts=("bundled_prompts", {"groups": ("facts",)}),
  held_out=("held_out_facts", {"count": 96}),
  figures=(
    Figure("facts passed", "behavior/facts/pass_rate", "diverse", "narrow"),
    Figure(
      "held-out answers, nats a token",
      "held_out/nats_per_token",
      "narrow",
      "diverse",
    ),
    Figure(
      "general text, perplexity",
      "general_text/perplexity",
      "narrow",
      "diverse",
    ),
  ),
)


def get_config(arm: str = "narrow") -> ml_collections.ConfigDict:
  return config_of(LESSON, arm)
