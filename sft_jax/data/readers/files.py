"""Rows from files: which files a path names, and which reader reads each."""

import glob as glob_lib
import itertools
import os
import re
from pathlib import Path

from sft_jax.common import hub
from sft_jax.common.buckets import storage
from sft_jax.data.conversation import RowError, printable_name
from sft_jax.data.readers import arrow, json
from sft_jax.data.readers.json import OnBadRow, Rows

# What the scores of a file of rows are called, see `selection`.
SCORES_ENDING = ".scores.jsonl"
_TEXT = {
  ".jsonl": json.read_jsonl,
  ".ndjson": json.read_jsonl,
  ".jsonlines": json.read_jsonl,
  ".json": json.read_json,
  ".csv": json.read_csv,
  ".tsv": json.read_tsv,
  ".txt": json.read_txt,
}
# By the end of a file's name.
READERS = {
  ending + packed: read
  for ending, read in _TEXT.items()
  for packed in ("", *json.COMPRESSIONS)
} | {".parquet": arrow.read_parquet, ".arrow": arrow.read_arrow}
# In folders: tables about the data and caches, and the numbers of shards.
_NO_ROWS = re.compile(
  r"(dataset_infos?|dataset_dict|state)\.json|cache-.*\.arrow"
)
_SHARD = re.compile(r"-\d{5}-of-(\d{5})")
_END = r"(-?\d+|-?\d+(?:\.\d+)?%)?"
_SLICE = re.compile(rf"(.+)\[{_END}:{_END}\]")


def stop(error: RowError) -> None:
  """What to do about a bad row by default: raise it."""
  raise error


def read_rows(path: str | Path, *, on_bad_row: OnBadRow = stop) -> Rows:
  """Yields (place, row) of every row of the files that `path` names.

  Formats, by suffix in any case: .jsonl or .ndjson (an object on each line),
  .json (an array of objects, or JSON lines), .csv and .tsv, .txt (the whole
  file is one row of raw text), each also as .gz, .bz2, .xz or .zst; .parquet;
  .arrow. A place is 'rows.jsonl:12' (a line, from 1) or 'rows.json[3]' (an
  index, from 0).

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
  files = find_files(path)

  def rows(bad: OnBadRow) -> Rows:
    for file in files:
      yield from READERS[_ending(file)](file, bad)

  first = last = None
  if cut := slice_of(path):
    total = 0
    if "%" in cut or "-" in cut:
      total = sum(1 for _ in rows(lambda error: None))
    of = lambda x: float(x[:-1]) * total / 100 if x.endswith("%") else int(x)
    ends = [round(of(end)) if end else None for end in cut[1:-1].split(":")]
    first, last = (x and max(x + total * (x < 0), 0) for x in ends)
  yield from itertools.islice(rows(on_bad_row), first, last)


def slice_of(path: str | Path) -> str:
  """The rows that a path asks for, '[:10%]'; '' = all.

  >>> [slice_of(p) for p in ("a.jsonl[:10%]", "org/name#train[100:]", "b[v2]")]
  ['[:10%]', '[100:]', '']
  """
  match = _SLICE.fullmatch(str(path))
  if match is None or Path(path).exists():
    return ""
  return str(path)[len(match[1]) :]


def find_files(path: str | Path) -> list[Path]:
  """The files that a path names, sorted, each of which can be read alone.

      rows.jsonl, ~/rows.csv.gz        a file
      rows/*.parquet, rows/**/*.json   a glob; a file that it finds twice, by
                                       links, is one
      folder, folder#train             the files of one split in a folder, also
                                       of `datasets.save_to_disk`
      org/name, hf://org/name@v1#test  a data set of the Hugging Face hub
      gs://bucket/rows, s3://...       any of the first four in a bucket
      ...[:10%]                        of any of them, the first tenth

  Of a folder or a hub id, '#main/train' is the files whose path has the part
  main/train between slashes, dots and dashes. All files found must be shards
  of one split; where no part is named and there are several, that is train.
  The scores of other files are no rows.

  Raises ValueError: no such file or split, several and none chosen, or a suffix
  that is not known; see `hub.fetch`.
  """
  named = os.path.expanduser(path)
  named = named.removesuffix(slice_of(named))
  name, _, part = named.partition("#")
  if Path(named).exists():
    name, part = named, ""
  if storage.is_remote(name) and not name.startswith("hf://"):
    found = _remote(name, part, named)
  elif Path(name).is_file():
    found = [Path(name)]
  elif Path(name).is_dir():
    found = _one_split(Path(name), part, named)
  elif found := _glob(named):
    pass
  elif _is_hub_path(named) and not _ending(Path(named)):
    name = name.removeprefix("hf://").removeprefix("datasets/")
    endings = [one for one in READERS if one != ".txt"]
    patterns = [f"*{part}*{ending}" for ending in endings]
    folder = hub.fetch(name, kind="dataset", patterns=patterns).folder
    found = _one_split(folder, part, named)
  if not found:
    raise ValueError(
      f"{printable_name(str(path))}: got no such file; expected a file, a "
      "folder, or a glob that matches a file. Check the path."
    )
  for file in found:
    if not _ending(file):
      raise ValueError(
        f"{printable_name(str(file))}: got suffix {file.suffix!r}; expected "
        f"one of {', '.join(_TEXT)}, each alone or with one of "
        f"{', '.join(json.COMPRESSIONS)}; or .parquet or .arrow. Rename or "
        "convert the file."
      )
    if file.name.lower().endswith(".json"):
      json.check_array(file)  # Before it is digested, for minutes perhaps.
  return found


def _remote(name: str, part: str, path: str) -> list[Path]:
  """Verified copies of the objects that an address names."""
  if glob_lib.has_magic(name):
    copies = storage.fetch(name)
    found = sorted(file for file in copies.rglob("*") if file.is_file())
    return [file for file in found if not _is_scores(file)]
  try:
    # Some stores take a name without an ending for an object, too.
    endings = [f"*{one}" for one in READERS]
    copy = storage.fetch(name, ["*"] if _ending(Path(name)) else endings)
  except FileNotFoundError:
    return []
  return [copy] if copy.is_file() else _one_split(copy, part, path)


def _glob(pattern: str) -> list[Path]:
  """The files of a glob; folders that exist are named, whatever they hold."""
  fixed = Path()
  for part in Path(pattern).parts:
    if not (fixed / part).exists():
      break
    fixed /= part
  rest, start = Path(pattern).relative_to(fixed), glob_lib.escape(str(fixed))
  matches = glob_lib.glob(f"{start}/{rest}", recursive=True)
  # A link that leads to its own folder gives every file again.
  files = {os.path.realpath(x): Path(x) for x in sorted(matches, reverse=True)}
  found = sorted(file for file in files.values() if file.is_file())
  return [file for file in found if not _is_scores(file)]


def _ending(file: Path) -> str:
  """The key of `READERS` that a file's name ends with; '' if none."""
  name = file.name.lower()
  return next((one for one in READERS if name.endswith(one)), "")


def _is_scores(file: Path) -> bool:
  """Whether a file is the scores, or the coverage, of another beside it."""
  name = file.name.removesuffix(SCORES_ENDING).removesuffix(".coverage")
  return name != file.name and file.with_name(name).is_file()


def _is_hub_path(path: str) -> bool:
  """Whether a path that is not here may be the hub's.

  >>> [_is_hub_path(p) for p in ('hf://o/n', 'org/name@v1#train', 'a.json')]
  [True, True, False]
  """
  return path.startswith("hf://") or hub.is_id(path.partition("#")[0])


def _one_split(folder: Path, part: str, path: str) -> list[Path]:
  """The files of a folder whose path has a part; see `find_files`."""
  found = {
    file: str(file.relative_to(folder))
    for file in sorted(folder.rglob("*"))
    if _ending(file) and not _NO_ROWS.fullmatch(file.name)
    if not _is_scores(file)
    # As of git, notebooks and downloads.
    if not any(x.startswith(".") for x in file.relative_to(folder).parts)
  }

  def with_part(part: str) -> tuple[list[Path], list[str]]:
    chosen: list[Path] = []
    for ends in ("/.-", "/._-"):  # train, or else train_sft.
      wanted = rf"(^|[{ends}]){re.escape(part)}([{ends}]|$)" if part else ""
      chosen = chosen or [
        file
        for file, inner in found.items()
        if re.search(wanted, inner, re.IGNORECASE)
      ]
    return chosen, sorted({_SHARD.sub("", found[file]) for file in chosen})

  chosen, sets = with_part(part)
  if len(sets) > 1 and not part and len(with_part("train")[1]) == 1:
    chosen, sets = with_part("train")
  if len(sets) != 1:
    listed = list(map(printable_name, (sets or with_part("")[1])[:20]))
    part = Path(listed[-1]).name.partition(".")[0] if listed else "train"
    raise ValueError(
      f"{printable_name(path)}: got {len(sets)} sets of files, of "
      f"{', '.join(listed) or 'none'}; expected one, of one split. Append "
      "a part of its name, as in "
      f"{printable_name(path).partition('#')[0]}#{part}, or write a glob."
    )
  shard = _SHARD.search(found[chosen[0]])
  if shard and len(chosen) != (wanted := int(shard[1])):
    raise ValueError(
      f"{printable_name(path)}: got {len(chosen)} files of "
      f"{printable_name(sets[0])}, expected {wanted} as their names say. "
      "Fetch the others, or write a glob."
    )
  return chosen
