"""Cache: rows encoded once, kept on disk under the hash of what made them.

The key of a store is the bytes of its files, the tokenizer with its template,
every policy, and the code that encodes: change one, and the rows are encoded
again. A store is written beside its final place and renamed into it, so it is
there whole or not at all. A build that is killed leaves a `.building-*`
folder that nothing reads.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sft_jax.data import encode, formats, rows
from sft_jax.data.conversation import NothingToTrain, RowError
from sft_jax.data.ledger import Ledger
from sft_jax.data.store import (
  FILES,
  INDEX,
  Source,
  Sources,
  Store,
  count,
  digest,
  open_store,
  to_sources,
  write_meta,
)
from sft_jax.data.tokenizers import Tokenizer

# Rooms of the data wing that come after encoding: changing them leaves every
# example as it is.
_DOWNSTREAM = {
  "audit.py",
  "ledger.py",
  "packing.py",
  "pipeline.py",
  "__init__.py",
}
_LIBRARIES = ("jinja2", "sentencepiece", "tokenizers")
_FLUSH = 4096  # examples


def build(
  sources: Sources,
  tokenizer: Tokenizer,
  *,
  directory: str | Path,
  max_length: int,
  format: str = "auto",
  history: str = "auto",
  over_long: str = "drop",
  on_bad_row: str = "error",
  template_kwargs: dict[str, Any] | None = None,
  announce: Callable[[str], None] = print,
) -> Store:
  """Encodes every row of the sources, or opens what was encoded before.

  Reads and writes row by row: memory does not grow with the data. Processes
  that build the same store at once do not disturb each other.

  Args:
    sources: a path, a glob, or a sequence of these, each alone or as
      (path, weight). Weights belong to the mixture and not to the key.
    tokenizer: carries the chat template.
    directory: holds one folder per store.
    max_length: tokens of the longest example.
    format: of the rows; see `formats.to_conversation`.
    history: see `encode.encode_row`.
    over_long: see `encode.encode_row`.
    on_bad_row: 'error' stops at the first malformed row; 'skip' counts it and
      writes its place and fault to bad_rows.jsonl.
    template_kwargs: arguments of the chat template.
    announce: told in a line each what is done.

  Raises:
    RowError: a malformed row, by its place.
    ValueError: a file that is not there, or a policy that is not known.
  """
  if on_bad_row not in ("error", "skip"):
    raise ValueError(
      f"data.on_bad_row: got {on_bad_row!r}; expected 'error' or 'skip'. Set "
      "it to one of these."
    )
  parts = to_sources(sources)
  policy = {
    "max_length": max_length,
    "history": history,
    "over_long": over_long,
    "template_kwargs": template_kwargs or {},
  }
  key = {
    "files": [
      [(file.name, digest(file)) for file in rows.find_files(source.path)]
      for source in parts
    ],
    "tokenizer": tokenizer.fingerprint,
    "code": _code_version(),
    "format": format,
    "on_bad_row": on_bad_row,
    **policy,
  }
  folder = Path(directory) / _hash(json.dumps(key, sort_keys=True))[:32]
  if folder.exists():
    try:
      store = open_store(folder, parts)
      announce(f"data: {len(store.index):,} examples from cache {folder}")
      return store
    except ValueError as damage:
      announce(f"{damage} Making it again now.")
      shutil.rmtree(folder)

  def encode_row(row: Any, place: str) -> _Encoded:
    conversation = formats.to_conversation(row, format=format, source=place)
    encoded = encode.encode_row(conversation, tokenizer, **policy)
    return _Encoded(*encoded, text=conversation.text is not None)

  announce(f"data: encoding {', '.join(s.path for s in parts)} into {folder}")
  building = folder.parent / f".building-{uuid.uuid4().hex}"
  building.mkdir(parents=True)
  try:
    with _Writer(
      building,
      skip_bad_rows=on_bad_row == "skip",
      cut_at=max_length if over_long == "truncate" else None,
    ) as writer:
      for number, source in enumerate(parts):
        writer.encode(number, source, encode_row)
    _seal(building, parts, writer.ledger)
    _move(building, folder)
  finally:
    shutil.rmtree(building, ignore_errors=True)
  store = open_store(folder, parts)
  if bad := store.ledger.dropped("malformed"):
    where = folder / "bad_rows.jsonl"
    announce(f"data: {bad:,} malformed rows skipped; see {where}")
  return store


class _Encoded(NamedTuple):
  """`encode.EncodedRow`, and whether the row was raw text."""

  examples: list[encode.Example]
  dropped: dict[str, int]
  text: bool


class _Writer:
  """Reads rows and appends their examples to the files of a store."""

  def __init__(self, folder: Path, *, skip_bad_rows: bool, cut_at: int | None):
    self.ledger = Ledger()
    self._skip_bad_rows = skip_bad_rows
    self._cut_at = cut_at
    names = (*FILES, "bad_rows.jsonl")
    self._files = {name: (folder / name).open("wb") for name in names}
    self._records: list[tuple] = []
    self._rows = 0
    self._tokens = 0

  def __enter__(self) -> "_Writer":
    return self

  def __exit__(self, *_: Any) -> None:
    self._flush()
    for file in self._files.values():
      file.flush()
      os.fsync(file.fileno())
      file.close()

  def encode(
    self,
    number: int,
    source: Source,
    encode_row: Callable[[Any, str], _Encoded],
  ) -> None:
    """Writes one source and counts what becomes of each of its rows."""
    entry = self.ledger.source(source.path)

    def malformed(error: RowError) -> None:
      if not self._skip_bad_rows:
        raise error
      entry.drop("malformed", error.where)
      line = {"where": error.where, "error": str(error)}
      self._write("bad_rows.jsonl", json.dumps(line).encode() + b"\n")

    def unreadable(error: RowError) -> None:
      entry.rows_in += 1
      malformed(error)

    for place, row in rows.read_rows(source.path, on_bad_row=unreadable):
      entry.rows_in += 1
      try:
        encoded = encode_row(row, place)
      except NothingToTrain as nothing:
        entry.drop(nothing.reason, place)
      except RowError as error:
        malformed(error)
      else:
        if encoded.examples:
          self._append(encoded, number, _content(row), place)
          for reason, turns in encoded.dropped.items():
            entry.drop_turns(reason, turns, place)
        else:
          entry.drop(next(iter(encoded.dropped), "empty text"), place)

  def _append(
    self, encoded: _Encoded, source: int, content: int, place: str
  ) -> None:
    at = self._files["places.txt"].tell()
    width = self._write("places.txt", place.encode())
    for example in encoded.examples:
      length = len(example.tokens)
      trained = np.flatnonzero(example.loss_weights)
      may_run_on = encoded.text or length == self._cut_at
      self._records.append(
        (self._tokens, self._rows, content, at, width, length, len(trained),
         trained[-1], source, encoded.text, may_run_on)
      )  # fmt: skip
      self._write("tokens.bin", example.tokens.astype("<i4").tobytes())
      self._write("weights.bin", example.loss_weights.astype("<f4").tobytes())
      self._tokens += length
    self._rows += 1
    if len(self._records) >= _FLUSH:
      self._flush()

  def _flush(self) -> None:
    self._write("index.bin", np.array(self._records, INDEX).tobytes())
    self._records.clear()

  def _write(self, name: str, data: bytes) -> int:
    return self._files[name].write(data)


def _seal(folder: Path, sources: Sequence[Source], ledger: Ledger) -> None:
  """Counts what was written and puts it under digests."""
  index = np.fromfile(folder / "index.bin", INDEX)
  count(index, sources, ledger).check()
  files = {file.name: digest(file) for file in sorted(folder.iterdir())}
  examples = hashlib.sha256()
  examples.update((files["tokens.bin"] + files["weights.bin"]).encode())
  examples.update(index["length"].tobytes() + index["source"].tobytes())
  meta = {
    "files": files,
    "fingerprint": examples.hexdigest(),
    "ledger": ledger.to_json(),
  }
  write_meta(folder, meta)


def _move(building: Path, folder: Path) -> None:
  """Puts a whole store in its place, unless another process was first."""
  _sync_folder(building)
  try:
    building.rename(folder)
  except OSError:
    if not folder.exists():
      raise
  _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _content(row: Any) -> int:
  """Hash of a row: 64 bits, equal for equal rows."""
  text = json.dumps(row, sort_keys=True, default=str).encode()
  return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _code_version() -> str:
  """Hash of what turns rows into examples: our sources, others' versions."""
  files = sorted(Path(__file__).parent.glob("*.py"))
  ours = [digest(file) for file in files if file.name not in _DOWNSTREAM]
  others = [importlib.metadata.version(name) for name in _LIBRARIES]
  return _hash(" ".join(ours + others))


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()
