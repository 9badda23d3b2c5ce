"""Text with trained spans: what inference will see, and must emit (Law 1)."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Sequence

from sft_jax.data.chat import (
  template_messages,
  template_probes,
  token_roles,
)
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

# (index of a message, token role, text without white space around it).
_Text = tuple[int, str, str]


@dataclasses.dataclass(frozen=True)
class Rendered:
  """Text and what of it is trained.

  Attributes:
    text: the rendering.
    spans: (start, end, weight) in characters, in order: each from the end of
      a generation prompt to the end of the stop token of that turn. With
      train_on='all' there are none, and all of the text is trained.
    role_spans: (start, end, token role) in order and apart; the rest is the
      template's.
    masked: (start, end) within spans that is not trained: hidden reasoning,
      and what a message's own spans leave out.
    special_as_text: (start, end) of control tokens that are ordinary text.
    notes: what happened in the rendering, for the ledger.
  """

  text: str
  spans: tuple[tuple[int, int, float], ...]
  role_spans: tuple[tuple[int, int, str], ...] = ()
  masked: tuple[tuple[int, int], ...] = ()
  special_as_text: tuple[tuple[int, int], ...] = ()
  notes: frozenset[str] = frozenset()


def render_spans(
  conversation: Conversation,
  template: ChatTemplate,
  options: RenderOptions,
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
  template rewrites earlier turns, there is one rendering per trained turn
  (`TrainedTurn`).

  Args:
    conversation: at least one assistant turn with a weight above 0.
    template: the model's own.
    options: see `RenderOptions`; templates that drop earlier reasoning need
      history='auto' or 'split'.

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
  if options.history != "split":
    rewritten = [
      one for one in cut if not last.text.startswith(one.text[: one.end])
    ]
    if not rewritten:
      return [_rendered(renderer, last, cut)]
    if options.history == "keep":
      one = rewritten[0]
      raise RowError(
        conversation.where(one.index),
        "a turn that later turns make the template rewrite: "
        + divergence(one.text, last.text),
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
  count = len(messages)
  if messages[-1].role == "assistant":  # To be continued.
    turn = renderer.turns(count)
    spans = renderer.spans(count, turn) or []
    before, content = renderer.prompt(count - 1), messages[-1].content
    own = [
      span
      for span in spans
      if span.start >= len(before) and span.written == content.strip()
    ]
    if not (own and turn.startswith(before)):
      raise RowError(
        conversation.where(count - 1),
        "an assistant turn at the end of a prompt that cannot be continued",
        "an answer that the template renders after its generation prompt",
        "Drop the turn to generate it.",
      )
    text = turn[: own[-1].end]
    trail = content[len(content.rstrip()) :]
    text += trail if turn.startswith(trail, len(text)) else ""
    escaped = token_roles.special_as_text(renderer, text, spans)
    return Rendered(text, (), special_as_text=escaped)
  text = renderer.prompt(count)
  if options.control_tokens == "allow":
    return Rendered(text, ())
  escaped = token_roles.special_as_text(
    renderer, text, renderer.prompt_spans(count, text)
  )
  return Rendered(text, (), special_as_text=escaped)


def rendered_text(
  conversation: Conversation, template: ChatTemplate, options: RenderOptions
) -> Rendered:
  """A text that holds a conversation rendered elsewhere, as if by us.

  The assistant's turns begin after what opens them in the model's template,
  and end with the next stop token. The text gets the BOS that the template
  writes, unless it has one, and ends with its last stop token.

  Raises:
    RowError: no turn of the assistant's, or one without a stop token.
  """
  text = conversation.text or ""
  opening = template_probes.opening(template, options.template_kwargs)
  bos = template.special_tokens.get("bos_token") or ""
  if template.writes_bos and not text.startswith(bos):
    text = bos + text
  turn = f"{re.escape(opening)}(.*?)({template.stop.pattern})"
  turns = list(re.finditer(turn, text, re.DOTALL)) if opening else []
  end = turns[-1].end() if turns else 0
  if not turns or opening in text[end:]:
    cut = opening and opening in text[end:]
    raise RowError(
      conversation.source or "row",
      "a reply without a stop token" if cut else f"a text without {opening!r}",
      "a conversation as the model's chat template renders it",
      "Complete the row, or set data.text to plain, or give it as messages.",
    )
  roles = [
    (*turn.span(group), role)
    for turn in turns
    for group, role in ((1, "answer"), (2, "stop"))
    if turn[group]
  ]
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
    raise RowError(
      f"{conversation.source or 'row'} text",
      f"a rendered conversation ({opening!r} and a stop token)",
      "raw text, or messages",
      "Give the row as messages, or set data.text to rendered.",
    )


def _trained_turns(
  renderer: ConversationRenderer, options: RenderOptions
) -> list[int]:
  messages = renderer.conversation.messages
  found = [i for i, message in enumerate(messages) if message.loss_weight > 0]
  if not found:
    roles = {message.role for message in messages}
    raise NothingToTrain(
      "no trained turn" if "assistant" in roles else "no assistant turn",
      renderer.conversation.source,
    )
  if options.train_on == "last_turn":
    found = found[-1:]
  found = [
    index
    for index in found
    if messages[index].content
    or messages[index].reasoning
    or messages[index].tool_calls
    or renderer.reasoning[index]  # Without it, nothing may be left.
  ]
  if not found:
    raise NothingToTrain("only reasoning", renderer.conversation.source)
  return found


def _rendered(
  renderer: ConversationRenderer, last: TrainedTurn, cut: Sequence[TrainedTurn]
) -> Rendered:
  """The text of `last`, with `cut` as its spans."""
  messages = renderer.conversation.messages
  _refuse_dropped_content(renderer, last, cut)
  masked = [token_roles.masked_spans(renderer, one, last.spans) for one in cut]
  return Rendered(
    last.text,
    tuple((one.start, one.end, messages[one.index].loss_weight) for one in cut),
    token_roles.role_spans(
      messages[: last.index + 1], last.text, last.spans, cut
    ),
    tuple(itertools.chain.from_iterable(masked)),
    token_roles.special_as_text(renderer, last.text, last.spans),
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
  return Rendered(
    text,
    (),
    token_roles.role_spans(messages, text, spans),
    special_as_text=token_roles.special_as_text(renderer, text, spans),
  )


def _refuse_dropped_content(
  renderer: ConversationRenderer, last: TrainedTurn, cut: Sequence[TrainedTurn]
) -> None:
  """Raises where the template drops or changes what a turn holds.

  A trained turn must be there as it is, but for white space around it and
  the escapes of JSON. Of what was asked, a template may make what it likes,
  for inference sees the same; but it must be there. Earlier replies and the
  answers of tools may be gone.
  """
  messages = renderer.conversation.messages
  asked = [
    text
    for index, message in enumerate(messages[: last.index])
    if message.role in ("system", "user")
    for text in _texts(messages, index)
  ]
  missing = _missing(asked, last, 0, last.start, True)
  for one in cut:
    missing = missing or _missing(
      _texts(messages, one.index), last, one.start, one.stop, False
    )
  if missing is not None:
    index, role, text = missing
    cure = "Use a template that renders it, or drop it from the row."
    if role == "reasoning":
      writes = renderer.options.reasoning == "write"
      ways = "strip" if writes else "strip or write"
      cure = f"Set data.reasoning to {ways}, or use a template that renders it."
    raise RowError(
      renderer.conversation.where(index),
      f"a template that leaves out or changes {text[:60]!r}",
      "all that a turn says in the rendered text",
      cure,
    )


def _texts(messages: Sequence[Message], index: int) -> list[_Text]:
  """The texts of a message."""
  texts = template_messages.texts(messages[index])
  return [(index, role, text.strip()) for role, text in texts if text.strip()]


def _missing(
  texts: Sequence[_Text], last: TrainedTurn, start: int, end: int, changed: bool
) -> _Text | None:
  """The first text that [start, end) of a rendering does not hold, or holds
  less often; where `changed`, it may be there in other words."""
  if last.spans is None:
    shown = last.text[start:end]
    return next((one for one in texts if not _stands_in(one[2], shown)), None)
  there = collections.Counter(
    (span.role, span.written)
    for span in last.spans
    if start <= span.start and span.end <= end
    if changed
    or template_messages.as_written(
      span.written, last.text[span.start : span.end]
    )
  )
  for one in texts:
    there[one[1:]] -= 1
    if there[one[1:]] < 0:
      return one
  return None


def _stands_in(text: str, shown: str) -> bool:
  """Whether a text stands in another, as it is or as in JSON."""
  return (
    text in shown
    or template_messages.in_json(text) in shown
    or template_messages.in_json(text, ascii_only=True) in shown
  )
