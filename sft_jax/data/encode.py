"""Text with trained spans to Examples: token ids and their loss weights."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from sft_jax.data import conversation as conversation_lib
from sft_jax.data import seams, spans, templates
from sft_jax.data.tokenizers import Tokenizer

Conversation = conversation_lib.Conversation
NothingToTrain = conversation_lib.NothingToTrain
RowError = conversation_lib.RowError

OVER_LONG = ("drop", "error", "truncate")


@dataclasses.dataclass(frozen=True)
class Example:
  """One document to train on.

  Attributes:
    tokens: its ids.
    loss_weights: the weight of *predicting* tokens[i] from those before it;
      the first is 0, for nothing is before it.
  """

  tokens: Int32[np.ndarray, " n"]
  loss_weights: Float32[np.ndarray, " n"]


class EncodedRow(NamedTuple):
  """What became of one row: Examples, and how many of them were dropped why."""

  examples: list[Example]
  dropped: dict[str, int]


def encode(
  conversation: Conversation,
  tokenizer: Tokenizer,
  *,
  max_length: int,
  history: str = "auto",
  over_long: str = "drop",
  template_kwargs: Mapping[str, Any] | None = None,
) -> list[Example]:
  """The Examples of a conversation; see `encode_row`.

  Raises:
    NothingToTrain: none is left; its reason is the ledger's key.
  """
  row = encode_row(
    conversation,
    tokenizer,
    max_length=max_length,
    history=history,
    over_long=over_long,
    template_kwargs=template_kwargs,
  )
  if not row.examples:
    reason = next(iter(row.dropped))
    raise NothingToTrain(reason, conversation.source)
  return row.examples


def encode_row(
  conversation: Conversation,
  tokenizer: Tokenizer,
  *,
  max_length: int,
  history: str = "auto",
  over_long: str = "drop",
  template_kwargs: Mapping[str, Any] | None = None,
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
    max_length: tokens that an Example may have; at least 2.
    history: see `spans.render_spans`.
    over_long: 'drop' drops longer Examples; 'error' raises; 'truncate' cuts
      them (a cut answer has no stop token) and drops those with nothing
      trained left.
    template_kwargs: see `templates.ChatTemplate.render`.

  Returns:
    The Examples, and the number dropped by reason ('over long').

  Raises:
    RowError: see `spans.render_spans`; an Example that is too long under
      over_long='error'.
    NothingToTrain: the conversation has no trained turn.
    ValueError: an argument out of range; the tokenizer has no chat template.
  """
  if over_long not in OVER_LONG or max_length < 2:
    raise ValueError(
      f"over_long={over_long!r}, max_length={max_length}: expected over_long "
      f"one of {', '.join(OVER_LONG)} and max_length of at least 2. Correct "
      "data.over_long or data.seq_len."
    )
  if conversation.text is not None:
    return EncodedRow(_windows(conversation, tokenizer, max_length), {})
  template = chat_template(tokenizer)
  rendered = spans.render_spans(
    conversation, template, history=history, template_kwargs=template_kwargs
  )
  examples, dropped = [], 0
  for one in rendered:
    for piece in seams.encode_rendered(one, tokenizer, history, conversation):
      _check_bos(piece.ids, tokenizer, conversation)
      long = len(piece.ids) > max_length
      if long and over_long == "error":
        raise RowError(
          conversation.source or "row",
          f"{len(piece.ids)} tokens",
          f"at most {max_length}",
          "Raise data.seq_len, or set data.over_long to drop or truncate.",
        )
      cut = slice(max_length)
      if long and (over_long == "drop" or not any(piece.weights[cut])):
        dropped += 1
      else:
        examples.append(_example(piece.ids[cut], piece.weights[cut]))
  return EncodedRow(examples, {"over long": dropped} if dropped else {})


def prompt_ids(
  conversation: Conversation,
  tokenizer: Tokenizer,
  *,
  template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
  """What inference sees: the turns so far and the generation prompt, as ids.

  A raw text is BOS (where the tokenizer has one) and its ids, to go on from.

  Raises:
    RowError: the last turn is the assistant's; see `templates.render_prompt`.
  """
  if conversation.text is not None:
    return _bos(tokenizer) + tokenizer.encode(conversation.text)
  last = len(conversation.messages) - 1
  if conversation.messages[last].role == "assistant":
    raise RowError(
      conversation.where(last),
      "an assistant turn at the end of a prompt",
      "a turn to be answered",
      "Drop the turn to generate it.",
    )
  text = templates.render_prompt(
    conversation, chat_template(tokenizer), template_kwargs=template_kwargs
  )
  ids = tokenizer.encode(text)
  _check_bos(ids, tokenizer, conversation)
  return ids


@functools.lru_cache(maxsize=8)
def chat_template(tokenizer: Tokenizer) -> templates.ChatTemplate:
  """The tokenizer's chat template, ready to render.

  Every special token is a control token, except the one for unknown text,
  which is no structure.
  """
  if tokenizer.chat_template is None:
    raise ValueError(
      f"{tokenizer.folder}: got no chat template; expected one, to render "
      "conversations. Add chat_template.jinja to the folder, or train on raw "
      "text."
    )
  unknown = tokenizer.named_tokens.get("unk_token")
  return templates.ChatTemplate(
    tokenizer.chat_template,
    tokenizer.named_tokens,
    stop_tokens=[
      text
      for text, number in tokenizer.special_tokens.items()
      if number in tokenizer.stop_ids
    ],
    control_tokens=[
      text for text in tokenizer.special_tokens if text != unknown
    ],
  )


def _windows(
  conversation: Conversation, tokenizer: Tokenizer, max_length: int
) -> list[Example]:
  if tokenizer.chat_template is not None:
    chat_template(tokenizer).refuse_control_tokens(conversation)
  end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  ids = _bos(tokenizer) + tokenizer.encode(conversation.text or "") + end
  stride = max_length - 1
  windows = [ids[at : at + max_length] for at in range(0, len(ids) - 1, stride)]
  return [_example(one, [0.0] + [1.0] * (len(one) - 1)) for one in windows]


def _bos(tokenizer: Tokenizer) -> list[int]:
  return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


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


def _example(ids: list[int], weights: list[float]) -> Example:
  loss_weights = np.array(weights, np.float32)
  # Nothing is before the first token to predict it from.
  loss_weights[0] = 0
  return Example(np.array(ids, np.int32), loss_weights)
