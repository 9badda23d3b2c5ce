"""Rows from files: strict, streaming, and each with its place."""

import glob as glob_lib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sft_jax.data import scores
from sft_jax.data.conversation import RowError
from sft_jax.data.readers import arrow, hub_files, json

Rows = Iterator[tuple[str, dict[str, Any]]]
OnBadRow = Callable[[RowError], None]

_TEXT = {
  ".jsonl": json.read_jsonl,
  ".json": json.read_json,
  ".txt": json.read_txt,
}
# By the end of a file's name.
READERS = {
  **{
    ending + packing: read
    for ending, read in _TEXT.items()
    for packing in ("", *json.PACKINGS)
  },
  ".parquet": arrow.read_parquet,
  ".arrow": arrow.read_arrow,
}


def stop(error: RowError) -> None:
  """What to do about a bad row by default: raise it."""
  raise error


def read_rows(path: str | Path, *, on_bad_row: OnBadRow = stop) -> Rows:
  """Yields (place, row) of every row of the files that `path` names.

  Formats, by suffix: .jsonl (an object on each line), .json (an array of
  objects, or JSON lines), .txt (the whole file is one row of raw text), each
  also as .gz or .zst; .parquet; .arrow. All are streamed. A place is
  'rows.jsonl:12' (a line, from 1) or 'rows.json[3]' (an index, from 0).

  Args:
    path: see `find_files`.
    on_bad_row: called once with the fault of each row that cannot be read;
      where it returns, reading goes on after that row.

  Raises:
    ValueError: no such file, or a suffix that is not known.
    RowError: a file that is damaged or breaks off, whatever `on_bad_row` does.
      By default also: bytes that are not UTF-8; text that is not JSON, with
      line and column; a key given twice; NaN or infinity; half a surrogate
      pair; more than 100 levels; a row that is not an object, or is longer
      than 16 MiB.
  """
  for file in find_files(path):
    read = READERS[_ending(file)]
    yield from read(file, on_bad_row)


def find_files(path: str | Path) -> list[Path]:
  """The files that a path names, sorted, each of which can be read alone.

  'rows.jsonl' is a file, 'rows/*.parquet' a glob ('**' for any folders), and
  'saved' a folder of `datasets.save_to_disk`, of which 'saved#train' is one
  split. What is none of these and reads 'org/name' (or 'hf://org/name') is a
  data set of the Hugging Face hub; see `hub_files.find`. A glob leaves out
  the scores of other files (`scores.is_scores`): they are no rows.

  Raises:
    ValueError: no such file or split, or a suffix that is not known.
  """
  path = str(path)
  name, _, split = path.partition("#")
  if Path(path).is_file():
    found = [Path(path)]
  elif Path(path).is_dir():
    found = arrow.saved_files(Path(path))
  elif split and Path(name).is_dir():
    found = arrow.saved_files(Path(name), split)
  else:
    matches = sorted(glob_lib.glob(path, recursive=True))
    files = [Path(match) for match in matches if Path(match).is_file()]
    found = [file for file in files if not scores.is_scores(file)]
    local = _ending(Path(path)) or glob_lib.has_magic(path)
    if not found and not local and hub_files.is_hub_path(path):
      found = hub_files.find(path, [one for one in READERS if one != ".txt"])
  if not found:
    raise ValueError(
      f"{path}: got no such file; expected a file, a folder that datasets "
      "saved, or a glob that matches a file. Check the path."
    )
  for file in found:
    if not _ending(file):
      raise ValueError(
        f"{file}: got suffix {file.suffix!r}; expected one of "
        f"{', '.join(READERS)}. Rename or convert the file."
      )
  return found


def _ending(file: Path) -> str:
  """The key of `READERS` that a file's name ends with; '' if none."""
  return next((one for one in READERS if file.name.endswith(one)), "")
