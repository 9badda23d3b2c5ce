"""Scores: what a model makes of each row, in a file beside the rows.

    rows/a.jsonl                 the rows
    rows/a.jsonl.scores.jsonl    a line that says who scored, then one a row

A row is found again by its place and the hash of its content, so scores of
rows that have changed since are noticed, row by row.
"""

import array
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, UInt64

ENDING = ".scores.jsonl"
# See `evals.row_scores` for what they are.
SCORES = ("nats", "ifd", "alone", "tokens")
_VERSION = 1


class RowScore(NamedTuple):
  """The scores of one row.

  Attributes:
    place: 'rows.jsonl:12'.
    content: hash of the row, `chunks.content_of`.
    values: of each of `SCORES`; None where a row has no such score.
  """

  place: str
  content: int
  values: tuple[float | None, ...]


class Scores(NamedTuple):
  """A file of scores, as arrays; row i is the one whose place has hash i.

  Attributes:
    path: of the file.
    by: what its first line says of who scored.
    places: hashes of the rows' places, ascending.
    contents: hashes of the rows.
    values: of each of `SCORES`; NaN is none.
  """

  path: Path
  by: dict[str, Any]
  places: UInt64[np.ndarray, " rows"]
  contents: UInt64[np.ndarray, " rows"]
  values: Float64[np.ndarray, "rows scores"]

  def find(self, place: str) -> int | None:
    """The row of a place."""
    key = np.uint64(_hash(place))
    at = int(np.searchsorted(self.places, key))
    found = at < len(self.places) and self.places[at] == key
    return at if found else None


def path_of(file: str | Path, folder: str | Path = "") -> Path:
  """Where the scores of a file of rows are.

  Args:
    file: of the rows.
    folder: that holds scores; '' = beside the rows.
  """
  file = Path(file)
  return (Path(folder) if folder else file.parent) / (file.name + ENDING)


def is_scores(file: Path) -> bool:
  """Whether a file is the scores of another one beside it."""
  name = file.name.removesuffix(ENDING)
  return name != file.name and file.with_name(name).is_file()


def write(path: Path, by: dict[str, Any], rows: Iterable[RowScore]) -> None:
  """Writes a file of scores, whole or not at all.

  Args:
    path: see `path_of`.
    by: who scored: anything JSON can hold.
    rows: in the order of the file.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  try:
    with part.open("w", encoding="utf-8") as file:
      file.write(json.dumps({"scores": _VERSION, **by}) + "\n")
      for row in rows:
        line = {"place": row.place, "content": f"{row.content:016x}"}
        line |= dict(zip(SCORES, row.values, strict=True))
        file.write(json.dumps(line) + "\n")
      file.flush()
      os.fsync(file.fileno())
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)


def read(path: Path) -> Scores:
  """Reads a file of scores; memory holds some 56 bytes per row.

  Raises:
    ValueError: no such file, or one that `write` did not write, with the
      command that makes it.
  """
  places, contents, values = (array.array(code) for code in "QQd")
  number = 1
  try:
    with path.open(encoding="utf-8") as file:
      by = json.loads(next(file, "{}"))
      if by["scores"] != _VERSION:
        raise ValueError(f"version {by['scores']!r}")
      for text in file:
        number += 1
        line = json.loads(text)
        places.append(_hash(line["place"]))
        contents.append(int(line["content"], 16))
        values.extend(
          np.nan if line[name] is None else float(line[name]) for name in SCORES
        )
  except FileNotFoundError:
    raise ValueError(
      f"{path}: got no such file, expected the scores of its rows, which "
      f"data.filter or data.weight_by names. {CURE}"
    ) from None
  except (ValueError, KeyError, TypeError, OverflowError) as error:
    raise ValueError(
      f"{path}:{number}: got {error!r}, expected scores of version {_VERSION}. "
      f"{CURE}"
    ) from error
  hashes = np.array(places, np.uint64)
  order = np.argsort(hashes, kind="stable")
  if len(np.unique(hashes)) != len(hashes):
    raise ValueError(
      f"{path}: got a place twice, expected every row once. {CURE}"
    )
  return Scores(
    path,
    by,
    hashes[order],
    np.array(contents, np.uint64)[order],
    np.array(values, np.float64).reshape(-1, len(SCORES))[order],
  )


def look_up(
  files: Sequence[Scores], place: str, content: int
) -> tuple[Float64[np.ndarray, " scores"] | None, bool]:
  """The scores of a row, or None; and then whether it has changed since.

  Args:
    files: of which one may have it: those of one name in several folders have
      the same places.
    place: of the row.
    content: its hash.
  """
  hits = [(one, at) for one in files if (at := one.find(place)) is not None]
  for one, at in hits:
    if one.contents[at] == content:
      return one.values[at], False
  return None, bool(hits)


CURE = "Score the rows: python tools/score_data.py --config=..."


def _hash(place: str) -> int:
  made = hashlib.blake2b(place.encode(), digest_size=8).digest()
  return int.from_bytes(made, "little")
