"""Training on the prompt too is worse than on the assistant alone.

    python tools/dev/run_lessons.py --only prompt_loss

The same rows and steps, with `data.train_on` assistant or all. Expected: with
all, fewer prompts are passed.
"""

import ml_collections

from examples.lessons.common import Arm, Figure, Lesson, config_of

_ROWS = ("bundled", {"counts": {"context": 400, "json": 400}})
LESSON = Lesson(
  name="prompt_loss",
  claim="Loss on the assistant alone beats loss on the prompt too",
  arms={
    "assistant": Arm(_ROWS, {"steps": 25}),
    "all": Arm(_ROWS, {"steps": 25, "data.train_on": "all"}),
  },
  prompts=("bundled_prompts", {"groups": ("context", "json")}),
  figures=(
    Figure("prompts passed", "behavior/all/pass_rate", "assistant", "all"),
    Figure(
      "general text, perplexity",
      "general_text/perplexity",
      "all",
      "assistant",
    ),
  ),
)


def get_config(arm: str = "assistant") -> ml_collections.ConfigDict:
  return config_of(LESSON, arm)
