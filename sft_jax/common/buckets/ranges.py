"""Weights in a bucket, of which a machine fetches the bytes that it reads.

    gs://bucket/llama/model.safetensors
      -> .../llama/model.safetensors        of its size, with holes
         .../llama/model.safetensors.held   JSON: which object, and which start
                                            of the machine; then, a line each,
                                            'first end' of what is here

Readers call `need` before they read. The object's generation is asked for with
every range where a store knows it (gs://), and compared at the end: a file is
of one object, or an error. A file that is whole is compared with the store's
digest; then it is a copy like any other, and its `.held` goes. Until then a
machine that starts again may have lost bytes of it: it is fetched again.
"""

import bisect
import contextlib
import functools
import json
import os
import platform
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from sft_jax.common.buckets import storage

Spans = list[tuple[int, int]]  # (first byte, end), in order and apart.

ENDING = ".held"
# Bytes of a request, and requests at a time of a process.
_REQUEST, _REQUESTS = 16 << 20, 16
# One request brings neighbors, too, if of 64 bytes at most one is not wanted.
_WASTE = 64
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_files: dict[Path, "_File"] = {}
_opening = threading.Lock()


def merged(spans: Iterable[tuple[int, int]]) -> Spans:
  """In order, without overlaps; neighbors are one.

  >>> merged([(4, 6), (0, 2), (2, 3), (5, 9)])
  [(0, 3), (4, 9)]
  """
  found: Spans = []
  for start, stop in sorted(spans):
    if found and start <= found[-1][1]:
      found[-1] = found[-1][0], max(stop, found[-1][1])
    elif start < stop:
      found.append((start, stop))
  return found


def without(spans: Spans, gone: Spans) -> Spans:
  """What is left of spans.

  >>> without([(0, 9)], [(2, 3), (5, 12)])
  [(0, 2), (3, 5)]
  """
  left, ends = [], [stop for _, stop in gone]
  for start, stop in spans:
    for first, end in gone[bisect.bisect_right(ends, start) :]:
      if first >= stop:
        break
      if start < first:
        left.append((start, first))
      start = max(start, end)
    if start < stop:
      left.append((start, stop))
  return left


def _requests(spans: Spans) -> Spans:
  """What to ask for: small gaps are fetched, and long spans in parts."""
  asked: Spans = []
  wanted = wasted = 0
  for start, stop in spans:
    wanted += stop - start
    gap = start - asked[-1][1] if asked else 0
    if asked and (wasted + gap) * _WASTE <= wanted:
      asked[-1] = asked[-1][0], stop
      wasted += gap
    else:
      asked.append((start, stop))
      wanted, wasted = stop - start, 0
  return [
    (at, min(at + _REQUEST, stop))
    for start, stop in asked
    for at in range(start, stop, _REQUEST)
  ]


@functools.cache
def _pool() -> ThreadPoolExecutor:
  return ThreadPoolExecutor(_REQUESTS, "ranges")


class _File:
  """A file with holes, for the threads of this process."""

  def __init__(self, path: Path):
    """Of what is here already, which another process may have fetched."""
    self._path, self._journal = path, _journal(path)
    self.read = self._journal.stat()  # It grows, while it is the same.
    about, *lines = self._journal.read_text().splitlines()
    self._about = json.loads(about)
    del self._about["boot"]
    self.size = self._about["size"]
    pairs = (line.split() for line in lines)
    self._held = merged((int(x[0]), int(x[1])) for x in pairs if len(x) == 2)
    self._claimed: Spans = []  # What some thread is fetching.
    self._changed = threading.Condition()

  def need(self, spans: Spans) -> None:
    """Returns when the spans are here."""
    spans = merged((a, min(b, self.size)) for a, b in spans)
    while True:
      with self._changed:
        left = without(spans, self._held)
        if not left:
          return
        mine = without(left, self._claimed)
        if not mine:
          self._changed.wait()
          continue
        self._claimed = merged([*self._claimed, *mine])
      try:
        tasks = [_pool().submit(self._fetch, *x) for x in _requests(mine)]
        wait(tasks)
        for task in tasks:
          task.result()
      finally:
        with self._changed:
          self._claimed = without(self._claimed, mine)
          self._changed.notify_all()

  def _fetch(self, start: int, stop: int) -> None:
    data = self._ask(start, stop)
    try:
      with self._path.open("r+b") as file:
        file.seek(start)
        file.write(data)
      # After the bytes: of a process that is killed they are there.
      # Where another process has found the file whole there is none.
      with contextlib.suppress(FileNotFoundError):
        journal = os.open(self._journal, os.O_WRONLY | os.O_APPEND)
        try:  # A line that was cut ends before.
          os.write(journal, f"\n{start} {stop}\n".encode())
        finally:
          os.close(journal)
    except FileNotFoundError:  # Another process has forgotten it.
      raise self._other() from None
    except OSError as error:  # Of a full disk it has no name.
      raise OSError(error.errno, error.strerror, str(self._path)) from error
    with self._changed:
      self._held = merged([*self._held, (start, stop)])

  def _ask(self, start: int, stop: int) -> bytes:
    url, generation = self._about["url"], self._about["generation"]
    fs, path = storage.client(url)
    pinned = {"generation": generation} if generation else {}
    data = b""
    for _ in range(storage.TRIES):
      try:
        with storage.explained(url, "read"):
          data = fs.cat_file(path, start=start, end=stop, **pinned)
      except FileNotFoundError:
        raise self._other() from None
      if len(data) == stop - start:
        return data
    raise OSError(
      f"{url}: got {len(data)} bytes from byte {start} on, expected "
      f"{stop - start}, after {storage.TRIES} tries. Is it being written?"
    )

  def check(self) -> None:
    """Compares the object with what it was; what is whole, with its digest."""
    about = self._about
    fs, path = storage.client(about["url"])
    try:
      with storage.explained(about["url"], "read"):
        info = fs.info(path)
    except FileNotFoundError:
      raise self._other() from None
    if _about(about["url"], info) != about:
      raise self._other()
    if self._held == [(0, self.size)]:
      try:
        whole = storage.is_copy(self._path, info)
        with self._path.open("r+b") as file:
          os.fsync(file.fileno())  # From now on no start is asked for.
      except FileNotFoundError:
        raise self._other() from None
      if not whole:
        self.forget()
        raise OSError(
          f"{about['url']}: came with other bytes than the store's digest "
          "says, expected a copy. Run the same command again."
        )
      self._journal.unlink(missing_ok=True)

  def _other(self) -> OSError:
    self.forget()
    return OSError(
      f"{self._about['url']}: has changed while it was read, expected one "
      "object from the beginning to the end. Nothing was kept: run the same "
      "command again when nobody writes there."
    )

  def forget(self) -> None:
    """The file goes first: without its journal it would be a whole one.

    What another process has made there meanwhile stays.
    """
    with storage.locked(self._path), contextlib.suppress(FileNotFoundError):
      if self._journal.stat().st_ino == self.read.st_ino:
        self._path.unlink(missing_ok=True)
        self._journal.unlink()
    _files.pop(self._path, None)


def _journal(path: Path) -> Path:
  return path.with_name(path.name + ENDING)


def _about(url: str, info: dict[str, Any]) -> dict[str, Any]:
  generation = str(info.get("generation", ""))
  stamp = storage.stamp(info)
  return {
    "url": url,
    "size": info["size"],
    "generation": generation,
    "stamp": stamp,
  }


def fetch(url: str, without: Sequence[str] = ()) -> Path:
  """`storage.fetch`, with holes in the place of weights.

  Machines that share a disk have a copy each: none trusts, or makes again, what
  another is fetching.
  """
  key = platform.node() if _BOOT_ID.exists() else _boot()
  return storage.fetch(url, without=without, make=_make, key=key)


@functools.cache
def _boot() -> str:
  """Since when bytes that were written are there: this start of the machine.

  It may lose bytes of files whose names it has. Where it has no name (not
  Linux), this process.
  """
  if _BOOT_ID.exists():
    return _BOOT_ID.read_text().strip()
  return uuid.uuid4().hex


def _make(url: str, path: Path, info: dict[str, Any]) -> None:
  if path.suffix != ".safetensors" or not info["size"]:
    storage.download(url, path, info)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  _empty(path, _about(url, info))


def _empty(path: Path, about: dict[str, Any]) -> None:
  """Makes a file of nothing but holes, its journal first and for good."""
  new = _journal(path).with_suffix(".new")
  with new.open("w") as journal:
    journal.write(json.dumps(about | {"boot": _boot()}) + "\n")
    journal.flush()
    os.fsync(journal.fileno())
  new.replace(_journal(path))
  with path.open("wb") as file:
    file.truncate(about["size"])


def _renew(path: Path) -> None:
  """Makes a file with holes again if it is of another start of the machine.

  Raises OSError: it is not in the cache, whose files alone are written and
  removed here.
  """
  home = storage.cache_folder().resolve() / "remote"
  if not path.resolve().is_relative_to(home):
    raise OSError(
      f"{_journal(path)}: says that bytes of {path.name} are missing, which is "
      "no file of the cache; expected a whole one. Copy the folder from where "
      "it came, or delete the file of this name if the weights are whole."
    )
  with storage.locked(path), _journal(path).open("rb") as journal:
    about = json.loads(journal.readline())
    if about.get("boot") != _boot():
      if path in _files:
        raise OSError(
          f"{path}: was made again by another machine while it was read; "
          "expected a cache of this machine alone. Set XDG_CACHE_HOME to a "
          "folder on its own disk."
        )
      _empty(path, about)


def is_partial(path: Path) -> bool:
  """Whether bytes of a file may be missing."""
  return _journal(path).exists()


def _open(path: Path) -> "_File | None":
  with _opening:
    try:
      now, old = _journal(path).stat(), _files.get(path)
      if (
        old is None
        or now.st_ino != old.read.st_ino
        or now.st_size < old.read.st_size
      ):
        _renew(path)
        _files[path] = old = _File(path)
      else:
        old.read = now
      return old
    except FileNotFoundError:  # Whole, maybe since now, or none.
      _files.pop(path, None)
      return None


def need(
  path: Path, spans: Iterable[tuple[int, int]] | Callable[[], Spans]
) -> None:
  """Makes sure that these bytes of a file are on this machine's disk.

  Files without holes have them: there spans that are to be made are not made.

  Raises OSError: the object has changed; see `storage.explained`.
  """
  if file := _open(path):
    file.need(merged(spans() if callable(spans) else spans))


def need_all(path: Path) -> None:
  """All of a file, compared with the store's digest."""
  if file := _open(path):
    file.need([(0, file.size)])
    file.check()


def check(folder: Path) -> None:
  """That the files of a folder are of the objects that are there now.

  Raises OSError: one has changed since it was opened, or is no copy.
  """
  for journal in sorted(folder.glob("*" + ENDING)):
    if file := _open(journal.with_name(journal.name.removesuffix(ENDING))):
      file.check()
