"""What a config names as data: files beside files, canaries, rows in memory."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from sft_jax.common.buckets import remote_workdir, storage
from sft_jax.common.workdir import write_jsonl
from sft_jax.data.readers.files import slice_of
from sft_jax.data.sources import MemoryRows, Source, to_sources
from sft_jax.evals import memorization

# A ConfigDict of the keys in configs/base.py; its attributes have no static
# types.
Config = Any
Log = Callable[[str], None]
_MOST_FILES = 100  # Told apart in the ledger.
CANARIES = "canaries.jsonl"  # In the workdir.


def make_sources(
  value: Any, columns: Mapping[str, Any] | None = None
) -> tuple[Source, ...]:
  """What data.train or data.eval names; see `sources.to_sources`.

  `columns` are those of sources that have none of their own.
  """
  if isinstance(value, MemoryRows):
    value = Source(rows=value)
  many = isinstance(value, list | tuple)
  made = to_sources([_plain(x) for x in value] if many else _plain(value))
  return tuple(
    dataclasses.replace(one, columns=one.columns or columns or {})
    for one in made
  )


def _plain(value: Any) -> Any:
  nested = isinstance(value, ml_collections.ConfigDict)
  return value.to_dict() if nested else value


def train_sources(
  config: Config, rows: MemoryRows | None
) -> tuple[Source, ...]:
  """Those of data.train, with the filters that the config has for all, and
  the canaries."""
  value, columns = rows or config.data.train, config.data.columns.to_dict()

  c = config.data
  found = tuple(
    dataclasses.replace(
      one,
      filter=c.filter if one.filter is None else one.filter,
      weight_by=c.weight_by if one.weight_by is None else one.weight_by,
      limit=one.limit or c.limit or None,
    )
    for one in make_sources(value, columns)
  )
  return (*found, _canaries(config)) if c.canaries else found


def by_file(source: Source) -> list[Source]:
  """A glob as one source per file, so that the ledger tells them apart.

  Not where it is wanted as one (under a name, or to a share or limit), or
  where nobody could read so many.
  """
  one = source.name or source.share is not None or source.limit is not None
  if one or source.rows is not None or slice_of(source.path):
    return [source]
  files = source.files()
  if len(files) > _MOST_FILES:
    return [source]
  return [dataclasses.replace(source, path=str(file)) for file in files]


def beside(config: Config, name: str, log: Log) -> Any:
  """What `eval.<name>` names; 'auto' looks beside the training data."""
  value = _plain(config.eval[name])
  if value != "auto":
    return value or None
  first = make_sources(config.data.train)[0]
  path = Path(first.path).parent / f"{name}.jsonl"
  if storage.is_remote(first.path) and not first.path.startswith("hf://"):
    path = storage.join(first.path.rpartition("/")[0], f"{name}.jsonl")
    if storage.exists(path):
      return path
  elif first.path and path.is_file():
    return str(path)
  log(f"eval.{name}: none, as there is no {path if first.path else 'file'}")
  return None


def _canaries(config: Config) -> Source:
  """Writes the canaries of a run into its workdir, as rows to train on."""
  path = remote_workdir.folder(config.workdir) / CANARIES
  drawn = memorization.draw_canaries(config.data.canaries, config.seed)
  rows = [memorization.canary_row(one.box, one.code) for one in drawn]
  write_jsonl(path, rows)
  copies = config.data.canary_copies
  return Source(str(path), repeat=copies, format="messages", name="canaries")
