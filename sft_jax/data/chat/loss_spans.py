"""Text with trained spans: what inference will see, and must emit (Law 1)."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Sequence

from sft_jax.data.chat import template_messages, template_probes, token_roles
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.chat.renderer import ConversationRenderer
from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.chat.trained_turn import TrainedTurn, divergence
from sft_jax.data.conversation import (
  Conversation,
  Message,
  NothingToTrain,
  RowError,
)


@dataclasses.dataclass(frozen=True)
class Rendered:
  """Text and what of it is trained."""

  text: str
  # (start, end, weight) in characters, in order: each from the end of a
  # generation prompt to the end of that turn's stop token. None where
  # train_on='all' trains all of the text.
  spans: tuple[tuple[int, int, float], ...]
  # (start, end, token role) in order and apart; the rest is the template's.
  role_spans: tuple[tuple[int, int, str], ...] = ()
  # (start, end) within spans that is not trained: hidden reasoning, and what a
  # message's own spans leave out.
  masked: tuple[tuple[int, int], ...] = ()
  # (start, end) of control tokens that are ordinary text.
  special_as_text: tuple[tuple[int, int], ...] = ()
  # For the ledger.
  notes: frozenset[str] = frozenset()


def render_spans(
  conversation: Conversation, template: ChatTemplate, options: RenderOptions
) -> list[Rendered]:
  """Renders a conversation for training and marks what is trained (Law 1).

  Trained turn i is rendered twice: `prompt`, the turns before it with the
  generation prompt, as inference sees them; and `full`, the turns up to and
  including it. `full` must begin with `prompt`; the trained span is what it
  adds, up to and including the stop token. With a ChatML template

      [user 'Hi', assistant 'Hello.', user 'Bye', assistant 'Goodbye.']

      <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎
      Hello.<|im_end|>                                          trained
      ⏎<|im_start|>user⏎Bye<|im_end|>⏎<|im_start|>assistant⏎
      Goodbye.<|im_end|>                                        trained
      ⏎

  Turns after the last trained one are left out: they teach nothing. Where the
  template rewrites earlier turns, or drops their reasoning, there is one
  rendering per trained turn (`TrainedTurn`).

  Raises:
    RowError: the template refuses the row, leaves out or changes what a turn
      says, or does not begin with its own generation prompt; a message holds
      a control token; a reply has no stop token; 'keep' would be wrong; what
      the options need to know of the rendering is not certain.
    NothingToTrain: no assistant turn, or none with a weight above 0.
  """
  renderer = ConversationRenderer(conversation, template, options)
  if options.train_on == "all":
    return [_whole(renderer)]
  trained = _trained_turns(renderer, options)
  renderer.plan(trained)
  cut = [TrainedTurn(renderer, index) for index in trained]
  last = cut[-1]
  kept = lambda one: last.text.startswith(one.text[: one.end])
  rewritten = next(itertools.filterfalse(kept, cut), None)
  if options.history != "split" and rewritten is None:
    return [_rendered(renderer, last, cut)]
  if options.history == "keep" and rewritten:
    raise RowError(
      conversation.where(rewritten.index),
      "a turn that later turns make the template rewrite: "
      + divergence(rewritten.text, last.text),
      "a template that leaves earlier turns as they are (history='keep')",
      "Set data.history to auto or split.",
    )
  return [_rendered(renderer, one, [one]) for one in cut]


def prompt(
  conversation: Conversation, template: ChatTemplate, options: RenderOptions
) -> Rendered:
  """The conversation so far and the generation prompt: what inference sees."""
  renderer = ConversationRenderer(conversation, template, options)
  messages = renderer.conversation.messages
  count, content = len(messages), messages[-1].content
  if messages[-1].role != "assistant":
    text, spans = renderer.prompt(count), None
    if options.control_tokens != "allow":
      spans = renderer.prompt_spans(count, text)
  else:  # To be continued.
    turn, before = renderer.turns(count), renderer.prompt(count - 1)
    spans = renderer.spans(count, turn) or []
    own = [p for p in spans if p.start >= len(before)]
    own = [p for p in own if p.written == content.strip()]
    if not (own and turn.startswith(before)):
      raise RowError(
        conversation.where(count - 1),
        "an assistant turn at the end of a prompt that cannot be continued",
        "an answer that the template renders after its generation prompt",
        "Drop the turn to generate it.",
      )
    text, trail = turn[: own[-1].end], content[len(content.rstrip()) :]
    text += trail if turn.startswith(trail, len(text)) else ""
  escaped = token_roles.special_as_text(renderer, text, spans)
  return Rendered(text, (), special_as_text=escaped)


def rendered_text(
  conversation: Conversation, template: ChatTemplate, options: RenderOptions
) -> Rendered:
  """A text that holds a conversation rendered elsewhere, as if by us.

  The assistant's turns begin after what opens them in the model's template, and
  end with the next stop token. The text gets the template's BOS, unless it has
  one, and ends with its last stop token.

  Raises RowError: no turn of the assistant's, or one without a stop token.
  """
  text = conversation.text or ""
  opening = template_probes.opening(template, options.template_kwargs)
  bos = template.special_tokens.get("bos_token") or ""
  if template.writes_bos and not text.startswith(bos):
    text = bos + text
  turn = f"{re.escape(opening)}(.*?)({template.stop.pattern})"
  turns = list(re.finditer(turn, text, re.DOTALL)) if opening else []
  end = turns[-1].end() if turns else 0
  cut = bool(opening) and opening in text[end:]
  if cut or not turns:
    raise RowError(
      conversation.place,
      "a reply without a stop token" if cut else f"a text without {opening!r}",
      "a conversation as the model's chat template renders it",
      "Complete the row, or set data.text to plain, or give it as messages.",
    )
  kinds = ((1, "answer"), (2, "stop"))
  roles = [(*t.span(k), role) for t in turns for k, role in kinds if t[k]]
  spans = [(turn.start(1), turn.end(), 1.0) for turn in turns]
  return Rendered(text[:end], tuple(spans), tuple(roles))


def refuse_rendered(
  conversation: Conversation, template: ChatTemplate, options: RenderOptions
) -> None:
  """Raises where a raw text is a rendered conversation: what it says of turns
  would be read as words, or get a second BOS and stop."""
  text = conversation.text or ""
  opening = template_probes.opening(template, options.template_kwargs).strip()
  if opening and opening in text and template.stop.search(text):
    got = f"a rendered conversation ({opening!r} and a stop token)"
    cure = "Give the row as messages, or set data.text to rendered."
    where = f"{conversation.place} text"
    raise RowError(where, got, "raw text, or messages", cure)


def _trained_turns(
  renderer: ConversationRenderer, options: RenderOptions
) -> list[int]:
  messages = renderer.conversation.messages
  found = [i for i, one in enumerate(messages) if one.loss_weight > 0]
  if not found:
    roles = {message.role for message in messages}
    raise NothingToTrain(
      "no trained turn" if "assistant" in roles else "no assistant turn",
      renderer.conversation.source,
    )
  if options.train_on == "last_turn":
    found = found[-1:]
  # Without its reasoning, nothing may be left of a turn.
  says = lambda one: one.content or one.reasoning or one.tool_calls
  found = [i for i in found if says(messages[i]) or renderer.reasoning[i]]
  if not found:
    raise NothingToTrain("only reasoning", renderer.conversation.source)
  return found


def _rendered(
  renderer: ConversationRenderer, last: TrainedTurn, cut: Sequence[TrainedTurn]
) -> Rendered:
  """The text of `last`, with `cut` as its spans."""
  messages, spans = renderer.conversation.messages, last.spans
  _refuse_dropped_content(renderer, last, cut)
  masked = [token_roles.masked_spans(renderer, one, spans) for one in cut]
  shown = messages[: last.index + 1]
  return Rendered(
    last.text,
    tuple((one.start, one.end, messages[one.index].loss_weight) for one in cut),
    token_roles.role_spans(shown, last.text, spans, cut),
    tuple(itertools.chain.from_iterable(masked)),
    token_roles.special_as_text(renderer, last.text, spans),
    token_roles.notes(renderer, last, cut),
  )


def _whole(renderer: ConversationRenderer) -> Rendered:
  """All of the conversation as plain text, for train_on='all'."""
  messages = renderer.conversation.messages
  for index, message in enumerate(messages):
    default = 1.0 if message.role == "assistant" else 0.0
    if message.spans is not None or message.loss_weight != default:
      raise RowError(
        renderer.conversation.where(index),
        "a weight or spans of its own",
        "none, as train_on='all' trains all of the text alike",
        "Set data.train_on to assistant, or drop the weight.",
      )
  text = renderer.turns(len(messages))
  spans = renderer.spans(len(messages), text)
  roles = token_roles.role_spans(messages, text, spans)
  escaped = token_roles.special_as_text(renderer, text, spans)
  return Rendered(text, (), roles, special_as_text=escaped)


def _refuse_dropped_content(
  renderer: ConversationRenderer, last: TrainedTurn, cut: Sequence[TrainedTurn]
) -> None:
  """Raises where the template drops or changes what a turn holds.

  A trained turn must be there but for white space around it and the escapes of
  JSON. What was asked must be there as the template likes it, for inference
  sees the same. Earlier replies and the answers of tools may be gone.
  """
  messages = renderer.conversation.messages
  asked = [
    i
    for i, one in enumerate(messages[: last.index])
    if one.role in ("system", "user")
  ]
  missing = _missing(messages, asked, last, 0, last.start)
  for one in cut:
    own = one.start, one.stop
    missing = missing or _missing(messages, [one.index], last, *own)
  if missing is not None:
    index, role, text = missing
    cure = "Use a template that renders it, or drop it from the row."
    if role == "reasoning":
      writes = renderer.options.reasoning == "write"
      ways = "strip" if writes else "strip or write"
      cure = f"Set data.reasoning to {ways}, or use a template that renders it."
    got = f"a template that leaves out or changes {text[:60]!r}"
    expected = "all that a turn says in the rendered text"
    raise RowError(renderer.conversation.where(index), got, expected, cure)


def _missing(
  messages: Sequence[Message],
  indices: Sequence[int],
  last: TrainedTurn,
  start: int,
  end: int,
) -> tuple[int, str, str] | None:
  """(index, token role, text) of the first text of some messages that [start,
  end) of a rendering does not hold, or less often. In a reply it must be there
  as written; what was asked may be there in other words."""
  texts = [
    (index, role, text.strip())
    for index in indices
    for role, text in template_messages.texts(messages[index])
    if text.strip()
  ]
  shown, as_written = last.text[start:end], template_messages.as_written
  if last.spans is None:
    absent = lambda one: not template_messages.stands_in(one[2], shown)
    return next(filter(absent, texts), None)
  there = collections.Counter(
    (span.role, span.written)
    for span in last.spans
    if start <= span.start and span.end <= end
    if not start  # What was asked: a reply never starts at 0.
    or as_written(span.written, last.text[span.start : span.end])
  )
  for one in texts:
    there[one[1:]] -= 1
    if there[one[1:]] < 0:
      return one
  return None
