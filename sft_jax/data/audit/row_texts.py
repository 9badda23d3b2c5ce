"""The texts of a run's rows, kept on disk for checks that read words.

A row is five texts: its place, the system prompt (with the tools on offer), the
prompt (all other turns before the answer), the reasoning and the answer (the
last trained turn). Raw text is an answer without a prompt. They are in files,
so that memory holds a few numbers per row.
"""

import array
import collections
import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from sft_jax.data.audit import text_hashing as words_lib
from sft_jax.data.audit.text_hashing import Words
from sft_jax.data.conversation import (
  Conversation,
  Message,
  NothingToTrain,
  RowError,
)
from sft_jax.data.store import shards
from sft_jax.data.store.store import Store

_BATCH = 1 << 20  # characters
_SHOWN = 20  # places


class Row(NamedTuple):
  """What one row says; see the head of this file."""

  place: str
  system: str
  prompt: str
  reasoning: str
  answer: str


class Texts:
  """Rows in the order read, column by column; its files are open within.

  Attributes:
    watched: whether a row is trained on, or would be: is not held out.
    text: whether it is raw text.
    dropped: places of rows that are not here, by reason: at most 20.
    num_dropped: how many there are of each.
  """

  def __init__(self, folder: Path):
    self._folder = folder
    self._columns = {name: _Column(folder / name) for name in Row._fields}
    self._flags = array.array("b")
    self.dropped: dict[str, list[str]] = collections.defaultdict(list)
    self.num_dropped: collections.Counter[str] = collections.Counter()
    self._words: dict[str, Words] = {}

  def __enter__(self) -> "Texts":
    return self

  def __exit__(self, *_: object) -> None:
    for column in self._columns.values():
      column.close()

  def __len__(self) -> int:
    return len(self._flags)

  def add(self, row: Row, *, held_out: bool, text: bool) -> None:
    for name, value in row._asdict().items():
      self._columns[name].add(value)
    self._flags.append(held_out + 2 * text)

  def drop(self, reason: str, place: str) -> None:
    """Counts a row that says nothing here."""
    self.num_dropped[reason] += 1
    if len(self.dropped[reason]) < _SHOWN:
      self.dropped[reason].append(place)

  @functools.cached_property
  def held_out(self) -> Bool[np.ndarray, " rows"]:
    return np.array(self._flags, np.int8) & 1 > 0

  @property
  def watched(self) -> Bool[np.ndarray, " rows"]:
    return ~self.held_out

  @functools.cached_property
  def text(self) -> Bool[np.ndarray, " rows"]:
    return np.array(self._flags, np.int8) & 2 > 0

  def row(self, i: int) -> Row:
    return Row(*(self._columns[name].get(i) for name in Row._fields))

  def place(self, i: int) -> str:
    return self._columns["place"].get(i)

  def batches(self, column: str) -> Iterator[tuple[int, list[str]]]:
    """(number of the first row, texts) of a column, a few MB at a time."""
    return self._columns[column].batches()

  def words(self, column: str) -> Words:
    """The words of a column, on disk; 'row' is prompt, reasoning, answer."""
    if column not in self._words:
      made = self._joined()
      if column != "row":
        made = (words_lib.split(texts) for _, texts in self.batches(column))
      self._words[column] = _spool(self._folder / f"{column}.words", made)
    return self._words[column]

  def _joined(self) -> Iterator[Words]:
    parts = [self.words(part) for part in ("prompt", "reasoning", "answer")]
    sizes = np.sum([part.counts for part in parts], axis=0)
    for some in words_lib.batches(sizes, _BATCH):
      rows = np.arange(some.start, some.stop)
      yield words_lib.join([words_lib.take(part, rows) for part in parts])


def collect(
  train: Store,
  held_out: Store | None,
  *,
  folder: Path,
  format: str = "auto",
  seed: int = 0,
) -> Texts:
  """Reads the rows of stores again, for what they say; texts are in `folder`.

  Rows that cannot be read or say nothing are counted, not raised: whether they
  may be there was decided when they were encoded. `held_out` may be a part of
  the sources of `train`, or of other files.
  """

  def rows_of(store: Store) -> set[tuple[str, str]]:
    labels = [source.label for source in store.sources]
    return {(labels[x], store.place(i)) for i, x in enumerate(store.source)}

  texts, kept, sources = Texts(folder), set(), list(train.sources)
  if held_out:
    kept = rows_of(held_out)
    labels = {source.label for source in sources}
    sources += [one for one in held_out.sources if one.label not in labels]
  # Where some rows were selected from all:
  trained = None if train.weights is None else rows_of(train) | kept
  for source in sources:
    for item in shards.read_again(source, seed=seed):
      if isinstance(item, RowError):
        texts.drop("malformed", item.where)
        continue
      place, row = item
      key = (source.label, place)
      try:
        made = source.to_conversation(row, place, format)
      except NothingToTrain as nothing:
        texts.drop(nothing.reason, place)
      except RowError:
        texts.drop("malformed", place)
      else:
        if trained is not None and key not in trained:
          texts.drop("not selected", place)
          continue
        held, raw = key in kept, not made.messages
        texts.add(of_conversation(made, place), held_out=held, text=raw)
  return texts


def of_conversation(conversation: Conversation, place: str) -> Row:
  """What a conversation says; see the head of this file."""
  if not conversation.messages:
    return Row(place, "", "", "", conversation.text or "")
  # A turn that says nothing stands for an answer where there is none.
  messages = [*conversation.messages, Message("assistant", "")]
  trains = lambda m: m.role == "assistant" and m.loss_weight > 0
  answers = [i for i, one in enumerate(messages[:-1]) if trains(one)]
  at = answers[-1] if answers else len(messages) - 1
  system = [m.content for m in messages if m.role == "system"]
  system += [json.dumps(tool) for tool in conversation.tools]
  asked = [message_text(m) for m in messages[:at] if m.role != "system"]
  said = (messages[at].reasoning or "", message_text(messages[at]))
  return Row(place, "\n".join(system), "\n\n".join(asked), *said)


def message_text(message: Message) -> str:
  """A turn's content and the calls it makes, as text."""
  calls = [
    f"{call.name} {json.dumps(call.arguments, ensure_ascii=False)}"
    for call in message.tool_calls
  ]
  return "\n".join(filter(None, [message.content, *calls]))


class _Column:
  """Texts back to back in a file."""

  def __init__(self, path: Path):
    self._file = path.open("w+b")
    self._ends = array.array("q", [0])

  def add(self, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    self._file.write(data)
    self._ends.append(self._ends[-1] + len(data))

  def close(self) -> None:
    self._file.close()

  def get(self, i: int) -> str:
    return self._read(i, i + 1)[0]

  def batches(self) -> Iterator[tuple[int, list[str]]]:
    sizes = np.diff(np.array(self._ends, np.int64))
    for some in words_lib.batches(sizes, _BATCH):
      yield some.start, self._read(some.start, some.stop)

  def _read(self, first: int, last: int) -> list[str]:
    self._file.flush()
    start, end = self._ends[first], self._ends[last]
    data = os.pread(self._file.fileno(), end - start, start)
    edges = (x - start for x in self._ends[first : last + 1])
    texts = (data[a:b] for a, b in itertools.pairwise(edges))
    return [text.decode("utf-8", "surrogatepass") for text in texts]


def _spool(path: Path, batches: Iterable[Words]) -> Words:
  """Words written batch by batch, as one map of the file."""
  counts = [np.empty(0, np.int64)]
  with path.open("wb") as file:
    for words in batches:
      file.write(words.hashes.tobytes())
      counts.append(words.counts)
  starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
  if not starts[-1]:  # An empty file cannot be mapped.
    return Words(np.empty(0, np.uint64), starts)
  return Words(np.asarray(np.memmap(path, np.uint64, "r")), starts)
