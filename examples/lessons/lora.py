"""LoRA forgets less than full fine-tuning.

    python tools/dev/run_lessons.py --only lora

The same rows and steps, all parameters or adapters of rank 16 on every linear
layer, each with the demo's learning rate for it. Expected: with LoRA general
text stays likelier, and the behavior is learnt as well.
"""

import ml_collections

from examples.lessons.common import Arm, Figure, Lesson, config_of

_ROWS = ("bundled", {"counts": {"facts": 300, "context": 300, "json": 300}})
LESSON = Lesson(
  name="lora",
  claim="LoRA forgets less than full fine-tuning",
  arms={
    "full": Arm(_ROWS),
    "lora": Arm(
      _ROWS,
      {"lora.rank": 16, "lora.alpha": 32.0, "optim.learning_rate": 5e-3},
    ),
  },
  prompts=("bundled_prompts", {"groups": ("facts", "context", "json")}),
  figures=(
    Figure(
      "general text, perplexity", "general_text/perplexity", "full", "lora"
    ),
    Figure("prompts passed", "behavior/all/pass_rate", "lora", "full"),
  ),
)


def get_config(arm: str = "full") -> ml_collections.ConfigDict:
  return config_of(LESSON, arm)
