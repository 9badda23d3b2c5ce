"""Cache: rows encoded once, kept on disk under the hash of what made them.

The key of a store is the bytes of its files, the tokenizer with its template,
every options, and the code that encodes: change one, and the rows are encoded
again. A store is written beside its final place and renamed into it, so it is
there whole or not at all. What a killed build leaves, the next one removes.
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.sources import Source, Sources, to_sources
from sft_jax.data.store import fingerprint, shards, workers
from sft_jax.data.store.files import (
  FILES,
  INDEX,
  RUN,
  digest,
  hash_text,
  map_file,
  token_dtype,
  write_meta,
)
from sft_jax.data.store.stats import DatasetStats
from sft_jax.data.store.store import Store, count, open_store
from sft_jax.data.tokenizers.tokenizer import Tokenizer

# Chunks encoded in this process before others are started: of so few rows
# they would spend most of their time on starting.
_ALONE = 8


def build(
  sources: Sources,
  tokenizer: Tokenizer,
  options: RenderOptions,
  *,
  directory: str | Path,
  max_length: int,
  format: str = "auto",
  on_bad_row: str = "error",
  seed: int = 0,
  num_workers: int = 0,
  log: Callable[[str], None] = print,
) -> Store:
  """Encodes every row of the sources, or opens what was encoded before.

  Memory does not grow with the data. The store has the same bytes whatever
  the number of workers. Processes that build the same store at once do not
  disturb each other.

  Args:
    sources: see `sources.to_sources`. How often their rows are seen, and how
      much these weigh, belongs to the stream and not to the key.
    tokenizer: carries the chat template.
    options: see `encode.encode_row`.
    directory: holds one folder per store.
    max_length: tokens of the longest example.
    format: of rows whose source names none; see `formats.to_conversation`.
    on_bad_row: 'error' stops at the first malformed row; 'skip' counts it and
      writes its place and fault to bad_rows.jsonl.
    seed: draws the rows of sources with a limit.
    num_workers: processes that encode; 0 is one per core, 1 only this one.
    log: told in a line each what is done.

  Raises:
    RowError: a malformed row, by its place: the first, whatever the workers.
    ValueError: a file that is not there, or options that are not known.
    workers.WorkerDied: a worker was killed.
  """
  if on_bad_row not in ("error", "skip"):
    raise ValueError(
      f"data.on_bad_row: got {on_bad_row!r}; expected 'error' or 'skip'. Set "
      "it to one of these."
    )
  parts = to_sources(sources)
  made_from: dict[str, Any] = {
    f"source {number}": fingerprint.of_source(source, format, seed)
    for number, source in enumerate(parts, 1)
  }
  made_from |= {
    "tokenizer": fingerprint.of_tokenizer(tokenizer),
    "data.on_bad_row": on_bad_row,
    "data.seq_len": max_length,
    "options": options.to_json(),
  }
  key = json.dumps([made_from, fingerprint.code_version()], sort_keys=True)
  directory = Path(directory)
  folder = directory / hash_text(key)[:32]
  if folder.exists():
    try:
      store = open_store(folder, parts)
      log(f"data: {len(store.index):,} examples from cache {folder}")
      return store
    except ValueError as damage:
      log(f"{damage} Making it again now.")
      shutil.rmtree(folder)

  log(f"data: encoding {', '.join(s.label for s in parts)} into {folder}")
  recipe = shards.Recipe(
    tokenizer, options, max_length, format, skip_bad_rows=on_bad_row == "skip"
  )
  jobs = itertools.chain.from_iterable(
    shards.read(number, source, seed=seed)
    for number, source in enumerate(parts)
  )
  directory.mkdir(parents=True, exist_ok=True)
  _remove_dead(directory)
  with _building(directory) as place:
    with (
      contextlib.closing(
        _encode(recipe, jobs, num_workers or workers.num_cores())
      ) as encoded,
      _Writer(place, tokenizer.vocab_size, parts) as writer,
    ):
      for chunk in encoded:
        writer.append(chunk)
    _seal(place, parts, writer.stats, made_from, writer.tokens)
    _move(place, folder)
  store = open_store(folder, parts)
  if bad := store.stats.dropped("malformed"):
    where = folder / "bad_rows.jsonl"
    log(f"data: {bad:,} malformed rows skipped; see {where}")
  return store


def _encode(
  recipe: shards.Recipe, jobs: Iterator[shards.Chunk], num_workers: int
) -> Generator[shards.Encoded, None, None]:
  """The chunks encoded, in order: the first ones here, the rest by workers."""
  here = functools.partial(shards.encode_chunk, recipe)
  alone = None if num_workers == 1 else _ALONE
  yield from map(here, itertools.islice(jobs, alone))
  for job in jobs:  # There are more: all of them go to workers.
    rest = itertools.chain([job], jobs)
    yield from workers.map_ordered(here, rest, workers=num_workers)


class _Writer:
  """Appends encoded chunks to the files of a store."""

  def __init__(self, folder: Path, vocab_size: int, sources: Sequence[Source]):
    self.stats = DatasetStats()
    for source in sources:
      self.stats.source(source.label)
    self.tokens = token_dtype(vocab_size)
    self._sources = sources
    names = (*FILES, "bad_rows.jsonl")
    self._files = {name: (folder / name).open("wb") for name in names}
    # What the next chunk's counts begin from.
    self._begin = {"start": 0, "run": 0, "row": 0, "place": 0}

  def __enter__(self) -> "_Writer":
    return self

  def __exit__(self, *_: Any) -> None:
    for file in self._files.values():
      file.flush()
      os.fsync(file.fileno())
      file.close()

  def append(self, chunk: shards.Encoded) -> None:
    """Writes a chunk; raises its fault."""
    if chunk.fault:
      raise chunk.fault
    self.stats.source(self._sources[chunk.number].label).add(chunk.stats)
    for name, begin in self._begin.items():
      chunk.index[name] += begin
    self._begin["start"] += len(chunk.tokens)
    self._begin["run"] += len(chunk.runs)
    self._begin["row"] += chunk.stats.rows_trained
    self._begin["place"] += len(chunk.places)
    data = (
      _narrow(chunk.tokens, self.tokens).tobytes(),
      chunk.runs.tobytes(),
      chunk.index.tobytes(),
      chunk.places,
      chunk.bad_rows,
    )
    for file, content in zip(self._files.values(), data, strict=True):
      file.write(content)


def _narrow(tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
  narrow = tokens.astype(dtype)
  if not np.array_equal(narrow, tokens):
    raise ValueError(
      f"tokenizer: got the token id {int(tokens.max())}; expected ids below "
      "its vocab_size. Its files do not belong together: copy them again."
    )
  return narrow


def _seal(
  folder: Path,
  sources: Sequence[Source],
  stats: DatasetStats,
  made_from: dict[str, Any],
  tokens: np.dtype,
) -> None:
  """Counts what was written and puts it under digests."""
  index = map_file(folder / "index.bin", INDEX)
  runs = map_file(folder / "runs.bin", RUN)
  count(index, runs, sources, stats).check()
  files = {file.name: digest(file) for file in sorted(folder.iterdir())}
  made = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode())
  made.update((files["tokens.bin"] + files["runs.bin"]).encode())
  made.update(index["length"].tobytes() + index["source"].tobytes())
  meta = {
    "files": files,
    "tokens": tokens.str,
    "fingerprint": made.hexdigest(),
    "fingerprint_inputs": made_from,
    "stats": stats.to_json(),
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


# -- Builds that live, and builds that died -----------------------------------


@contextlib.contextmanager
def _building(directory: Path) -> Iterator[Path]:
  """A folder to build in. It is gone, or locked while this process lives."""
  place = directory / f".building-{uuid.uuid4().hex}"
  with _lock(place).open("x") as file:
    # Another build may take the new file for a dead one's before it is locked,
    # and remove it: then this lock is never asked, and nothing is removed.
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
      place.mkdir()
      yield place
    finally:
      shutil.rmtree(place, ignore_errors=True)
      _lock(place).unlink(missing_ok=True)


def _lock(place: Path) -> Path:
  return place.with_suffix(".lock")


def _remove_dead(directory: Path) -> None:
  """Removes what killed builds have left: a lock ends with its process."""
  for path in directory.glob(".building-*.lock"):
    with contextlib.suppress(FileNotFoundError, BlockingIOError):
      with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        path.unlink(missing_ok=True)
