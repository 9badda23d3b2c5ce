"""Rendered text to ids, at the boundary of prompt and response.

The ids before a response must be those that inference gives its prompt, and
a tokenizer may join the prompt's last characters with the response's first.
Where it does, the two are encoded apart.
"""

import bisect
import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from sft_jax.data.chat.loss_spans import Rendered
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.conversation import Conversation, RowError
from sft_jax.data.tokenizers.tokenizer import Tokenizer

Offsets = list[tuple[int, int]]

# What may stand before a reply encoded by itself; see `_encode_apart`.
_ANCHORS = ("", "\n", ".", "a", "|")


class Tokens(NamedTuple):
  """Ids, their weights and their roles (indices of `TOKEN_ROLES`)."""

  ids: list[int]
  weights: Float32[np.ndarray, " n"]
  roles: UInt8[np.ndarray, " n"]


class TokenizedRow(NamedTuple):
  """The token sequences of a row, before the length rule, and its notes."""

  tokens: list[Tokens]
  notes: frozenset[str]


def encode_rendered(
  rendered: Rendered,
  tokenizer: Tokenizer,
  options: RenderOptions,
  conversation: Conversation,
) -> list[Tokens]:
  """One sequence, or one per span where spans cannot share their ids."""
  spans, where = rendered.spans, conversation.place
  text, literal = rendered.text, rendered.special_as_text
  ids, offsets = tokenizer.encode_with_offsets(text, literal)
  if not spans:
    weights = np.ones(len(ids), np.float32)
    return [Tokens(ids, weights, _roles(rendered, offsets))]
  length = functools.partial(_prompt_length, rendered, ids, offsets, tokenizer)
  starts = [length(start) for start, _, _ in spans]
  if all(starts):
    weights = np.zeros(len(ids), np.float32)
    for start, (_, end, weight) in zip(starts, spans, strict=True):
      assert start
      stop = _stop_index(ids, offsets, start, end, tokenizer, where)
      weights[start : stop + 1] = weight
    _mask(weights, rendered, offsets)
    return [Tokens(ids, weights, _roles(rendered, offsets))]
  if len(spans) > 1 and options.history == "keep":
    got = "a token that joins a prompt to its reply"
    expected = "replies that begin with a token of their own (history='keep')"
    raise RowError(where, got, expected, "Set data.history to auto or split.")
  return [_encode_apart(rendered, span, tokenizer, where) for span in spans]


def _prompt_length(
  rendered: Rendered,
  ids: list[int],
  offsets: Offsets,
  tokenizer: Tokenizer,
  start: int,
) -> int | None:
  """How many ids the prompt text[:start] has, if they are the first of all.

  Special tokens cut a text: what is before one does not change the ids of
  what is after. So only the end of the prompt is encoded again, from its last
  special token on.
  """
  special = special_ids(tokenizer)
  begin, last = 0, 0
  for index in range(bisect.bisect_left(offsets, (start, -1)) - 1, -1, -1):
    if ids[index] in special:
      begin, last = offsets[index][0], index
      break
  inside = [x for x in rendered.special_as_text if begin <= x[0]]
  literal = tuple((a - begin, b - begin) for a, b in inside if b <= start)
  tail = tail_ids(tokenizer, rendered.text[begin:start], literal)
  count = last + len(tail)
  return count if tuple(ids[last:count]) == tail else None


@functools.lru_cache(maxsize=256)  # Prompts end alike: '<|assistant|>\n'.
def tail_ids(
  tokenizer: Tokenizer, text: str, literal: tuple[tuple[int, int], ...]
) -> tuple[int, ...]:
  """Ids of the end of a prompt, from its last special token on."""
  return tuple(tokenizer.encode_with_offsets(text, literal)[0])


@functools.lru_cache(maxsize=8)
def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
  """Ids that only structure has: any text may have the unknown token."""
  unknown = tokenizer.named_tokens.get("unk_token")
  special = tokenizer.special_tokens.items()
  return frozenset(i for text, i in special if text != unknown)


def _encode_apart(
  rendered: Rendered,
  span: tuple[int, int, float],
  tokenizer: Tokenizer,
  where: str,
) -> Tokens:
  """The ids of a prompt, and after them those of its reply.

  Many tokenizers put a space before text encoded by itself, which a reply in
  the middle of a text does not have. So it is encoded after a short anchor
  that no token joins to it, and what decodes as the whole text is taken.
  """
  start, end, weight = span
  text, literal = rendered.text, rendered.special_as_text
  before = tuple(one for one in literal if one[1] <= start)
  prompt, prompt_offsets = tokenizer.encode_with_offsets(text[:start], before)
  up_to = tuple(one for one in literal if one[1] <= end)
  whole, _ = tokenizer.encode_with_offsets(text[:end], up_to)
  wanted = tokenizer.decode(whole, skip_special=False)
  for anchor in _ANCHORS:
    moved = start - len(anchor)
    literal = tuple((a - moved, b - moved) for a, b in up_to if a >= start)
    after = anchor + text[start:end]
    reply, offsets = tokenizer.encode_with_offsets(after, literal)
    begin = sum(one < len(anchor) for one, _ in offsets)
    ids = prompt + reply[begin:]
    if tokenizer.decode(ids, skip_special=False) == wanted:
      break
  else:
    raise RowError(
      where,
      f"a reply {text[start:end][:30]!r} that cannot be encoded apart from its "
      "prompt",
      "a prompt whose last token ends where the reply begins",
      "End the generation prompt with a special token or a line break.",
    )
  offsets = [(a + moved, b + moved) for a, b in offsets[begin:]]
  offsets = prompt_offsets + offsets
  _stop_index(ids, offsets, len(prompt), end, tokenizer, where)
  weights = np.zeros(len(ids), np.float32)
  weights[len(prompt) :] = weight
  _mask(weights, rendered, offsets)
  return Tokens(ids, weights, _roles(rendered, offsets))


def _stop_index(
  ids: list[int],
  offsets: Offsets,
  start: int,
  end: int,
  tokenizer: Tokenizer,
  where: str,
) -> int:
  """Index of the stop token of the reply that begins at id `start`.

  It is where generation would stop: at the first stop id; and it must be the
  token that ends the trained span, at character `end`.
  """
  stops = frozenset(tokenizer.stop_ids)
  found = next((i for i in range(start, len(ids)) if ids[i] in stops), None)
  if found is not None and offsets[found][1] == end:
    return found
  raise RowError(
    where,
    "a trained turn whose stop token the tokenizer reads as other tokens",
    "one stop token, at the end of the turn",
    "Declare the stop token as special in the model folder's tokenizer files.",
  )


def _tokens_in(
  text: str, offsets: Offsets, start: int, end: int, *, whole: bool
) -> slice:
  """The tokens of characters [start, end).

  White space does not count where a token reaches over an edge: of ' Paris',
  the word decides. Of tokens that reach over an edge with more than that,
  `whole` leaves out those that start before, and takes those that end after.
  """
  first = bisect.bisect_left(offsets, (start, -1))
  while first and offsets[first - 1][1] > start:
    over = text[offsets[first - 1][0] : start].strip()
    inside = text[start : min(end, offsets[first - 1][1])].strip()
    if not inside or (over and whole):
      break
    first -= 1
  last = bisect.bisect_left(offsets, (end, -1))
  return slice(first, last)


def _mask(weights: np.ndarray, rendered: Rendered, offsets: Offsets) -> None:
  """Gives weight 0 to tokens with a character of a masked span.

  A token is trained only where all of it may be, but for white space at its
  edges: in 'is Paris.', the span 'Paris' trains ' Paris'.
  """
  for start, end in rendered.masked:
    muted = _tokens_in(rendered.text, offsets, start, end, whole=False)
    last = muted.stop
    # One that begins here with white space alone is of what comes after.
    while last > muted.start and offsets[last - 1][1] > end:
      if rendered.text[offsets[last - 1][0] : end].strip():
        break
      last -= 1
    weights[muted.start : last] = 0


def _roles(rendered: Rendered, offsets: Offsets) -> UInt8[np.ndarray, " n"]:
  """The role of each token: that of its first character but white space."""
  roles = np.full(len(offsets), TOKEN_ROLES.index("template"), np.uint8)
  for start, end, role in rendered.role_spans:
    tokens = _tokens_in(rendered.text, offsets, start, end, whole=True)
    roles[tokens] = TOKEN_ROLES.index(role)
  return roles
