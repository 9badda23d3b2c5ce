"""Rows without turns to render: raw text, and ids made elsewhere."""

import numpy as np

from sft_jax.data.chat import renderer
from sft_jax.data.chat import template as templates
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.conversation import Conversation, NothingToTrain, RowError
from sft_jax.data.encoding.boundaries import PARTS, Tokens
from sft_jax.data.tokenizers.tokenizer import Tokenizer


def windows(
  conversation: Conversation,
  tokenizer: Tokenizer,
  options: RenderOptions,
  max_length: int,
) -> list[Tokens]:
  """A raw text and its EOS, all trained, in windows of `max_length`.

  Each starts with the last token of the one before, so that every token is
  predicted exactly once. With max_length 4:

      <s> a b c
              c d e f
                    f </s>

  Raises:
    RowError: a control token in the text; half of a character.
  """
  start = prompt_ids(conversation, tokenizer, options)
  end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  ids = start + end
  parts = np.full(len(ids), PARTS.index("text"), np.uint8)
  parts[: len(_bos(tokenizer))] = PARTS.index("template")
  parts[len(start) :] = PARTS.index("stop")
  weights = np.ones(len(ids), np.float32)
  cuts = [
    slice(at, at + max_length) for at in range(0, len(ids) - 1, max_length - 1)
  ]
  return [Tokens(ids[cut], weights[cut], parts[cut]) for cut in cuts]


def prompt_ids(
  conversation: Conversation, tokenizer: Tokenizer, options: RenderOptions
) -> list[int]:
  """BOS, where the tokenizer has one, and a raw text: a text to go on from."""
  return _bos(tokenizer) + _text_ids(conversation, tokenizer, options)


def given(conversation: Conversation, tokenizer: Tokenizer) -> Tokens:
  """A row tokenised elsewhere, as it is.

  Raises:
    RowError: an id that the tokenizer does not have, a weight below 0.
    NothingToTrain: no weight above 0.
  """
  ids, size = list(conversation.ids), tokenizer.vocab_size
  strange = next((one for one in ids if not 0 <= one < size), None)
  if strange is not None:
    raise RowError(
      conversation.source or "row",
      f"the id {strange}",
      f"ids from 0 to {size - 1}, those of {tokenizer.folder}",
      "Tokenise the row with this model's tokenizer.",
    )
  weights = np.array(conversation.id_weights, np.float32)
  if not np.isfinite(weights).all() or (weights < 0).any():
    raise RowError(
      conversation.source or "row",
      "a weight that is negative or not finite",
      "weights of at least 0",
      "Correct the row's weights.",
    )
  if not weights[1:].any():
    raise NothingToTrain("no trained token", conversation.source)
  parts = np.full(len(ids), PARTS.index("text"), np.uint8)
  return Tokens(ids, weights, parts)


def _bos(tokenizer: Tokenizer) -> list[int]:
  return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _text_ids(
  conversation: Conversation, tokenizer: Tokenizer, options: RenderOptions
) -> list[int]:
  """The ids of a raw text, by the options for control tokens."""
  text = conversation.text or ""
  renderer.refuse_surrogates(text, conversation)
  # Raw text needs no template, only to know what the control tokens are.
  template = templates.with_tokens(tokenizer, tokenizer.chat_template or "")
  literal = ((0, len(text)),)
  escapes = renderer.refuse_control_tokens(conversation, template, options)
  return tokenizer.encode_with_offsets(text, literal if escapes else ())[0]
