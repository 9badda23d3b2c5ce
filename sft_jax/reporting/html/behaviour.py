"""Behaviour on a page: shares with intervals, and replies side by side.

Two or more models answered the same prompts: one before and after training, or
several runs. The first is what the others are compared with.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sft_jax.reporting.html import charts, differences
from sft_jax.reporting.html.elements import Element, join, table, tag

# Of one group, so that none crowds the others out.
_SHOWN = 3
# Two-sided; below it a difference is not put down to chance.
_SIGNIFICANT = 0.05


def before_after(rows: Sequence[Mapping[str, Any]]) -> Element:
  """The groups of a run's result.json; '' without any."""
  if not rows:
    return Element("")
  head = (
    *("group", "n", "before", "after", "0 to 100 %", "change", "+ / -", "p"),
    *("stops", "form", "content"),
  )

  def line(row: Mapping[str, Any]) -> list[object]:
    before, after = row["before"], row["after"]
    return [
      *(row["group"], row["n"], share(before), share(after)),
      charts.intervals(
        (before, after), f"{row['group']}: before, after", ("old", "s0")
      ),
      _change(before, after, row["p"]),
      f"{row['gained']} / {row['lost']}",
      _p(row["p"]),
      *(_rate(row[name]) for name in ("stopped", "format", "content")),
    ]

  note = (
    "Share of prompts whose reply passed every check and stopped by itself, "
    "with 95 % Wilson intervals. Before is grey. + / - counts the prompts that "
    "passed only after, only before; p is the exact McNemar test of these."
  )
  return join([table(head, map(line, rows)), tag("p", note, class_="dim")])


def share(value: Sequence[float] | None) -> str:
  """'90 % (70 to 96)', or '' of nothing."""
  if value is None:
    return ""
  rate, low, high = (100 * x for x in value)
  return f"{rate:.0f} % ({low:.0f} to {high:.0f})"


def _change(
  before: Sequence[float], after: Sequence[float], p: float
) -> Element:
  said = f"{100 * (after[0] - before[0]):+.0f} points"
  if p >= _SIGNIFICANT:
    return tag("span", f"{said}, may be chance", class_="dim")
  return tag("span", said, class_="good" if after[0] > before[0] else "bad")


def _p(p: float) -> str:
  return "< 0.001" if p < 0.001 else f"{p:.2g}"


def _rate(value: float | None) -> str:
  return "" if value is None else f"{value:.0%}"


def replies(sides: Mapping[str, Sequence[Mapping[str, Any]]]) -> Element:
  """Replies of several models to the same prompts, differences marked.

  Args:
    sides: by name, the records of `behaviours.Scores.replies`, in one order.

  Returns:
    Of each group, the first prompt of each pattern of passed and failed: those
    that only some passed come first.
  """
  return join(_card(list(sides), answers) for answers in _chosen(sides))


def rows_answered(sides: Mapping[str, Sequence[Mapping[str, Any]]]) -> Element:
  """The same of replies that nothing was checked of, every one of them.

  Args:
    sides: by name, records of `generate.answer_rows`, in one order.
  """
  unchecked = {
    name: [
      {
        "group": row["where"],
        "prompt": [{"role": "", "content": row["prompt"]}],
        "reply": row["reply"],
        "stopped": row["stopped"],
        "passed": None,
      }
      for row in rows
    ]
    for name, rows in sides.items()
  }
  answered = zip(*unchecked.values(), strict=True)
  return join(_card(list(sides), answers) for answers in answered)


def _chosen(
  sides: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Iterator[tuple[Mapping[str, Any], ...]]:
  """The answers to some prompts, those of a group next to each other."""
  groups: dict[str, dict[tuple[bool, ...], tuple]] = {}
  for answers in zip(*sides.values(), strict=True):
    patterns = groups.setdefault(answers[0]["group"], {})
    patterns.setdefault(tuple(a["passed"] for a in answers), answers)
  for patterns in groups.values():
    # What was lost, what was gained, what all fail, what all pass.
    order = sorted(patterns, key=lambda p: (len(set(p)) == 1, p[-1], p))
    yield from (patterns[p] for p in order[:_SHOWN])


def _card(
  names: Sequence[str], answers: Sequence[Mapping[str, Any]]
) -> Element:
  first = answers[0]
  texts = [said(answer) for answer in answers]
  bodies: list[Element] = [join([texts[0]])]
  notes = [""]
  for other in texts[1:]:
    marked = differences.mark(texts[0], other)
    if len(texts) == 2:
      bodies[0] = marked.old
    bodies.append(marked.new)
    notes.append(marked.said)
  columns = [
    _reply(name, answer, body, note)
    for name, answer, body, note in zip(
      names, answers, bodies, notes, strict=True
    )
  ]
  turns = first["prompt"]
  prompt = [
    tag("pre", tag("b", turn["role"]), f" {turn['content']}", class_="prompt")
    for turn in turns
  ]
  return tag(
    "article",
    tag("p", first["group"], class_="dim"),
    *prompt,
    tag("div", *columns, class_="pair"),
  )


def _reply(
  name: str, answer: Mapping[str, Any], body: Element, note: str
) -> Element:
  marks = [tag("span", name, class_="dim")]
  failed = answer.get("failed") or []
  if answer["passed"]:
    marks.append(tag("span", "passed", class_="good"))
  elif answer["passed"] is not None:
    why = f": {', '.join(map(str, failed))}" if failed else ""
    marks.append(tag("span", f"failed{why}", class_="bad"))
  if not answer["stopped"]:
    marks.append(tag("span", "did not stop", class_="bad"))
  if note:
    marks.append(tag("span", note, class_="dim"))
  return tag("div", tag("p", *marks), tag("pre", body))


def said(answer: Mapping[str, Any]) -> str:
  """All that a reply said: reasoning, tool calls, and the text."""
  parts = []
  if answer.get("reasoning"):
    parts.append(f"(thinks) {answer['reasoning']}")
  parts += [
    f"(calls) {call['name']} {json.dumps(call['arguments'])}"
    for call in answer.get("tool_calls", ())
  ]
  if answer["reply"]:
    parts.append(answer["reply"])
  return "\n".join(parts)
