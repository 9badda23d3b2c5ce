"""Refuses a rendering that leaves out or changes what the row says."""

import collections
from collections.abc import Sequence

from sft_jax.data.chat import marks, template_messages
from sft_jax.data.chat.renderer import Script
from sft_jax.data.chat.trained_turn import Turn
from sft_jax.data.conversation import RowError

# (index of a message, part, text) of something that it says.
_Said = tuple[int, str, str]


def refuse_unsaid(script: Script, last: Turn, cut: Sequence[Turn]) -> None:
  """Raises where the template leaves out or changes what a turn says.

  A trained turn must be there as it is, but for white space around it and
  the escapes of JSON. Of what was asked, a template may make what it likes,
  for inference sees the same; but it must be there. Earlier replies and the
  answers of tools may be gone.

  Args:
    script: of the row.
    last: the rendering.
    cut: the trained turns in it.

  Raises:
    RowError: with the first text that is missing.
  """
  asked = [
    said
    for index, message in enumerate(script.conversation.messages[: last.index])
    if message.role in ("system", "user")
    for said in _said(script, index)
  ]
  missing = _missing(asked, last, 0, last.start, changed=True)
  for one in cut:
    missing = missing or _missing(
      _said(script, one.index), last, one.start, one.stop, changed=False
    )
  if missing is not None:
    index, part, text = missing
    cure = "Use a template that renders it, or drop it from the row."
    if part == "reasoning":
      ways = (
        "strip" if script.options.reasoning == "write" else "strip or write"
      )
      cure = f"Set data.reasoning to {ways}, or use a template that renders it."
    raise RowError(
      script.conversation.where(index),
      f"a template that leaves out or changes {text[:60]!r}",
      "all that a turn says in the rendered text",
      cure,
    )


def _said(script: Script, index: int) -> list[_Said]:
  """All that a message says, without white space around it."""
  message = script.conversation.messages[index]
  pairs = (
    (part, text.strip()) for part, text in template_messages.said(message)
  )
  return [(index, part, text) for part, text in pairs if text]


def _missing(
  said: Sequence[_Said], last: Turn, start: int, end: int, *, changed: bool
) -> _Said | None:
  """The first that is not in [start, end) of a rendering, as often as it is
  said; where `changed`, it may be there in other words."""
  if last.pieces is None:
    shown = last.text[start:end]
    return next((one for one in said if not _stands_in(one[2], shown)), None)
  there = collections.Counter(
    (piece.part, piece.said)
    for piece in last.pieces
    if start <= piece.start and piece.end <= end
    if changed
    or marks.as_written(piece.said, last.text[piece.start : piece.end])
  )
  for one in said:
    there[one[1:]] -= 1
    if there[one[1:]] < 0:
      return one
  return None


def _stands_in(text: str, shown: str) -> bool:
  """Whether a text stands in another, as it is or as in JSON."""
  return (
    text in shown
    or marks.in_json(text) in shown
    or marks.in_json(text, ascii_only=True) in shown
  )
