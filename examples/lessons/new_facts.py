"""SFT elicits what pretraining knows; it does not teach new facts cheaply.

    python tools/dev/run_lessons.py --only new_facts

`known` trains on 200 questions about the world that pretraining told of, and
is asked about those that no row names. `new` trains on 200 facts of another
world, and is asked for these very facts in another wording. Expected: `known`
answers more of what it was never trained on than `new` of what it was; and
`new` loses known facts.
"""

import ml_collections

from examples.lessons.common import Arm, Figure, Lesson, config_of

_KNOWN, _NEW = "behavior/known/pass_rate", "behavior/new/pass_rate"
LESSON = Lesson(
  name="new_facts",
  claim="SFT elicits what is known and does not teach new facts cheaply",
  arms={
    "known": Arm(("bundled", {"counts": {"facts": 200}})),
    "new": Arm(("new_facts", {"count": 200})),
  },
  prompts=("fact_prompts", {"count": 200, "asked": 64}),
  figures=(
    Figure("own facts passed", _KNOWN, "known", "new", less_key=_NEW),
    Figure("known facts passed", _KNOWN, "known", "new"),
  ),
)


def get_config(arm: str = "known") -> ml_collections.ConfigDict:
  return config_of(LESSON, arm)
