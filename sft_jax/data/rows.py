"""Rows from files: strict, streaming, and each with its place."""

import glob as glob_lib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from sft_jax.data.conversation import RowError

# A lone half of a surrogate pair can only come from an escape.
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


Rows = Iterator[tuple[str, dict[str, Any]]]
OnBadRow = Callable[[RowError], None]


def stop(error: RowError) -> None:
  """What to do about a bad row by default: raise it."""
  raise error


def read_rows(path: str | Path, *, on_bad_row: OnBadRow = stop) -> Rows:
  """Yields (place, row) of every row of the files that `path` names.

  Formats, by suffix: .jsonl (streamed), .json (one array), .parquet
  (streamed), .txt (the whole file is one row of raw text). A place is
  'rows.jsonl:12' (a line, from 1) or 'rows.json[3]' (an index, from 0).

  Args:
    path: a file, or a glob, whose files are read in sorted order.
    on_bad_row: called with the fault of a row that cannot be read; where it
      returns, reading goes on after that row.

  Raises:
    ValueError: no such file, or a suffix that is not known.
    RowError: bytes that are not UTF-8; text that is not JSON, with line and
      column; a key given twice; NaN or infinity; half a surrogate pair; a row
      that is not an object.
  """
  for file in find_files(path):
    yield from READERS[file.suffix](file, on_bad_row)


def loads(text: str, where: str) -> Any:
  """The value of a JSON text, read strictly; a fault is a RowError."""

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
      keys = [key for key, _ in pairs]
      twice = next(key for key in keys if keys.count(key) > 1)
      raise RowError(
        where,
        f"the key {twice!r} twice in one object",
        "each key once",
        "Keep one of the two values.",
      )
    return made

  def constant(name: str) -> Any:
    raise RowError(
      where, name, "a JSON number", "Replace it: JSON has no such value."
    )

  try:
    value = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    if _SURROGATE_ESCAPE.search(text):
      # Whole pairs became one character above; halves cannot be encoded.
      json.dumps(value, ensure_ascii=False).encode()
  except json.JSONDecodeError as error:
    line = f" line {error.lineno}" if "\n" in text else ""
    raise RowError(
      f"{where}{line} column {error.colno}",
      f"{error.msg.lower()} at {_near(text, error.pos)!r}",
      "valid JSON",
      "Mend or drop the row.",
    ) from None
  except UnicodeEncodeError as error:
    raise RowError(
      where,
      f"half a surrogate pair ({error.object[error.start]!r})",
      "whole characters",
      "Mend the escape or drop the row.",
    ) from None
  except RecursionError:
    raise RowError(
      where, "JSON nested too deep", "a few levels", "Drop the row."
    ) from None
  return value


def find_files(path: str | Path) -> list[Path]:
  """The files that a path or glob names, sorted; see `read_rows`."""
  path = str(path)
  if Path(path).is_file():
    found = [Path(path)]
  else:
    matches = sorted(glob_lib.glob(path, recursive=True))
    found = [Path(match) for match in matches if Path(match).is_file()]
  if not found:
    raise ValueError(
      f"{path}: got no such file; expected a file, or a glob that matches "
      "one. Check the path (a folder needs a glob: folder/*.jsonl)."
    )
  for file in found:
    if file.suffix not in READERS:
      raise ValueError(
        f"{file}: got suffix {file.suffix!r}; expected one of "
        f"{', '.join(READERS)}. Rename or convert the file."
      )
  return found


def _read_jsonl(file: Path, on_bad_row: OnBadRow) -> Rows:
  # Bytes, so that a line ends at \n alone and faults have a line number.
  with file.open("rb") as lines:
    for number, line in enumerate(lines, start=1):
      if line.strip():
        where = f"{file.name}:{number}"
        try:
          text = _decoded(line, where).removeprefix("\ufeff")
          row = _object(loads(text.rstrip(), where), where)
        except RowError as error:
          on_bad_row(error)
        else:
          yield where, row


def _read_json(file: Path, on_bad_row: OnBadRow) -> Rows:
  text = _decoded(file.read_bytes(), file.name).removeprefix("\ufeff")
  array = loads(text, file.name)
  if not isinstance(array, list):
    raise RowError(
      file.name,
      f"a JSON {type(array).__name__}",
      "an array of objects",
      "Wrap the rows in an array (one row per line goes in a .jsonl file).",
    )
  for index, row in enumerate(array):
    where = f"{file.name}[{index}]"
    try:
      made = _object(row, where)
    except RowError as error:
      on_bad_row(error)
    else:
      yield where, made


def _read_parquet(file: Path, on_bad_row: OnBadRow) -> Rows:
  del on_bad_row  # The file's schema makes every row an object.
  with pyarrow.parquet.ParquetFile(file) as table:
    index = 0
    for batch in table.iter_batches():
      for row in batch.to_pylist():
        yield f"{file.name}[{index}]", row
        index += 1


def _read_txt(file: Path, on_bad_row: OnBadRow) -> Rows:
  try:
    text = _decoded(file.read_bytes(), file.name)
  except RowError as error:
    on_bad_row(error)
  else:
    yield file.name, {"text": text}


READERS = {
  ".jsonl": _read_jsonl,
  ".json": _read_json,
  ".parquet": _read_parquet,
  ".txt": _read_txt,
}


def _decoded(data: bytes, where: str) -> str:
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    raise RowError(
      f"{where} byte {error.start}",
      f"the byte 0x{data[error.start]:02x}, which is not UTF-8",
      "UTF-8",
      "Convert the file, or mend or drop the row.",
    ) from None


def _object(row: Any, where: str) -> dict[str, Any]:
  if not isinstance(row, dict):
    raise RowError(
      where,
      f"a JSON {type(row).__name__}",
      "an object",
      "Give every row as {...}.",
    )
  return row


def _near(text: str, position: int) -> str:
  return text[max(0, position - 10) : position + 20]
