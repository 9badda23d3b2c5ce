"""Text with trained spans: what inference will see, and must emit (Law 1)."""

import dataclasses
import itertools
from collections.abc import Sequence

from sft_jax.data.chat import token_roles, trained_turn, unsaid
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.chat.renderer import Script
from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.conversation import Conversation, NothingToTrain, RowError


@dataclasses.dataclass(frozen=True)
class Rendered:
  """Text and what of it is trained.

  Attributes:
    text: the rendering.
    spans: (start, end, weight) in characters, in order: each from the end of
      a generation prompt to the end of the stop token of that turn. With
      train_on='all' there are none, and all of the text is trained.
    pieces: (start, end, part) in order and apart: who says what; the rest is
      the template's.
    muted: (start, end) of what in a span is not trained all the same: hidden
      thinking, and what a message's own spans leave out.
    literal: (start, end) of control tokens that are ordinary text.
    notes: what happened in the rendering, for the ledger.
  """

  text: str
  spans: tuple[tuple[int, int, float], ...]
  pieces: tuple[tuple[int, int, str], ...] = ()
  muted: tuple[tuple[int, int], ...] = ()
  literal: tuple[tuple[int, int], ...] = ()
  notes: frozenset[str] = frozenset()


def render_spans(
  conversation: Conversation,
  template: ChatTemplate,
  options: RenderOptions,
) -> list[Rendered]:
  """Renders a conversation for training and marks what is trained (Law 1).

  Trained turn i is rendered twice: `prompt`, the turns before it with the
  generation prompt, as inference sees them; and `full`, the turns up to and
  including it. `full` must go on from `prompt`; the trained span is what it
  adds, up to and including the stop token. With a ChatML template

      [user 'Hi', assistant 'Hello.', user 'Bye', assistant 'Goodbye.']

      <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎
      Hello.<|im_end|>                                          trained
      ⏎<|im_start|>user⏎Bye<|im_end|>⏎<|im_start|>assistant⏎
      Goodbye.<|im_end|>                                        trained
      ⏎

  Turns after the last trained one are left out: they teach nothing. Where the
  template rewrites earlier turns, there is one rendering per trained turn
  (`turns.Turn` tells how it is cut).

  Args:
    conversation: at least one assistant turn with a weight above 0.
    template: the model's own.
    options: see `RenderOptions`; templates that drop earlier thinking need
      history='auto' or 'split'.

  Raises:
    RowError: the template refuses the row, leaves out or changes what a turn
      says, or does not go on from its own generation prompt; a message holds
      a control token; a reply has no stop token; 'keep' would be wrong; what
      the options need to know of the rendering is not certain.
    NothingToTrain: no assistant turn, or none with a weight above 0.
  """
  script = Script(conversation, template, options)
  if options.train_on == "all":
    return [_whole(script)]
  trained = _trained_turns(script, options)
  cut = [trained_turn.Turn(script, index) for index in trained]
  last = cut[-1]
  if options.history != "split":
    rewritten = [
      one for one in cut if not last.text.startswith(one.text[: one.end])
    ]
    if not rewritten:
      return [_rendered(script, last, cut)]
    if options.history == "keep":
      one = rewritten[0]
      raise RowError(
        conversation.where(one.index),
        "a turn that later turns make the template rewrite: "
        + trained_turn.divergence(one.text, last.text),
        "a template that leaves earlier turns as they are (history='keep')",
        "Set data.history to auto or split.",
      )
  return [_rendered(script, one, [one]) for one in cut]


def prompt(
  conversation: Conversation, template: ChatTemplate, options: RenderOptions
) -> Rendered:
  """The conversation so far and the generation prompt: what inference sees."""
  script = Script(conversation, template, options)
  count = len(script.conversation.messages)
  text = script.prompt(count)
  if options.control_tokens == "allow":
    return Rendered(text, ())
  literal = token_roles.literal(script, text, script.prompt_pieces(count, text))
  return Rendered(text, (), literal=literal)


def _trained_turns(script: Script, options: RenderOptions) -> list[int]:
  messages = script.conversation.messages
  found = [i for i, message in enumerate(messages) if message.loss_weight > 0]
  if not found:
    roles = {message.role for message in messages}
    raise NothingToTrain(
      "no trained turn" if "assistant" in roles else "no assistant turn",
      script.conversation.source,
    )
  if options.train_on == "last_turn":
    found = found[-1:]
  # Without its thinking a turn may have nothing left to say.
  says = lambda index: (
    messages[index].content
    or messages[index].reasoning
    or messages[index].tool_calls
    or script.thoughts[index]
  )
  found = [index for index in found if says(index)]
  if not found:
    raise NothingToTrain("only thinking", script.conversation.source)
  return found


def _rendered(
  script: Script, last: trained_turn.Turn, cut: Sequence[trained_turn.Turn]
) -> Rendered:
  """The text of `last`, with `cut` as its spans."""
  messages = script.conversation.messages
  unsaid.refuse_unsaid(script, last, cut)
  muted = [token_roles.muted(script, one, last.pieces) for one in cut]
  return Rendered(
    last.text,
    tuple((one.start, one.end, messages[one.index].loss_weight) for one in cut),
    token_roles.parts(messages[: last.index + 1], last.text, last.pieces, cut),
    tuple(itertools.chain.from_iterable(muted)),
    token_roles.literal(script, last.text, last.pieces),
    token_roles.notes(script, last, cut),
  )


def _whole(script: Script) -> Rendered:
  """All of the conversation as plain text, for train_on='all'."""
  messages = script.conversation.messages
  for index, message in enumerate(messages):
    default = 1.0 if message.role == "assistant" else 0.0
    if message.spans is not None or message.loss_weight != default:
      raise RowError(
        script.conversation.where(index),
        "a weight or spans of its own",
        "none, as train_on='all' trains all of the text alike",
        "Set data.train_on to assistant, or drop the weight.",
      )
  text = script.turns(len(messages))
  pieces = script.pieces(len(messages), text)
  return Rendered(
    text,
    (),
    token_roles.parts(messages, text, pieces),
    literal=token_roles.literal(script, text, pieces),
  )
