"""Replies of several models to the same prompts, side by side on a page."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sft_jax.reporting.html.elements import join, mark

Sides = Mapping[str, Sequence[Mapping[str, Any]]]

# Of one group of replies, so that none crowds the others out.
_SHOWN = 3


def before_and_after(run: Mapping[str, Any]) -> dict[str, Any]:
  """Replies to prompts with checks, else to held-out rows: 'note', 'cards'."""
  found = {side: run.get(side, {}) for side in ("before", "after")}
  checked = {s: x["behaviors"] for s, x in found.items() if "behaviors" in x}
  if checked:
    note = (
      "Of each group the first prompt that was lost, gained, failed and "
      f"passed, {_SHOWN} at most. Words that only one of the replies has are "
      "marked."
    )
    sides = {side: scores["replies"] for side, scores in checked.items()}
    return {"note": note, "cards": cards(sides)}
  replies = {
    side: {row["where"]: row for row in x["replies"]}
    for side, x in found.items()
    if x.get("replies")
  }
  if not replies:
    return {"cards": []}
  first, *others = replies.values()
  own = {w: {**x, "reply": x["row"], "stopped": True} for w, x in first.items()}
  replies = {"the row": own, **replies}
  made = []
  for where, row in first.items():
    # A run that was forced on may have asked for other rows.
    if all(where in one for one in others):
      prompt = [{"role": "", "content": row["prompt"]}]
      more = {"group": where, "prompt": prompt, "passed": None}
      answers = [of[where] | more for of in replies.values()]
      made.append(_card(list(replies), answers))
  note = (
    "Held-out rows, as there are no behaviors; nothing is checked. Words that "
    "the row does not have are marked."
  )
  return {"note": note, "cards": made}


def cards(sides: Sides) -> list[dict[str, Any]]:
  """Replies of several models to the same prompts, differences marked.

  `sides` are records of `behaviors.Scores.replies` by name, in one order. Of
  each group the first prompt of each pattern of passed and failed is a card;
  those that only some passed come first.
  """
  groups: dict[str, dict[tuple[bool, ...], tuple]] = {}
  for answers in zip(*sides.values(), strict=True):
    patterns = groups.setdefault(answers[0]["group"], {})
    patterns.setdefault(tuple(a["passed"] for a in answers), answers)
  made = []
  for patterns in groups.values():
    # What was lost, what was gained, what all fail, what all pass.
    order = sorted(patterns, key=lambda p: (len(set(p)) == 1, p[-1], p))
    made += [_card(list(sides), patterns[p]) for p in order[:_SHOWN]]
  return made


def _card(
  names: Sequence[str], answers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
  """A prompt and the replies to it, for macros.cards."""
  first, *others = [text_of(answer, answer["reply"]) for answer in answers]
  marked = [mark(first, other) for other in others]
  bodies = [join([first]), *(one.new for one in marked)]
  if len(marked) == 1:
    bodies[0] = marked[0].old
  notes = ["", *(one.note for one in marked)]
  prompt = [
    {"role": turn["role"], "text": text_of(turn, turn["content"])}
    for turn in answers[0]["prompt"]
  ]
  shown = zip(names, answers, bodies, notes, strict=True)
  return {
    "group": answers[0]["group"],
    "prompt": prompt,
    "replies": [{**a, "name": n, "body": b, "note": x} for n, a, b, x in shown],
  }


def text_of(turn: Mapping[str, Any], content: str) -> str:
  """All that a turn says: reasoning, tool calls, and the text."""
  thought = turn.get("reasoning")
  parts = [f"(thinks) {thought}"] if thought else []
  for call in turn.get("tool_calls", ()):
    parts.append(f"(calls) {call['name']} {json.dumps(call['arguments'])}")
  return "\n".join([*parts, content] if content else parts)
