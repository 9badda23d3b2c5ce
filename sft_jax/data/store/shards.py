"""Shards: some rows, and the examples they become, as arrays.

The unit of work of a build, encoded here or in another process to the same
bytes; the writer, which sees them in order, adds counts from the store's start.
"""

import hashlib
import json
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.conversation import Conversation, NothingToTrain, RowError
from sft_jax.data.encoding import encode
from sft_jax.data.encoding.encode import Example
from sft_jax.data.sources import Source, settle_weights
from sft_jax.data.store.files import INDEX, RUN
from sft_jax.data.store.stats import SourceStats
from sft_jax.data.tokenizers.tokenizer import Tokenizer

# A chunk ends at whichever comes first. It is about 50 ms of work.
_ROWS = 128
_BYTES = 1 << 20


class Recipe(NamedTuple):
  """What turns the rows of every source into examples; see `build.build`."""

  tokenizer: Tokenizer
  options: RenderOptions
  max_length: int
  format: str
  skip_bad_rows: bool


class Chunk(NamedTuple):
  """Rows of one source, each pickled: see `_items`."""

  number: int
  source: Source
  rows: list[bytes]


class Encoded(NamedTuple):
  number: int  # Of its source.
  stats: SourceStats  # What became of each row.
  tokens: Shaped[np.ndarray, " tokens"]  # Of all examples, back to back.
  runs: Shaped[np.ndarray, " runs"]  # See `files.RUN`.
  # See `files.INDEX`; starts and rows count from those of the chunk.
  index: Shaped[np.ndarray, " examples"]
  places: bytes  # Of the rows trained on, as bytes.
  bad_rows: bytes  # Lines for bad_rows.jsonl.
  fault: Exception | None  # What stops the build at this row, if anything does.


def read(
  number: int, source: Source, *, seed: int, chunk_rows: int = _ROWS
) -> Iterator[Chunk]:
  items = _items(source, seed)
  source = settle_weights(source).without_rows()
  pickled: list[bytes] = []
  for item in items:
    pickled.append(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
    if len(pickled) == chunk_rows or sum(map(len, pickled)) > _BYTES:
      yield Chunk(number, source, pickled)
      pickled = []
  if pickled:
    yield Chunk(number, source, pickled)


def read_again(
  source: Source, *, seed: int
) -> Iterator[tuple[str, Any] | RowError]:
  """(place, row) of the rows that a build takes, or what is wrong with them."""
  for item in _items(source, seed):
    if isinstance(item, _Broken):
      raise item.fault
    if isinstance(item, RowError) or not isinstance(item[1], NothingToTrain):
      yield item


class _Broken(NamedTuple):
  """In a row's stead: the file cannot be read on."""

  fault: Exception


def _items(source: Source, seed: int) -> Iterator[Any]:
  """(place, row), or what stands in its stead, in the order of the rows."""
  if source.limit is None:
    yield from _read(source)
    return
  number, rng = sum(1 for _ in _read(source)), np.random.default_rng(seed)
  taken = np.zeros(number, bool)
  taken[rng.choice(number, min(source.limit, number), replace=False)] = True
  for i, item in enumerate(_read(source)):
    if taken[i] or isinstance(item, _Broken):
      yield item
    else:
      place = item.where if isinstance(item, RowError) else item[0]
      yield place, NothingToTrain("beyond limit")


def _read(source: Source) -> Iterator[Any]:
  """(place, row), the RowError of one that cannot be read, or _Broken."""
  unreadable: list[RowError] = []
  try:
    for item in source.read(unreadable.append):
      while unreadable:
        yield unreadable.pop(0)
      yield item
    yield from unreadable
  except (ValueError, OSError) as fault:
    # Told in its turn, after the faults of rows before it.
    yield from unreadable
    yield _Broken(fault)


def encode_chunk(recipe: Recipe, chunk: Chunk) -> Encoded:
  """Encodes the rows of a chunk, in order, up to the first fault."""
  tokenizer, options, max_length, *_ = recipe
  items = [pickle.loads(pickled) for pickled in chunk.rows]
  read = [_to_conversation(recipe, chunk.source, item) for item in items]
  rows = [one for one in read if isinstance(one, Conversation)]
  results = encode.encode_rows(rows, tokenizer, options, max_length=max_length)
  made, fault = _Arrays(recipe), None
  for item, conversation in zip(items, read, strict=True):
    if isinstance(conversation, _Broken):
      fault = conversation.fault
      break
    made.stats.rows_in += 1
    try:
      if isinstance(conversation, Exception):
        raise conversation
      encoded = next(results)
      if isinstance(encoded, Exception):
        raise encoded
      made.add(conversation, encoded, content_of(item[1]))
    except NothingToTrain as nothing:
      made.stats.drop(nothing.reason, item[0])
    except RowError as error:
      if not recipe.skip_bad_rows:
        fault = error
        break
      made.stats.drop("malformed", error.where)
      line = {"where": error.where, "error": str(error)}
      made.bad_rows += json.dumps(line).encode() + b"\n"
  return made.encoded(chunk.number, fault)


def _to_conversation(
  recipe: Recipe, source: Source, item: Any
) -> Conversation | _Broken | RowError | NothingToTrain:
  """What is read of an item of `_items`, or what is wrong with it."""
  if isinstance(item, RowError | _Broken):
    return item
  place, row = item
  if isinstance(row, NothingToTrain):
    return row
  try:
    return source.to_conversation(row, place, recipe.format)
  except (RowError, NothingToTrain) as error:
    return error


class _Arrays:
  def __init__(self, recipe: Recipe):
    self.stats, self.bad_rows = SourceStats(), bytearray()
    self._recipe, self._places = recipe, bytearray()
    self._examples: list[Example] = []
    self._runs: list[np.ndarray] = []
    self._records: list[tuple] = []
    self._num_tokens = self._num_runs = 0

  def add(
    self, conversation: Conversation, encoded: encode.EncodedRow, content: int
  ) -> None:
    place = conversation.source
    if not encoded.examples:
      self.stats.drop(next(iter(encoded.dropped), "empty text"), place)
      return
    for reason, turns in encoded.dropped.items():
      self.stats.drop_turns(reason, turns, place)
    for note in (*encoded.notes, *conversation.notes):
      self.stats.note(note, place)
    where, row = place.encode(), self.stats.rows_trained
    text = conversation.text is not None
    truncates = self._recipe.options.over_long == "truncate"
    for example in encoded.examples:
      length = len(example.tokens)
      runs = to_runs(example)
      trained = np.flatnonzero(example.loss_weights)
      cut = truncates and length == self._recipe.max_length
      self._records.append(
        (self._num_tokens, self._num_runs, row, content,
         len(self._places), len(where), length, len(runs), len(trained),
         trained[-1], 0, example.rejected, text, text or cut)
      )  # fmt: skip
      self._examples.append(example)
      self._runs.append(runs)
      self._num_tokens += length
      self._num_runs += len(runs)
    self._places += where
    self.stats.rows_trained += 1

  def encoded(self, number: int, fault: Exception | None) -> Encoded:
    made = [example.tokens for example in self._examples]
    tokens = np.concatenate([np.empty(0, np.int32), *made])
    runs = np.concatenate([np.empty(0, RUN), *self._runs])
    index = np.array(self._records, INDEX)
    index["source"] = number
    texts = (bytes(self._places), bytes(self.bad_rows))
    return Encoded(number, self.stats, tokens, runs, index, *texts, fault)


def to_runs(example: Example) -> Shaped[np.ndarray, " runs"]:
  """Weights and roles as runs of equal ones: [0 0 1] -> 2 x 0, 1 x 1."""
  weights, roles = example.loss_weights, example.roles
  new = (weights[1:] != weights[:-1]) | (roles[1:] != roles[:-1])
  starts = np.concatenate([[0], np.flatnonzero(new) + 1])
  runs = np.empty(len(starts), RUN)
  runs["length"] = np.diff(starts, append=len(weights))
  runs["weight"], runs["role"] = weights[starts], roles[starts]
  return runs


def content_of(row: Any) -> int:
  """Hash of a row: 64 bits, equal for equal rows."""
  text = json.dumps(row, sort_keys=True, default=str).encode()
  return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
