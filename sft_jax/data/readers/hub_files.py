"""The data files of a data set on the Hugging Face hub.

A repository holds splits, configurations and copies in several formats. Which
of them are meant is told by a part of their names, or is not in question.
"""

import re
from collections.abc import Collection
from pathlib import Path

from sft_jax.common import hub

# Tables about the data.
_NO_ROWS = re.compile(r"(dataset_infos?|dataset_dict|state)\.json")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


def is_hub_path(path: str) -> bool:
  """Whether a path that is not here may be the hub's.

  >>> [is_hub_path(p) for p in ('hf://org/name', 'org/name@v1#train', 'a.json')]
  [True, True, False]
  """
  return path.startswith("hf://") or hub.is_id(path.partition("#")[0])


def find(path: str, endings: Collection[str]) -> list[Path]:
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
