"""Synthetic data from a stronger model works, once its replies are checked.

    python tools/dev/run_lessons.py --only synthetic

The teacher is the same base after 120 steps on 1,420 rows. It answers 240
prompts that it has not seen, at a temperature where two in five of its replies
are wrong. `checked` trains a student on replies that pass their checks (up to
eight tries at a prompt), `unchecked` on the first that ends by itself,
`written` on the replies of the demo's own makers to the same prompts, and
`few` on an eighth of these. Expected: `checked` passes more prompts than `few`
and than `unchecked`, and as many as `written`.
"""

import ml_collections

from examples.lessons.common import Answers, Arm, Figure, Lesson, config_of

_GROUPS = ("facts", "context", "json")
_FRESH = ("fresh", {"counts": dict.fromkeys(_GROUPS, 80)})
_ASKED = Answers(by="teacher", temperature=1.7, attempts=8, checked=True)
LESSON = Lesson(
  name="synthetic",
  claim="Synthetic data from a stronger model works",
  arms={
    "teacher": Arm(
      ("bundled", {"counts": {"facts": 420, "context": 500, "json": 500}}),
      {"steps": 120, "export": True},
    ),
    "few": Arm(("fresh", {"counts": dict.fromkeys(_GROUPS, 10)})),
    "written": Arm(_FRESH),
    "unchecked": Arm(_FRESH, answers=_ASKED._replace(checked=False)),
    "checked": Arm(_FRESH, answers=_ASKED),
  },
  prompts=("bundled_prompts", {"groups": _GROUPS}),
  figures=(
    Figure("prompts passed", "behavior/all/pass_rate", "checked", "few"),
    Figure("prompts passed", "behavior/all/pass_rate", "checked", "unchecked"),
    Figure("prompts passed", "behavior/all/pass_rate", "checked", "written"),
  ),
)


def get_config(arm: str = "checked") -> ml_collections.ConfigDict:
  return config_of(LESSON, arm)
