"""Rows from files: which files a path names, and which reader reads each."""

import glob as glob_lib
import re
from collections.abc import Collection
from pathlib import Path

from sft_jax.common import hub
from sft_jax.data.conversation import RowError
from sft_jax.data.readers import arrow, json
from sft_jax.data.readers.json import OnBadRow, Rows

# What the scores of a file of rows are called, see `selection`.
SCORES_ENDING = ".scores.jsonl"
_TEXT = {
  ".jsonl": json.read_jsonl,
  ".json": json.read_json,
  ".txt": json.read_txt,
}
# By the end of a file's name.
READERS = {
  **{
    ending + compression: read
    for ending, read in _TEXT.items()
    for compression in ("", *json.COMPRESSIONS)
  },
  ".parquet": arrow.read_parquet,
  ".arrow": arrow.read_arrow,
}
# On the hub: tables about the data, and the numbers of shards.
_NO_ROWS = re.compile(r"(dataset_infos?|dataset_dict|state)\.json")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


def stop(error: RowError) -> None:
  """What to do about a bad row by default: raise it."""
  raise error


def read_rows(path: str | Path, *, on_bad_row: OnBadRow = stop) -> Rows:
  """Yields (place, row) of every row of the files that `path` names.

  Formats, by suffix: .jsonl (an object on each line), .json (an array of
  objects, or JSON lines), .txt (the whole file is one row of raw text), each
  also as .gz, .bz2, .xz or .zst; .parquet; .arrow. A place is 'rows.jsonl:12'
  (a line, from 1) or 'rows.json[3]' (an index, from 0).

  Args:
    path: see `find_files`.
    on_bad_row: called once with the fault of each row that cannot be read;
      where it returns, reading continues after that row.

  Raises:
    ValueError: no such file, or a suffix that is not known.
    RowError: a file that is damaged or breaks off, whatever `on_bad_row` does.
      By default also: bytes that are not UTF-8; text that is not JSON, with
      line and column; a key given twice; NaN or infinity; half a surrogate
      pair; more than 100 levels; a row that is not an object, or is longer
      than 16 MiB.
  """
  for file in find_files(path):
    yield from READERS[_ending(file)](file, on_bad_row)


def find_files(path: str | Path) -> list[Path]:
  """The files that a path names, sorted, each of which can be read alone.

  'rows.jsonl' is a file, 'rows/*.parquet' a glob ('**' for any folders), and
  'saved' a folder of `datasets.save_to_disk`, of which 'saved#train' is one
  split. What is none of these and reads 'org/name' (or 'hf://org/name') is a
  data set of the Hugging Face hub. A glob leaves out the scores of other
  files: they are no rows.

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
    found = [file for file in files if not _is_scores(file)]
    local = _ending(Path(path)) or glob_lib.has_magic(path)
    if not found and not local and _is_hub_path(path):
      found = _find_on_hub(path, [one for one in READERS if one != ".txt"])
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


def _is_scores(file: Path) -> bool:
  """Whether a file is the scores of another one beside it."""
  name = file.name.removesuffix(SCORES_ENDING)
  return name != file.name and file.with_name(name).is_file()


def _is_hub_path(path: str) -> bool:
  """Whether a path that is not here may be the hub's.

  >>> [_is_hub_path(p) for p in ('hf://o/n', 'org/name@v1#train', 'a.json')]
  [True, True, False]
  """
  return path.startswith("hf://") or hub.is_id(path.partition("#")[0])


def _find_on_hub(path: str, endings: Collection[str]) -> list[Path]:
  """Fetches 'org/name', 'org/name@revision' or 'hf://org/name', as files.

  'org/name#main/train' is the files whose path has the part main/train between
  slashes, dots and dashes. All files found must be shards of one split.

  Args:
    path: see above.
    endings: of the names of files that can be read.

  Raises:
    ValueError: see `hub.fetch`; no such part, or several and none chosen.
  """
  name, _, part = path.removeprefix("hf://").partition("#")
  name = name.removeprefix("datasets/")
  patterns = [f"*{part}*{ending}" for ending in endings]
  folder = hub.fetch(name, kind="dataset", patterns=patterns).folder
  wanted = re.compile(rf"(^|[/.-]){re.escape(part)}([/.-]|$)")
  found = {
    file: str(file.relative_to(folder))
    for file in sorted(folder.rglob("*"))
    if file.name.endswith(tuple(endings)) and not _NO_ROWS.fullmatch(file.name)
  }
  chosen = [file for file, inner in found.items() if wanted.search(inner)]
  choices = {_SHARD.sub("", found[file]) for file in chosen}
  if len(choices) != 1:
    listed = sorted(choices or {_SHARD.sub("", one) for one in found.values()})
    raise ValueError(
      f"{path}: got {len(choices)} sets of files, of "
      f"{', '.join(listed[:20]) or 'none'}; expected one, of one split. Append "
      f"a part of its name, as in {name}#train."
    )
  return chosen
