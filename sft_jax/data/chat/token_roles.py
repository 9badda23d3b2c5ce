"""The token roles of a rendering, and what in it is masked or escaped."""

import re
from collections.abc import Sequence

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
  hides = renderer.options.reasoning == "hide"
  hides = hides and (message.reasoning or "").strip()
  if not hides and message.spans is None:
    return []

  def uncertain(what: str) -> RowError:
    where = renderer.conversation.where(one.index)
    got = f"a rendering in which {what} cannot be separated from the rest"
    cure = "Train the whole turn, or drop the row."
    return RowError(where, got, "a template that renders it as it is", cure)

  own = [span for span in spans or () if span.within(one.start, one.stop)]
  if message.spans is not None:
    answer = [span for span in own if span.role == "answer"]
    core = message.content.strip()
    shown = [one.text[span.start : span.end] for span in answer]
    if message.spans and shown != [core]:
      raise uncertain("the content")
    masked, at = [], one.start
    for a, b in message.spans:
      (span,) = answer
      moved = span.start - message.content.index(core)
      if at < a + moved:
        masked.append((at, a + moved))
      # Whoever trains the last word trains to stop after it.
      at = b + moved if b + moved < span.end else one.end
    return masked if at == one.end else [*masked, (at, one.end)]
  thought = [span for span in own if span.role == "reasoning"]
  if len(thought) != 1:
    raise uncertain("the reasoning")
  return [_think_block(one, own, thought[0])]


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
  after = next(iter(own[at + 1 :]), RoleSpan(turn.stop, turn.stop, "", ""))
  if after.role == "answer":
    return start, after.start
  return start, _after_tag(turn.text, thought.end, after.start)


def role_spans(
  messages: Sequence[Message],
  text: str,
  spans: Sequence[RoleSpan] | None,
  cut: Sequence[TrainedTurn] = (),
) -> tuple[tuple[int, int, str], ...]:
  """(start, end, token role) of the texts, of the stop tokens of the trained
  turns, and of the syntax around tool calls in them.

  `spans` are those of the texts of `messages` in the rendering `text`; None
  searches for them. `cut` are the trained turns.
  """
  if spans is None:
    texts = [p for one in messages for p in template_messages.texts(one)]
    spans = template_messages.search(texts, text)
  found: list[tuple[int, int, str]] = []
  syntax: list[tuple[int, int, str]] = []
  for one in cut:
    syntax.append((one.stop, one.end, "stop"))
    own = [span for span in spans if span.within(one.start, one.stop)]
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
  where, choice = renderer.conversation.place, renderer.options.control_tokens
  if choice == "allow":
    return ()
  if spans is None:
    if renderer.escapes:
      raise RowError(
        where,
        "control tokens in a rendering whose texts cannot be told apart",
        "a template that renders texts as they are",
        "Drop the row, or set data.control_tokens to allow.",
      )
    return ()
  found, at = [], 0
  for token in renderer.template.control.finditer(text):
    while at < len(spans) and spans[at].end <= token.start():
      at += 1
    if at < len(spans) and spans[at].start < token.end():
      found.append(token.span())
  if found and choice == "error":
    token = text[slice(*found[0])]
    got = f"the control token {token!r}, made up by a text and the template"
    cure = "Change the text, or set data.control_tokens to escape."
    raise RowError(where, got, "text without control tokens", cure)
  return tuple(found)


def notes(
  renderer: ConversationRenderer, last: TrainedTurn, cut: Sequence[TrainedTurn]
) -> frozenset[str]:
  """What happened in a rendering, for the ledger; what it lacks is among it."""
  found, messages = set(), renderer.conversation.messages
  if messages[0].role != "system":
    kwargs = renderer.options.template_kwargs
    put = template_probes.injected(renderer.template, kwargs)
    if put and put in last.text:
      found.add("injected system prompt")
  texts: dict[tuple[str, str], list[str]] = {}
  for message in messages[: last.index + 1]:
    for role, text in template_messages.texts(message):
      texts.setdefault((role, text.strip()), []).append(text)
  spans = last.spans or ()
  for span in spans:
    mine = texts.get((span.role, span.written))
    text = mine.pop(0) if mine else span.written
    shown = last.text[span.start : span.end]
    if not template_messages.as_written(span.written, shown):
      found.add(CHANGED)  # Of what was asked; replies must be as written.
    if not keeps_white_space(last.text, span.start, span.end, text):
      found.add(WHITE_SPACE_CUT)
  for one in cut:
    message = messages[one.index]
    if message.think_block and message.reasoning is not None:
      before, between = message.think_block
      written = before + message.reasoning + between + message.content
      if written not in last.text[one.start : one.stop]:
        found.add(CHANGED)
    if message.content.rstrip().endswith(renderer.template.stop_tokens):
      found.add("stop token written in an answer")
    ends = (span.end for span in spans if span.end <= one.start)
    opens = max(ends, default=one.start)
    empty = _EMPTY_THINK_BLOCK.search(last.text, opens, one.stop)
    if empty and not message.reasoning:
      found.add("empty think block")
  return frozenset(found)


def keeps_white_space(rendering: str, start: int, end: int, text: str) -> bool:
  """Whether the white space around a text stands around [start, end) too."""
  trail = text[len(text.rstrip()) :]
  lead = text[: len(text) - len(text.lstrip())]
  return rendering.endswith(lead, 0, start) and rendering.startswith(trail, end)
