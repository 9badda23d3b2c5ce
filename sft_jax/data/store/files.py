"""The files of a store: their formats, and digests that show damage.

    tokens.bin   ids      all examples' tokens, back to back
    runs.bin     RUN      their weights and roles, as runs of equal ones
    index.bin    INDEX    where each example is and what it came from
    places.txt   utf-8    'rows.jsonl:12', for each row
    bad_rows.jsonl        malformed rows that were skipped, and why
    meta.json             digests of the above, fingerprint inputs, stats

Ids take two bytes where the vocabulary allows it, and an example has a few
runs: three or five bytes per token in all, for examples of 100 tokens.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.data.store.workers import num_cores

INDEX = np.dtype(
  [
    ("start", "<i8"),  # first token, in tokens.bin
    ("run", "<i8"),  # first run, in runs.bin
    ("row", "<i8"),  # which of all rows read; a split row has several
    ("content", "<u8"),  # hash of the row: duplicates have the same
    ("place", "<i8"),  # first byte, in places.txt
    ("place_length", "<i4"),  # bytes
    ("length", "<i4"),  # tokens
    ("runs", "<i4"),  # number of runs
    ("trained", "<i4"),  # tokens with a weight above zero
    ("last_trained", "<i4"),  # position of the last of these
    ("source", "<i4"),  # position in the list of sources
    ("rejected", "<i4"),  # tokens at the end that are the worse answer's
    ("text", "?"),  # raw text, not a conversation
    ("may_run_on", "?"),  # raw or truncated: need not end in a stop token
  ]
)
# Neighboring tokens of one example of one weight and one role, which is an
# index of `token_roles.TOKEN_ROLES`.
RUN = np.dtype([("length", "<i4"), ("weight", "<f4"), ("role", "u1")])
FILES = ("tokens.bin", "runs.bin", "index.bin", "places.txt")
_BLOCK = 1 << 24  # bytes digested together


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
  """Writes meta.json with a digest of itself, down to the disk."""
  text = json.dumps(meta, sort_keys=True)
  with (folder / "meta.json").open("w") as file:
    json.dump({"meta": meta, "digest": hash_text(text)}, file, indent=1)
    file.flush()
    os.fsync(file.fileno())


def read_meta(folder: Path) -> dict[str, Any]:
  """What `write_meta` wrote; a ValueError if it is not that."""
  sealed = json.loads((folder / "meta.json").read_text())
  if hash_text(json.dumps(sealed["meta"], sort_keys=True)) != sealed["digest"]:
    raise ValueError("meta.json differs from its digest")
  return sealed["meta"]


class Digests:
  """Digests of files that are about to be read, and whether they still hold."""

  def __init__(self):
    self._known: dict[Path, tuple[Any, str]] = {}

  def of(self, path: Path) -> str:
    """The digest of a file as it is now, which is remembered."""
    if path not in self._known:
      self._known[path] = _state(path), digest(path)
    return self._known[path][1]

  def check(self, paths: Iterable[Path]) -> None:
    """Raises a ValueError unless what was read since is what was digested.

    `paths` would be read now. A file that was changed and changed back has
    another time of change.
    """
    now, what = dict.fromkeys(paths), None
    for path in dict.fromkeys([*self._known, *now]):
      state, before = self._known.get(path, (None, ""))
      if path not in now:
        what = "is gone"
      elif not before:
        what = "is new"
      elif _state(path) != state or digest(path) != before:
        what = "has changed"
      if what:
        raise ValueError(
          f"{path}: {what} while its rows were read; expected files that stay "
          "as they are until they are encoded. Nothing was kept: run the same "
          "command again when nobody writes to it."
        )


def _state(path: Path) -> tuple[int, ...]:
  """Which file it is, its size, and when it was last changed."""
  of = path.stat()
  return (of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns)


def digest(path: Path) -> str:
  """SHA-256 over the SHA-256 of each block of a file, on all cores."""
  with path.open("rb") as file:
    number, size = file.fileno(), os.fstat(file.fileno()).st_size

    def block(at: int) -> bytes:
      return hashlib.sha256(os.pread(number, _BLOCK, at)).digest()

    starts = range(0, size, _BLOCK)
    if len(starts) < 2:
      return hashlib.sha256(block(0)).hexdigest()
    # Hashing and reading release the interpreter's lock.
    with concurrent.futures.ThreadPoolExecutor(num_cores()) as threads:
      return hashlib.sha256(b"".join(threads.map(block, starts))).hexdigest()


def map_file(path: Path, dtype: np.dtype) -> np.ndarray:
  """A file as an array that is read from the disk when it is looked at."""
  # An empty file cannot be mapped.
  if not path.stat().st_size:
    return np.empty(0, dtype)
  # As a plain array: slices of a memmap object cost more than what is read.
  return np.asarray(np.memmap(path, dtype, mode="r"))


def hash_text(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()
