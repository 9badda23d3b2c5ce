"""What the parts of a rendering are: muted, someone's words, or literal."""

import re
from collections.abc import Iterable, Sequence

from sft_jax.data.chat import marks, template_messages, template_probes
from sft_jax.data.chat.marks import Piece
from sft_jax.data.chat.renderer import Script
from sft_jax.data.chat.trained_turn import Turn
from sft_jax.data.conversation import Message, RowError

# Whose text a token is; an Example holds the indices.
TOKEN_ROLES = (
  "template",  # Structure, which no message holds.
  "system",
  "user",
  "tool",  # What a tool answers.
  "answer",
  "reasoning",
  "tool_call",  # Its syntax in a trained turn included.
  "stop",
  "text",  # Raw text, or ids made elsewhere.
)
_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")
_TAG = re.compile(r"\s*<[^<>\s]+>\s*")


def muted(
  script: Script, one: Turn, pieces: Sequence[Piece] | None
) -> list[tuple[int, int]]:
  """What of a trained turn is not trained: hidden thinking, and all that its
  own spans leave out."""
  message = script.conversation.messages[one.index]
  hides = (
    script.options.reasoning == "hide" and (message.reasoning or "").strip()
  )
  if not hides and message.spans is None:
    return []

  def uncertain(what: str) -> RowError:
    return RowError(
      script.conversation.where(one.index),
      f"a rendering in which {what} cannot be told from the rest",
      "a template that renders it as it is",
      "Train the whole turn, or drop the row.",
    )

  own = [
    piece
    for piece in pieces or ()
    if one.start <= piece.start and piece.end <= one.stop
  ]
  if message.spans is not None:
    answer = [piece for piece in own if piece.part == "answer"]
    core = message.content.strip()
    shown = [one.text[piece.start : piece.end] for piece in answer]
    if message.spans and shown != [core]:
      raise uncertain("the content")
    kept: list[tuple[int, int]] = []
    if message.spans:
      (piece,) = answer
      moved = piece.start - message.content.index(core)
      kept = [(a + moved, b + moved) for a, b in message.spans]
      # Whoever trains the last word trains to stop after it.
      if kept[-1][1] >= piece.end:
        kept[-1] = (kept[-1][0], one.end)
    return _between(kept, one.start, one.end)
  thought = [piece for piece in own if piece.part == "reasoning"]
  if len(thought) != 1:
    raise uncertain("the thinking")
  return [_think_block(one, own, thought[0])]


def _between(
  kept: Iterable[tuple[int, int]], start: int, end: int
) -> list[tuple[int, int]]:
  """What of [start, end) is outside of the ranges kept."""
  gaps, at = [], start
  for a, b in (*kept, (end, end)):
    if at < a:
      gaps.append((at, a))
    at = max(at, b)
  return gaps


def _think_block(
  turn: Turn, own: list[Piece], thought: Piece
) -> tuple[int, int]:
  """A turn's thinking with the tags around it.

      <think>\\nTwos.\\n</think>\\n\\n4<|im_end|>
      ------------------------------

  It starts where the turn or what is said before it ends, and ends where the
  answer starts; or, where a tool call follows, with the next tag.
  """
  at = own.index(thought)
  start = own[at - 1].end if at else turn.start
  if at + 1 < len(own) and own[at + 1].part == "answer":
    return start, own[at + 1].start
  until = own[at + 1].start if at + 1 < len(own) else turn.stop
  return start, _after_tag(turn.text, thought.end, until)


def parts(
  messages: Sequence[Message],
  text: str,
  pieces: Sequence[Piece] | None,
  cut: Sequence[Turn] = (),
) -> tuple[tuple[int, int, str], ...]:
  """Who says what, with the stop tokens of the trained turns and the syntax
  around tool calls in them.

  Args:
    messages: those that are rendered.
    text: the rendering.
    pieces: what they say in it; where that is not certain, it is searched for.
    cut: the trained turns.
  """
  if pieces is None:
    said = [
      pair for message in messages for pair in template_messages.said(message)
    ]
    pieces = marks.search(said, text)
  found: list[tuple[int, int, str]] = []
  syntax: list[tuple[int, int, str]] = []
  for one in cut:
    syntax.append((one.stop, one.end, "stop"))
    own = [p for p in pieces if one.start <= p.start and p.end <= one.stop]
    at, before = one.start, ""
    for piece in (*own, Piece(one.stop, one.stop, "", "")):
      if at < piece.start and "tool_call" in (before, piece.part):
        if before == "reasoning":  # First, what closes the thinking.
          at = _after_tag(text, at, piece.start)
        syntax.append((at, piece.start, "tool_call"))
      at, before = max(at, piece.end), piece.part
  at = 0
  plainly = [(piece.start, piece.end, piece.part) for piece in pieces]
  for start, end, part in sorted((*plainly, *syntax)):
    if start >= at and end > start:
      found.append((start, end, part))
      at = end
  return tuple(found)


def _after_tag(text: str, start: int, end: int) -> int:
  """The end of the tag that comes next, such as '\\n</think>\\n\\n'."""
  tag = _TAG.match(text, start, end)
  return tag.end() if tag else start


def literal(
  script: Script, text: str, pieces: Sequence[Piece] | None
) -> tuple[tuple[int, int], ...]:
  """Control tokens that what is said makes up, wholly or in part."""
  options, template = script.options, script.template
  if options.control_tokens == "allow":
    return ()
  if pieces is None:
    if script.escapes:
      raise RowError(
        script.conversation.source or "row",
        "control tokens in a rendering whose texts cannot be told from its "
        "structure",
        "a template that renders texts as they are",
        "Drop the row, or set data.control_tokens to allow.",
      )
    return ()
  found = []
  at = 0
  for token in template.control.finditer(text):
    while at < len(pieces) and pieces[at].end <= token.start():
      at += 1
    if at < len(pieces) and pieces[at].start < token.end():
      found.append(token.span())
  if found and options.control_tokens == "error":
    a, b = found[0]
    raise RowError(
      script.conversation.source or "row",
      f"the control token {text[a:b]!r}, which a text and the template make "
      "up together",
      "text without control tokens",
      "Change the text, or set data.control_tokens to escape.",
    )
  return tuple(found)


def notes(script: Script, last: Turn, cut: Sequence[Turn]) -> frozenset[str]:
  """What happened in a rendering, for the ledger."""
  happened = set()
  messages = script.conversation.messages
  if messages[0].role != "system":
    put = template_probes.injected(
      script.template, script.options.template_kwargs
    )
    if put and put in last.text:
      happened.add("injected system prompt")
  for piece in last.pieces or ():
    shown = last.text[piece.start : piece.end]
    if piece.end <= last.start and not marks.as_written(piece.said, shown):
      happened.add("text changed by the template")
  for one in cut:
    ends = [p.end for p in last.pieces or () if p.end <= one.start]
    opens = max(ends, default=one.start)
    if not messages[one.index].reasoning and _EMPTY_THOUGHT.search(
      last.text, opens, one.stop
    ):
      happened.add("empty think block")
  return frozenset(happened)
