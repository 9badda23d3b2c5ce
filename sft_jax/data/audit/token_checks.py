"""Token checks: positions of tokens that would teach something wrong."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Integer, UInt8

from sft_jax.data.chat.options import DEFAULT, RenderOptions
from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.encoding import boundaries
from sft_jax.data.store.store import Store
from sft_jax.data.tokenizers import files
from sft_jax.data.tokenizers.tokenizer import Tokenizer

_CHUNK = 1 << 18  # tokens looked at together: what caches hold
# Roles of text that a row's author wrote, and those that go on with a turn.
_SAID = ("system", "user", "tool", "answer", "reasoning")
_OF_TURN = ("answer", "reasoning", "tool_call", "stop")


class Facts(NamedTuple):
  """What findings need to know of a tokenizer; see `facts`."""

  vocab_size: int
  stop_ids: Collection[int]  # Those that end a reply at inference.
  bos_id: int | None
  pad_id: int | None = None
  adds_bos: bool = False  # Whether the tokenizer begins every text with BOS.
  # Those that no message should hold, where messages may hold them at all.
  special_ids: Collection[int] = ()
  turns: bool = True  # What is trained are turns, and not all of a text alike.


class Documents(NamedTuple):
  """Neighboring examples of a store, back to back."""

  rows: slice  # Which examples of the store.
  # Example k is tokens[starts[k]:starts[k + 1]].
  starts: Int64[np.ndarray, " rows+1"]
  # Theirs; see `encode.Example`.
  tokens: Int32[np.ndarray, " tokens"]
  weights: Float32[np.ndarray, " tokens"]
  roles: UInt8[np.ndarray, " tokens"]


def facts(tokenizer: Tokenizer, options: RenderOptions = DEFAULT) -> Facts:
  """What a tokenizer is, and how render options read its special tokens:
  messages hold control tokens under control_tokens='allow' alone."""
  config, one = files.read(tokenizer.folder).config, tokenizer
  special: Collection[int] = ()
  if options.control_tokens == "allow":
    special = boundaries.special_ids(tokenizer)
  adds_bos, turns = config.get("add_bos_token"), options.train_on != "all"
  own = (one.vocab_size, one.stop_ids, one.bos_id, one.pad_id)
  return Facts(*own, adds_bos is True, special, turns)


def batches(store: Store) -> Iterator[Documents]:
  """All examples of a store, a few million tokens at a time."""
  starts, lengths = store.index["start"], store.lengths.astype(np.int64)
  edges = np.cumsum(lengths)
  at = 0
  while at < len(lengths):
    before = edges[at] - lengths[at]
    end = max(at + 1, int(np.searchsorted(edges, before + _CHUNK, "right")))
    rows = slice(at, end)
    ends = np.concatenate([[0], edges[rows] - before])
    tokens = store.tokens[_places(starts[rows], lengths[rows])]
    first, many = store.index["run"][rows], store.index["runs"][rows]
    runs = store.runs[_places(first, many)]
    sizes = runs["length"]
    weights, roles = (np.repeat(runs[x], sizes) for x in ("weight", "role"))
    yield Documents(rows, ends, tokens.astype(np.int32), weights, roles)
    at = end


def _places(
  starts: Integer[np.ndarray, " rows"], lengths: Integer[np.ndarray, " rows"]
) -> Int64[np.ndarray, " places"]:
  """Every place of each row: a part of a store has gaps between them."""
  before = np.cumsum(lengths, dtype=np.int64) - lengths
  return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def outside(documents: Documents, known: Facts) -> Int64[np.ndarray, " faults"]:
  """Positions of ids that the embedding has no row for."""
  tokens = documents.tokens
  return np.flatnonzero((tokens < 0) | (tokens >= known.vocab_size))


def two_bos(documents: Documents, known: Facts) -> Int64[np.ndarray, " faults"]:
  """Positions of a BOS after the BOS that begins a text."""
  if known.bos_id is None:
    return np.empty(0, np.int64)
  first = documents.starts[:-1][np.diff(documents.starts) > 1]
  is_bos = documents.tokens == known.bos_id
  return first[is_bos[first] & is_bos[first + 1]] + 1


def turn_ends(
  documents: Documents,
  raw: Bool[np.ndarray, " rows"],
  cut: Bool[np.ndarray, " rows"],
  known: Facts,
) -> Int64[np.ndarray, " faults"]:
  """Positions of the last tokens of trained turns that are no stop token; of a
  turn that continues untrained only a part was wanted."""
  if not known.turns:
    return np.empty(0, np.int64)
  trained = documents.weights > 0
  last = documents.starts[1:] - 1
  ends = trained.copy()
  ends[:-1] &= ~trained[1:]
  ends[last] = trained[last]
  # Raw text ends anywhere, and what is cut off ends where it is cut.
  ends[last[cut]] = False
  ends[np.repeat(raw, np.diff(documents.starts))] = False
  goes_on = _has_role(documents, _OF_TURN)
  goes_on[documents.starts[:-1]] = False
  ends[:-1] &= ~goes_on[1:]
  at = np.flatnonzero(ends)
  return at[~np.isin(documents.tokens[at], list(known.stop_ids))]


def masked_stop(
  documents: Documents, ends: Int64[np.ndarray, " ends"], known: Facts
) -> Bool[np.ndarray, " ends"]:
  """Whether a turn's stop token follows, untrained, and is the padding's."""
  if known.pad_id is None or known.pad_id not in known.stop_ids:
    return np.zeros(len(ends), bool)
  inside = ~np.isin(ends + 1, documents.starts)
  after = documents.tokens[np.minimum(ends + 1, len(documents.tokens) - 1)]
  return inside & (after == known.pad_id)


def trained_padding(
  documents: Documents, known: Facts
) -> Int64[np.ndarray, " faults"]:
  """Positions of padding with a weight; where padding and stop token are one,
  the first of a run of them may stop."""
  if known.pad_id is None:
    return np.empty(0, np.int64)
  trained = (documents.tokens == known.pad_id) & (documents.weights > 0)
  if known.pad_id in known.stop_ids:
    again = np.zeros_like(trained)
    again[1:] = trained[:-1]
    again[documents.starts[:-1]] = False
    trained &= again
  return np.flatnonzero(trained)


def without_bos(
  store: Store, begins: Int32[np.ndarray, " rows"], known: Facts
) -> Int64[np.ndarray, " faults"]:
  """Conversations without BOS, where there is reason to expect one."""
  if known.bos_id is None:
    return np.empty(0, np.int64)
  talks = ~store.index["text"]
  begun = begins == known.bos_id
  expected = known.adds_bos or bool(begun[talks].any())
  return np.flatnonzero(talks & ~begun & expected)


def control_tokens(
  documents: Documents, known: Facts
) -> Int64[np.ndarray, " faults"]:
  """Positions of control tokens inside what is said."""
  if not known.special_ids:
    return np.empty(0, np.int64)
  special = np.isin(documents.tokens, list(known.special_ids))
  return np.flatnonzero(special & _has_role(documents, _SAID))


def _has_role(
  documents: Documents, roles: Collection[str]
) -> Bool[np.ndarray, " tokens"]:
  return np.isin(documents.roles, [TOKEN_ROLES.index(role) for role in roles])
