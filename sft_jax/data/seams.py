"""Text with trained spans to ids whose prompts are those of inference."""

from typing import NamedTuple

from sft_jax.data import conversation as conversation_lib
from sft_jax.data.spans import Rendered
from sft_jax.data.tokenizers import Tokenizer

Conversation = conversation_lib.Conversation
RowError = conversation_lib.RowError

# What may stand before a reply encoded by itself; see `_continuation`.
_ANCHORS = ("", "\n", ".", "a", "|")


class Piece(NamedTuple):
  """Ids and their weights, before the length policy."""

  ids: list[int]
  weights: list[float]


def encode_rendered(
  rendered: Rendered,
  tokenizer: Tokenizer,
  history: str,
  conversation: Conversation,
) -> list[Piece]:
  """One piece, or one per span where spans cannot share their ids."""
  text, spans = rendered.text, rendered.spans
  ids, offsets = tokenizer.encode_with_offsets(text)
  prompts = [tokenizer.encode(text[:start]) for start, _, _ in spans]
  if all(ids[: len(prompt)] == prompt for prompt in prompts):
    weights = [0.0] * len(ids)
    for prompt, (_, end, weight) in zip(prompts, spans, strict=True):
      start = len(prompt)
      stop = _stop_index(ids, offsets, start, end, tokenizer, conversation)
      weights[start : stop + 1] = [weight] * (stop + 1 - start)
    return [Piece(ids, weights)]
  if len(spans) > 1 and history == "keep":
    raise RowError(
      conversation.source or "row",
      "a token that joins a prompt to its reply",
      "replies that begin with a token of their own (history='keep')",
      "Set data.history to auto or split.",
    )
  pieces = []
  for prompt, (start, end, weight) in zip(prompts, spans, strict=True):
    reply, offsets = _continuation(
      prompt, text[start:end], text[:end], tokenizer, conversation
    )
    _stop_index(reply, offsets, 0, end - start, tokenizer, conversation)
    weights = [0.0] * len(prompt) + [weight] * len(reply)
    pieces.append(Piece(prompt + reply, weights))
  return pieces


def _continuation(
  prompt: list[int],
  reply: str,
  whole: str,
  tokenizer: Tokenizer,
  conversation: Conversation,
) -> tuple[list[int], list[tuple[int, int]]]:
  """Ids of a reply as they follow ids of a prompt, and their offsets.

  Many tokenizers put a space before text encoded by itself, which a reply in
  the middle of a text does not have. So it is encoded after a short anchor
  that no token joins to it, and what decodes as the whole text is taken.
  """
  wanted = tokenizer.decode(tokenizer.encode(whole), skip_special=False)
  for anchor in _ANCHORS:
    ids, offsets = tokenizer.encode_with_offsets(anchor + reply)
    width = len(anchor)
    begin = sum(start < width for start, _ in offsets)
    ids = ids[begin:]
    if tokenizer.decode(prompt + ids, skip_special=False) == wanted:
      return ids, [(a - width, b - width) for a, b in offsets[begin:]]
  raise RowError(
    conversation.source or "row",
    f"a reply {reply[:30]!r} that cannot be encoded apart from its prompt",
    "a prompt whose last token ends where the reply begins",
    "End the generation prompt with a special token or a line break.",
  )


def _stop_index(
  ids: list[int],
  offsets: list[tuple[int, int]],
  start: int,
  end: int,
  tokenizer: Tokenizer,
  conversation: Conversation,
) -> int:
  """Index of the stop token of the reply that begins at `start`.

  It is where generation would stop: at the first stop id; and it must be the
  token that ends the trained span, at character `end`.
  """
  stops = frozenset(tokenizer.stop_ids)
  for index in range(start, len(ids)):
    if ids[index] in stops:
      if offsets[index][1] == end:
        return index
      break
  raise RowError(
    conversation.source or "row",
    "a trained turn whose stop token the tokenizer reads as other tokens",
    "one stop token, at the end of the turn",
    "Declare the stop token as special in the model folder's tokenizer files.",
  )
