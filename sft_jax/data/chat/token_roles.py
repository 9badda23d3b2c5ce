"""The token roles of a rendering, and what in it is masked or escaped."""

import re
from collections.abc import Iterable, Sequence

from sft_jax.data.chat import template_messages, template_probes
from sft_jax.data.chat.renderer import ConversationRenderer
from sft_jax.data.chat.template_messages import RoleSpan
from sft_jax.data.chat.trained_turn import TrainedTurn
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
_EMPTY_THINK_BLOCK = re.compile(r"<think>\s*</think>")
CHANGED = "text changed by the template"
WHITE_SPACE_CUT = "white space cut by the template"
_TAG = re.compile(r"\s*<[^<>\s]+>\s*")


def masked_spans(
  renderer: ConversationRenderer,
  one: TrainedTurn,
  spans: Sequence[RoleSpan] | None,
) -> list[tuple[int, int]]:
  """(start, end) in a trained turn that are not trained: hidden reasoning, and
  all that its own spans leave out."""
  message = renderer.conversation.messages[one.index]
  hides = (
    renderer.options.reasoning == "hide" and (message.reasoning or "").strip()
  )
  if not hides and message.spans is None:
    return []

  def uncertain(what: str) -> RowError:
    return RowError(
      renderer.conversation.where(one.index),
      f"a rendering in which {what} cannot be separated from the rest",
      "a template that renders it as it is",
      "Train the whole turn, or drop the row.",
    )

  own = [s for s in spans or () if one.start <= s.start and s.end <= one.stop]
  if message.spans is not None:
    answer = [span for span in own if span.role == "answer"]
    core = message.content.strip()
    shown = [one.text[span.start : span.end] for span in answer]
    if message.spans and shown != [core]:
      raise uncertain("the content")
    kept: list[tuple[int, int]] = []
    if message.spans:
      (span,) = answer
      moved = span.start - message.content.index(core)
      kept = [(a + moved, b + moved) for a, b in message.spans]
      # Whoever trains the last word trains to stop after it.
      if kept[-1][1] >= span.end:
        kept[-1] = (kept[-1][0], one.end)
    return _between(kept, one.start, one.end)
  thought = [span for span in own if span.role == "reasoning"]
  if len(thought) != 1:
    raise uncertain("the reasoning")
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
  turn: TrainedTurn, own: list[RoleSpan], thought: RoleSpan
) -> tuple[int, int]:
  """A turn's reasoning with the tags around it.

      <think>\\nTwos.\\n</think>\\n\\n4<|im_end|>
      ------------------------------

  It starts where the turn or the text before it ends, and ends where the
  answer starts; or, where a tool call follows, with the next tag.
  """
  at = own.index(thought)
  start = own[at - 1].end if at else turn.start
  if at + 1 < len(own) and own[at + 1].role == "answer":
    return start, own[at + 1].start
  until = own[at + 1].start if at + 1 < len(own) else turn.stop
  return start, _after_tag(turn.text, thought.end, until)


def role_spans(
  messages: Sequence[Message],
  text: str,
  spans: Sequence[RoleSpan] | None,
  cut: Sequence[TrainedTurn] = (),
) -> tuple[tuple[int, int, str], ...]:
  """(start, end, token role) of the texts, of the stop tokens of the trained
  turns, and of the syntax around tool calls in them.

  Args:
    messages: those that are rendered.
    text: the rendering.
    spans: of the messages' texts; where None, these are searched for.
    cut: the trained turns.
  """
  if spans is None:
    texts = [
      pair for message in messages for pair in template_messages.texts(message)
    ]
    spans = template_messages.search(texts, text)
  found: list[tuple[int, int, str]] = []
  syntax: list[tuple[int, int, str]] = []
  for one in cut:
    syntax.append((one.stop, one.end, "stop"))
    own = [p for p in spans if one.start <= p.start and p.end <= one.stop]
    at, before = one.start, ""
    for span in (*own, RoleSpan(one.stop, one.stop, "", "")):
      if at < span.start and "tool_call" in (before, span.role):
        if before == "reasoning":  # First, what closes the reasoning.
          at = _after_tag(text, at, span.start)
        syntax.append((at, span.start, "tool_call"))
      at, before = max(at, span.end), span.role
  at = 0
  plainly = [(span.start, span.end, span.role) for span in spans]
  for start, end, role in sorted((*plainly, *syntax)):
    if start >= at and end > start:
      found.append((start, end, role))
      at = end
  return tuple(found)


def _after_tag(text: str, start: int, end: int) -> int:
  """The end of the tag that comes next, such as '\\n</think>\\n\\n'."""
  tag = _TAG.match(text, start, end)
  return tag.end() if tag else start


def special_as_text(
  renderer: ConversationRenderer, text: str, spans: Sequence[RoleSpan] | None
) -> tuple[tuple[int, int], ...]:
  """(start, end) of control tokens that texts make up, wholly or in part."""
  options, template = renderer.options, renderer.template
  if options.control_tokens == "allow":
    return ()
  if spans is None:
    if renderer.escapes:
      raise RowError(
        renderer.conversation.source or "row",
        "control tokens in a rendering whose texts and structure cannot be "
        "separated",
        "a template that renders texts as they are",
        "Drop the row, or set data.control_tokens to allow.",
      )
    return ()
  found = []
  at = 0
  for token in template.control.finditer(text):
    while at < len(spans) and spans[at].end <= token.start():
      at += 1
    if at < len(spans) and spans[at].start < token.end():
      found.append(token.span())
  if found and options.control_tokens == "error":
    a, b = found[0]
    raise RowError(
      renderer.conversation.source or "row",
      f"the control token {text[a:b]!r}, which a text and the template make "
      "up together",
      "text without control tokens",
      "Change the text, or set data.control_tokens to escape.",
    )
  return tuple(found)


def notes(
  renderer: ConversationRenderer, last: TrainedTurn, cut: Sequence[TrainedTurn]
) -> frozenset[str]:
  """What happened in a rendering, for the ledger."""
  happened = set()
  messages = renderer.conversation.messages
  if messages[0].role != "system":
    put = template_probes.injected(
      renderer.template, renderer.options.template_kwargs
    )
    if put and put in last.text:
      happened.add("injected system prompt")
  happened |= _rewritten(renderer, last, cut)
  for one in cut:
    content = messages[one.index].content.rstrip()
    if content.endswith(renderer.template.stop_tokens):
      happened.add("stop token written in an answer")
    ends = [p.end for p in last.spans or () if p.end <= one.start]
    opens = max(ends, default=one.start)
    if not messages[one.index].reasoning and _EMPTY_THINK_BLOCK.search(
      last.text, opens, one.stop
    ):
      happened.add("empty think block")
  return frozenset(happened)


def _rewritten(
  renderer: ConversationRenderer,
  last: TrainedTurn,
  cut: Sequence[TrainedTurn],
) -> set[str]:
  """Notes on characters of the row that the rendering does not have."""
  found = set()
  texts: dict[tuple[str, str], list[str]] = {}
  for message in renderer.conversation.messages[: last.index + 1]:
    for role, text in template_messages.texts(message):
      texts.setdefault((role, text.strip()), []).append(text)
  for span in last.spans or ():
    mine = texts.get((span.role, span.written))
    text = mine.pop(0) if mine else span.written
    shown = last.text[span.start : span.end]
    if not template_messages.as_written(span.written, shown):
      found.add(CHANGED)  # Of what was asked; replies must be as written.
    if not keeps_white_space(last.text, span.start, span.end, text):
      found.add(WHITE_SPACE_CUT)
  for one in cut:
    message = renderer.conversation.messages[one.index]
    if message.think_block and message.reasoning is not None:
      before, between = message.think_block
      written = before + message.reasoning + between + message.content
      if written not in last.text[one.start : one.stop]:
        found.add(CHANGED)
  return found


def keeps_white_space(rendering: str, start: int, end: int, text: str) -> bool:
  """Whether the white space around a text stands around [start, end) too."""
  trail = text[len(text.rstrip()) :]
  lead = text[: len(text) - len(text.lstrip())]
  return rendering.endswith(lead, 0, start) and rendering.startswith(trail, end)
