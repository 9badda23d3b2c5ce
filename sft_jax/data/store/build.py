"""Builds a store: rows encoded once, on disk under the hash of what made them.

The key of a store is the bytes of its files, the tokenizer with its template,
all options, and the code that encodes. A store is written beside its place and
renamed into it, whole or not at all. What a killed build leaves, the next one
removes. Of several runs that need one store, one builds and the others wait.

    directory/KEY/                       a store
    directory/.building-KEY.lock         locked while KEY is built
    directory/.building-KEY.XXXX/        what will be KEY
"""

import atexit
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from sft_jax.common.workdir import sync_folder
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.sources import Source, Sources, to_sources
from sft_jax.data.store import files, fingerprint, shards, workers
from sft_jax.data.store.stats import DatasetStats
from sft_jax.data.store.store import Store, count, open_store
from sft_jax.data.tokenizers.tokenizer import Tokenizer

try:
  import fcntl
except ImportError:  # Windows: whoever needs a store builds it.
  fcntl = None

Log = Callable[[str], None]

# Chunks encoded in this process before others are started: of so few rows
# they would spend most of their time on starting.
_ALONE = 8
# Seconds without progress after which another run's build is not waited for.
_PATIENCE = 600.0
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
  log: Log = print,
) -> Store:
  """Encodes every row of the sources, or opens what was encoded before.

  Memory does not grow with the data. The store has the same bytes whatever
  the number of workers. Where the directory cannot be written or read, the
  store is made in a temporary folder that ends with this process.

  Args:
    sources: see `sources.to_sources`. How often their rows are seen, and how
      much these weigh, belongs to the stream and not to the key.
    options: see `encode.encode_row`.
    directory: holds one folder per store.
    max_length: tokens of the longest example.
    format: of rows whose source names none; see `formats.to_conversation`.
    on_bad_row: 'error' stops at the first malformed row; 'skip' counts it and
      writes its place and fault to bad_rows.jsonl.
    seed: draws the rows of sources with a limit.
    num_workers: processes that encode; 0 is one per core, 1 only this one.

  Raises:
    RowError: a malformed row, the first whatever the workers.
    ValueError: a file that is not there, or that changes while it is read.
    OSError: a full disk; `workers.WorkerDied`, of a worker that was killed.
  """
  if on_bad_row not in ("error", "skip"):
    raise ValueError(
      f"data.on_bad_row: got {on_bad_row!r}; expected 'error' or 'skip'. Set "
      "it to one of these."
    )
  parts, digests = to_sources(sources), files.Digests()
  inputs: dict[str, Any] = {
    f"source {number}": fingerprint.of_source(source, format, seed, digests)
    for number, source in enumerate(parts, 1)
  }
  inputs |= {
    "tokenizer": fingerprint.of_tokenizer(tokenizer),
    "data.on_bad_row": on_bad_row,
    "data.seq_len": max_length,
    "options": options.to_json(),
  }
  key = json.dumps([inputs, fingerprint.code_version()], sort_keys=True)
  name = files.hash_text(key)[:32]
  recipe = shards.Recipe(
    tokenizer, options, max_length, format, skip_bad_rows=on_bad_row == "skip"
  )

  def check() -> None:
    """Whether the files are those whose digests are in the key."""
    digests.check(file for one in parts for file in one.files())

  def write(place: Path) -> None:
    log(f"data: encoding {', '.join(s.label for s in parts)}")
    read = [shards.read(i, source, seed=seed) for i, source in enumerate(parts)]
    jobs = itertools.chain.from_iterable(read)
    processes = num_workers or workers.num_cores()
    with _Writer(place, tokenizer.vocab_size, parts) as writer:
      try:
        with contextlib.closing(_encode(recipe, jobs, processes)) as encoded:
          for chunk in encoded:
            writer.append(chunk)
      except (ValueError, OSError):
        check()  # Half of a file may be a malformed row.
        raise
    check()
    _seal(place, parts, writer.stats, inputs, writer.tokens)

  try:
    return _open_or_build(Path(directory), name, parts, write, log)
  except _NoAccess as why:
    private = Path(tempfile.mkdtemp(prefix="sft_jax-data-"))
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    log(
      f"data: the cache {directory} cannot be used ({why}): the rows are "
      f"encoded into {private}, for this run alone. Change data.cache_dir."
    )
    return _open_or_build(private, name, parts, write, log)


class _NoAccess(Exception):
  """The cache cannot be written, or not be read."""


def _open_or_build(
  directory: Path,
  name: str,
  sources: Sequence[Source],
  write: Callable[[Path], None],
  log: Log,
) -> Store:
  """The store `name` of a directory, which is written first if need be."""
  folder = directory / name
  try:
    if store := _open(folder, sources, log):
      return store
    directory.mkdir(parents=True, exist_ok=True)
    _remove_dead(directory)
    with _turn(directory, name, log):
      # Another run may have made it while this one waited.
      if store := _open(folder, sources, log):
        return store
      place = directory / f".building-{name}.{uuid.uuid4().hex}"
      place.mkdir()
      try:
        write(place)
        sync_folder(place)
        try:
          place.rename(folder)
        except OSError:  # Another process was first.
          if not folder.exists():
            raise
        sync_folder(directory)
      finally:
        shutil.rmtree(place, ignore_errors=True)
    store = open_store(folder, sources)
  except OSError as error:
    if error.errno in _FULL:
      raise OSError(
        f"cache {directory}: {error.strerror} while rows were encoded; "
        "expected room for 5 bytes per token and 150 per row. Nothing was "
        "kept: make room, or name a folder elsewhere in data.cache_dir."
      ) from error
    where = Path(error.filename or ".")
    ours = {directory, *directory.parents}
    ours = where in ours or directory in where.parents
    if error.errno in _NO_ACCESS and ours:
      raise _NoAccess(error) from error
    if ours and not directory.is_dir():
      raise OSError(
        f"cache {directory}: cannot be made ({error.strerror}); expected a "
        "folder. Name one in data.cache_dir."
      ) from error
    raise
  if bad := store.stats.dropped("malformed"):
    where = folder / "bad_rows.jsonl"
    log(f"data: {bad:,} malformed rows skipped; see {where}")
  return store


def _open(folder: Path, sources: Sequence[Source], log: Log) -> Store | None:
  """The store of a folder; one that is damaged is removed."""
  if not folder.exists():
    return None
  try:
    store = open_store(folder, sources)
  except ValueError as damage:
    log(f"{damage} Making it again now.")
    try:
      shutil.rmtree(folder)
    except OSError as error:
      raise _NoAccess(error) from damage
    return None
  log(f"data: {len(store.index):,} examples from cache {folder}")
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
    self.tokens = np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")
    self._sources = sources
    names = (*files.FILES, "bad_rows.jsonl")
    self._files = {name: (folder / name).open("wb") for name in names}
    # What the next chunk's counts begin from.
    self._begin = {"start": 0, "run": 0, "row": 0, "place": 0}

  def __enter__(self) -> "_Writer":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
    with contextlib.ExitStack() as stack:
      for file in self._files.values():
        stack.callback(file.close)  # Also of a file that cannot be flushed.
      for file in self._files.values() if kind is None else ():
        file.flush()
        os.fsync(file.fileno())

  def append(self, chunk: shards.Encoded) -> None:
    """Writes a chunk; raises its fault."""
    if chunk.fault:
      raise chunk.fault
    tokens = chunk.tokens.astype(self.tokens)
    if not np.array_equal(tokens, chunk.tokens):
      raise ValueError(
        f"tokenizer: got the token id {int(chunk.tokens.max())}; expected ids "
        "below its vocab_size. Its files do not belong together: copy them "
        "again."
      )
    self.stats.source(self._sources[chunk.number].label).add(chunk.stats)
    for name, begin in self._begin.items():
      chunk.index[name] += begin
    self._begin["start"] += len(chunk.tokens)
    self._begin["run"] += len(chunk.runs)
    self._begin["row"] += chunk.stats.rows_trained
    self._begin["place"] += len(chunk.places)
    arrays = (tokens, chunk.runs, chunk.index)
    data = (*(x.tobytes() for x in arrays), chunk.places, chunk.bad_rows)
    for file, content in zip(self._files.values(), data, strict=True):
      file.write(content)


def _seal(
  folder: Path,
  sources: Sequence[Source],
  stats: DatasetStats,
  inputs: dict[str, Any],
  tokens: np.dtype,
) -> None:
  """Counts what was written and puts it under digests."""
  index = files.map_file(folder / "index.bin", files.INDEX)
  runs = files.map_file(folder / "runs.bin", files.RUN)
  count(index, runs, sources, stats).check()
  names = sorted(folder.iterdir())
  digests = {file.name: files.digest(file) for file in names}
  made = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
  made.update((digests["tokens.bin"] + digests["runs.bin"]).encode())
  made.update(index["length"].tobytes() + index["source"].tobytes())
  meta = {"files": digests, "tokens": tokens.str, "stats": stats.to_json()}
  made_of = {"fingerprint": made.hexdigest(), "fingerprint_inputs": inputs}
  files.write_meta(folder, meta | made_of)


@contextlib.contextmanager
def _turn(directory: Path, name: str, log: Log) -> Iterator[None]:
  """Holds the lock of a store; waits while another run builds it."""
  lock = directory / f".building-{name}.lock"
  while True:
    with contextlib.suppress(FileExistsError):  # Of a run that may live.
      lock.open("x").close()
    try:
      file = lock.open("rb")  # Another user's can be read, and locked.
    except FileNotFoundError:
      continue
    with file:
      mine = _wait(file, directory, name, log)
      if mine and not _is(file, lock):  # The run before has removed it.
        continue
      if mine:
        _remove(directory, name)
      try:
        yield
      finally:
        if mine:
          with contextlib.suppress(OSError):
            lock.unlink()
      return


def _wait(file: IO[bytes], directory: Path, name: str, log: Log) -> bool:
  """Locks a file; False where locks are unknown or its owner stands still."""
  size, since, said = -1, 0.0, False
  while (locked := _try_lock(file)) is False:
    if not said:
      log(f"data: waiting for another run that encodes into {directory}")
      said = True
    written = directory.glob(f".building-{name}.*/*")
    now = sum(file.stat().st_size for file in written)
    if now != size:
      size, since = now, time.monotonic()
    elif time.monotonic() - since > _PATIENCE:
      log(
        f"data: the other run has made no progress for {_PATIENCE:g} s: the "
        "rows are encoded here as well"
      )
      return False
    time.sleep(0.2)
  return bool(locked)


def _try_lock(file: IO[bytes]) -> bool | None:
  """Whether a lock was free; None where the file system has no locks."""
  if fcntl is None:
    return None
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:
    return None
  return True


def _is(file: IO[bytes], path: Path) -> bool:
  try:
    return os.path.samefile(file.fileno(), path)
  except OSError:
    return False


def _remove(directory: Path, name: str) -> None:
  for place in directory.glob(f".building-{name}.*/"):
    shutil.rmtree(place, ignore_errors=True)


def _remove_dead(directory: Path) -> None:
  """Removes what killed builds of this user have left: locks end with them."""
  for lock in directory.glob(".building-*.lock"):
    with contextlib.suppress(OSError), lock.open("rb") as file:
      if _try_lock(file) and _is(file, lock):
        _remove(directory, lock.stem.removeprefix(".building-"))
        lock.unlink()
