"""Text with trained spans to Examples: token ids and their loss weights."""

import collections
import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from sft_jax.data.chat import loss_spans
from sft_jax.data.chat.options import DEFAULT, RenderOptions
from sft_jax.data.chat.template import chat_template
from sft_jax.data.conversation import Conversation, NothingToTrain, RowError
from sft_jax.data.encoding import boundaries, unrendered
from sft_jax.data.encoding.boundaries import PARTS as PARTS  # Of Example.parts.
from sft_jax.data.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
  """One document to train on.

  Attributes:
    tokens: its ids.
    loss_weights: the weight of *predicting* tokens[i] from those before it;
      the first is 0, for nothing is before it.
    parts: who says each token, as an index of `PARTS`; 'template' is what no
      part of the row says, or what cannot be told for certain.
  """

  tokens: Int32[np.ndarray, " n"]
  loss_weights: Float32[np.ndarray, " n"]
  parts: UInt8[np.ndarray, " n"]


class EncodedRow(NamedTuple):
  """What became of one row.

  Attributes:
    examples: what to train on.
    dropped: how many Examples were dropped, by reason.
    notes: what happened to the row, for the ledger: 'injected system prompt',
      'empty think block', 'text changed by the template', 'split history',
      'cut answer', 'escaped control token'; 1 each.
  """

  examples: list[Example]
  dropped: dict[str, int]
  notes: dict[str, int]


class Made(NamedTuple):
  """The ids of a conversation, before the length rule, and its notes."""

  tokens: list[boundaries.Tokens]
  notes: frozenset[str]


def encode(
  conversation: Conversation,
  tokenizer: Tokenizer,
  *,
  max_length: int,
  **options: Any,
) -> list[Example]:
  """The Examples of a conversation; see `encode_row`.

  Args:
    conversation: what to encode.
    tokenizer: with its chat template.
    max_length: tokens that an Example may have; at least 2.
    **options: fields of `options.RenderOptions`, such as history='split'.

  Raises:
    NothingToTrain: none is left; its reason is the ledger's key.
  """
  row = encode_row(
    conversation, tokenizer, RenderOptions(**options), max_length=max_length
  )
  if not row.examples:
    reason = next(iter(row.dropped))
    raise NothingToTrain(reason, conversation.source)
  return row.examples


def encode_row(
  conversation: Conversation,
  tokenizer: Tokenizer,
  options: RenderOptions,
  *,
  max_length: int,
  made: Made | None = None,
) -> EncodedRow:
  """Encodes a conversation by Law 1, or a raw text whole.

  A conversation is rendered by the tokenizer's chat template and encoded; the
  tokens of each trained turn, up to and including its stop token, get the
  turn's weight:

      text    <s> user: Hi \\n assistant: Hello there </s>
      ids      1   9   4    3     7         20   21    2
      weights  0   0   0    0     0          1    1    1

  The ids before a trained turn are those that `prompt_ids` gives inference.
  Where one token would join the prompt's end to the reply's start, the two
  are encoded apart, and a conversation of several such turns becomes one
  Example per trained turn (an error under history='keep').

  Raw text is BOS (where the tokenizer has one), its ids and EOS, all trained.
  Text longer than max_length is cut into windows of max_length, each starting
  with the last token of the one before, so that every token is predicted
  exactly once; `over_long` has no say in it.

  Args:
    conversation: what to encode.
    tokenizer: with its chat template.
    options: how to render it, and what of it to train.
    max_length: tokens that an Example may have; at least 2.
    made: what `shapes.encode_alike` has made of it.

  Returns:
    The Examples, and the number dropped by reason ('over long').

  Raises:
    RowError: see `spans.render_spans`; an Example that is too long under
      over_long='error'.
    NothingToTrain: the conversation has no trained turn.
    ValueError: an argument out of range; the tokenizer has no chat template.
  """
  if max_length < 2:
    raise ValueError(
      f"data.seq_len: got {max_length}; expected at least 2. Correct it."
    )
  if conversation.text is not None:
    windows = unrendered.windows(conversation, tokenizer, options, max_length)
    return EncodedRow([_example(window) for window in windows], {}, {})
  if made is None:
    made = _make(conversation, tokenizer, options)
  notes = set(made.notes)
  examples, dropped = [], collections.Counter()
  for one in made.tokens:
    _check_bos(one.ids, tokenizer, conversation)
    long = len(one.ids) > max_length
    if long and options.over_long == "error":
      raise RowError(
        conversation.source or "row",
        f"{len(one.ids)} tokens",
        f"at most {max_length}",
        "Raise data.seq_len, or set data.over_long to drop or truncate.",
      )
    if long and options.over_long == "drop":
      dropped["over long"] += 1
      continue
    cut = slice(max_length)
    example = _example(
      boundaries.Tokens(one.ids[cut], one.weights[cut], one.parts[cut])
    )
    if example.loss_weights.any():
      examples.append(example)
      notes |= {"cut answer"} if long else set()
    else:
      dropped["over long" if long else "nothing trained"] += 1
  return EncodedRow(examples, dict(dropped), dict.fromkeys(sorted(notes), 1))


def _make(
  conversation: Conversation, tokenizer: Tokenizer, options: RenderOptions
) -> Made:
  if conversation.ids:
    return Made([unrendered.given(conversation, tokenizer)], frozenset())
  rendered = loss_spans.render_spans(
    conversation, chat_template(tokenizer), options
  )
  made = [
    one
    for text in rendered
    for one in boundaries.encode_rendered(
      text, tokenizer, options, conversation
    )
  ]
  notes = set().union(*(text.notes for text in rendered))
  notes |= {"split history"} if len(made) > 1 else set()
  escaped = any(text.literal for text in rendered)
  notes |= {"escaped control token"} if escaped else set()
  return Made(made, frozenset(notes))


def prompt_ids(
  conversation: Conversation,
  tokenizer: Tokenizer,
  options: RenderOptions = DEFAULT,
) -> list[int]:
  """What inference sees: the turns so far and the generation prompt, as ids.

  A raw text is BOS (where the tokenizer has one) and its ids, to go on from.

  Raises:
    RowError: the last turn is the assistant's; see `spans.render_spans`.
  """
  if conversation.text is not None:
    return unrendered.prompt_ids(conversation, tokenizer, options)
  if conversation.ids:
    return list(conversation.ids)
  last = len(conversation.messages) - 1
  if conversation.messages[last].role == "assistant":
    raise RowError(
      conversation.where(last),
      "an assistant turn at the end of a prompt",
      "a turn to be answered",
      "Drop the turn to generate it.",
    )
  prompt = loss_spans.prompt(conversation, chat_template(tokenizer), options)
  ids, _ = tokenizer.encode_with_offsets(prompt.text, prompt.literal)
  _check_bos(ids, tokenizer, conversation)
  return ids


def _check_bos(
  ids: list[int], tokenizer: Tokenizer, conversation: Conversation
) -> None:
  bos = tokenizer.bos_id
  if bos is not None and ids[:2] == [bos, bos]:
    raise RowError(
      conversation.source or "row",
      f"two BOS tokens (id {bos}) at the start",
      "one",
      "Mend the chat template: it writes BOS twice.",
    )


def _example(tokens: boundaries.Tokens) -> Example:
  loss_weights = tokens.weights.astype(np.float32)
  # Nothing is before the first token to predict it from.
  loss_weights[0] = 0
  return Example(np.array(tokens.ids, np.int32), loss_weights, tokens.parts)
