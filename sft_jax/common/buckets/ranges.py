"""Weights in a bucket, of which a machine fetches the bytes that it reads.

    gs://bucket/llama/model.safetensors
      -> .../llama/model.safetensors        of its size, with holes
         .../llama/model.safetensors.held   JSON: which object; then, a line
                                            each, 'first end' of what is here

Readers call `need` before they read. The object's generation is asked for with
every range where a store knows it (gs://), and compared at the end: a file is
of one object, or an error. A file that is whole is compared with the store's
digest; then it is a copy like any other, and its `.held` goes.
"""

import bisect
import contextlib
import functools
import json
import os
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
    pairs = (line.split() for line in lines)
    self._held = merged((int(x[0]), int(x[1])) for x in pairs if len(x) == 2)
    self._claimed: Spans = []  # What some thread is fetching.
    self._changed = threading.Condition()

  def need(self, spans: Spans) -> None:
    """Returns when the spans are here."""
    spans = merged((a, min(b, self._about["size"])) for a, b in spans)
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
    with self._path.open("r+b") as file:
      file.seek(start)
      file.write(data)
    # After the bytes: of a process that is killed they are there.
    # Where another process has found the file whole there is none.
    with contextlib.suppress(FileNotFoundError):
      journal = os.open(self._journal, os.O_WRONLY | os.O_APPEND)
      # A line that was cut ends before.
      os.write(journal, f"\n{start} {stop}\n".encode())
      os.close(journal)
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
    if self._held == [(0, about["size"])]:
      if not storage.is_copy(self._path, info):
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
    """The file goes first: without its journal it would be a whole one."""
    self._path.unlink(missing_ok=True)
    self._journal.unlink(missing_ok=True)
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

  What was fetched is trusted until the machine starts again, which may lose
  bytes of files whose names it has.
  """
  return storage.fetch(url, without=without, make=_make, key=_boot())


@functools.cache
def _boot() -> str:
  try:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  except OSError:  # Not Linux: nothing is trusted after this process.
    return uuid.uuid4().hex


def _make(url: str, path: Path, info: dict[str, Any]) -> None:
  if path.suffix != ".safetensors" or not info["size"]:
    storage.download(url, path, info)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  _journal(path).write_text(json.dumps(_about(url, info)) + "\n")
  with path.open("wb") as file:
    file.truncate(info["size"])


def is_partial(path: Path) -> bool:
  """Whether bytes of a file may be missing."""
  return _journal(path).exists()


def _open(path: Path) -> "_File | None":
  with _opening:
    if not is_partial(path):  # Whole, or none.
      _files.pop(path, None)
      return None
    now, old = _journal(path).stat(), _files.get(path)
    if (
      old is None
      or now.st_ino != old.read.st_ino
      or now.st_size < old.read.st_size
    ):
      _files[path] = old = _File(path)
    old.read = now
    return old


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
    file.need([(0, path.stat().st_size)])
    file.check()


def check(folder: Path) -> None:
  """That the files of a folder are of the objects that are there now.

  Raises OSError: one has changed since it was opened, or is no copy.
  """
  for journal in sorted(folder.glob("*" + ENDING)):
    if file := _open(journal.with_name(journal.name.removesuffix(ENDING))):
      file.check()
