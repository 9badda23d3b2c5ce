"""Selection: rows are dropped, or weighted, by their scores and columns.

Scores are what a model makes of each row, in a file beside the rows:

    rows/a.jsonl                 the rows
    rows/a.jsonl.scores.jsonl    a line that says who scored, then one a row

A row is found by its place and the hash of its content, so that changed rows
are noticed. What a condition drops is in the ledger with the condition as its
reason; so is what has weight 0. Weights of a source are scaled to a mean of 1
over its trained tokens: they move loss between its rows, never between sources.
"""

import array
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt64

from sft_jax.common import workdir
from sft_jax.data.conversation import WEIGHTS, Conversation, RowError, is_weight
from sft_jax.data.readers.files import SCORES_ENDING
from sft_jax.data.sources import (
  ROW,
  SCORES,
  SHARES,
  Condition,
  Source,
  Weighting,
  is_number,
  to_filter,
  to_weighting,
)
from sft_jax.data.store import shards
from sft_jax.data.store.files import digest
from sft_jax.data.store.store import Store

_VERSION = 1  # Of the files of scores.
CURE = "Score the rows: sft-jax score --config=..."


def select(
  store: Store,
  *,
  folder: str = "",
  seed: int = 0,
  log: Callable[[str], None] = print,
) -> Store:
  """The rows that the sources' filters keep, with the weights they have.

  `folder` holds the scores ('': beside the rows); `seed` drew the rows of
  sources with a limit.

  Returns a store of other fingerprint, whose inputs hold the conditions and the
  digests of the scores; the same one where no source selects.

  Raises ValueError: a row without a score of what it is now; a column that it
  lacks or that cannot be compared; a source of which nothing is left.
  """
  weights = np.ones(len(store.index), np.float32)
  reasons: dict[str, np.ndarray] = {}
  inputs: dict[str, dict[str, Any]] = {}
  for number, source in enumerate(store.sources):
    filters = to_filter(source.filter or ())
    weighting = to_weighting(source.weight_by)
    examples = np.flatnonzero(store.source == number)
    if not len(examples) or not (filters or weighting):
      continue
    # A row's examples follow each other; the row is the first of them.
    first = np.diff(store.index["row"][examples], prepend=-1) > 0
    of_row = np.cumsum(first) - 1
    table = _Table(store, source, examples[first], folder, seed)
    reason, weight = _weigh(table, filters, weighting)
    for why in dict.fromkeys(filter(None, reason)):
      mask = reasons.setdefault(why, np.zeros(len(weights), bool))
      mask[examples] = (reason == why)[of_row]
    if weighting:
      kept, trained = (reason == "")[of_row], store.trained[examples]
      # To a mean of 1 over the trained tokens that are kept.
      total = (weight[of_row] * trained)[kept].sum()
      scale = trained[kept].sum() / total if total else 1.0
      weights[examples] = weight[of_row] * scale
      spread = weights[examples][kept]
      if not all(map(is_weight, spread.tolist())):
        raise ValueError(
          f"data source {source.label}: got weights so far apart that, with a "
          f"mean of 1, they are {spread.min():g} to {spread.max():g}; expected "
          f"each to be {WEIGHTS}. Correct data.weight_by."
        )
      if kept.any():
        log(
          f"data: rows of {source.label} weigh {spread.min():.3g} to "
          f"{spread.max():.3g} by {weighting.name}"
        )
    if not (reason == "").any():
      raise ValueError(
        f"data source {source.label}: got no row that data.filter and "
        f"data.weight_by keep of {len(reason):,}, expected at least one. Relax "
        f"{', '.join(dict.fromkeys(reason))}."
      )
    named = {"filter": filters, "weight_by": weighting}
    plain = json.loads(json.dumps(named))
    inputs[f"source {number + 1}"] = plain | table.digests
  if not inputs:
    return store
  return store.select(reasons, weights, inputs)


class _Table:
  """Scores and columns of some rows of one source, read when asked for."""

  def __init__(
    self,
    store: Store,
    source: Source,
    examples: Int64[np.ndarray, " rows"],
    folder: str,
    seed: int,
  ):
    self.places = [store.place(int(i)) for i in examples]
    self.digests: dict[str, str] = {}
    self._contents = store.index["content"][examples]
    self._source, self._folder, self._seed = source, folder, seed
    self._scores: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.places)

  def column(self, name: str, chosen: Bool[np.ndarray, " rows"]) -> list[Any]:
    """What is under a name, of the chosen rows; None of the others."""
    if name.startswith(ROW):
      return self._own(name.removeprefix(ROW), chosen)
    if self._scores is None:
      self._scores = self._read()
    found = self._scores[:, SCORES.index(name)].tolist()
    for i in np.flatnonzero(chosen).tolist():
      if np.isnan(found[i]):
        raise ValueError(
          f"{self.places[i]}: got no {name} of this row, expected a number; "
          "sft-jax select gives the rank, and raw text and answers without a "
          "prompt have none of the others. Give its source a filter and a "
          "weight_by of its own: {'path': ..., 'filter': (), 'weight_by': ()}."
        )
    return [x if keep else None for x, keep in zip(found, chosen, strict=True)]

  def _read(self) -> Float64[np.ndarray, "rows scores"]:
    """Scores of the rows, from the files beside theirs."""
    files = []
    for number, file in enumerate(self._source.files(), 1):
      path = scores_path(file, self._folder)
      files.append(read_scores(path))
      self.digests[f"scores {number} ({path.name})"] = digest(path)
    made = np.empty((len(self), len(SCORES)))
    for i, place in enumerate(self.places):
      values, changed = look_up(files, place, int(self._contents[i]))
      if values is None:
        got = (
          "scores of what it was before it changed" if changed else "no score"
        )
        names = ", ".join(str(one.path) for one in files)
        expected = "expected those of the row as it is"
        raise ValueError(f"{place}: got {got} in {names}, {expected}. {CURE}")
      made[i] = values
    return made

  def _own(self, name: str, chosen: Bool[np.ndarray, " rows"]) -> list[Any]:
    """What the rows have under a name; they are read again, in their order."""
    found: list[Any] = []
    for item in shards.read_again(self._source, seed=self._seed):
      at = len(found)
      if at == len(self):
        break
      if isinstance(item, RowError) or item[0] != self.places[at]:
        continue  # Was dropped when it was encoded, or is held out.
      if shards.content_of(item[1]) != self._contents[at]:
        continue
      row = {} if isinstance(item[1], Conversation) else item[1]
      if chosen[at] and row.get(name) is None:
        raise ValueError(
          f"{item[0]}: got nothing under {name!r}, which data.filter or "
          f"data.weight_by names; expected a value in every row. Correct the "
          "row, or give its source a filter of its own."
        )
      found.append(row[name] if chosen[at] else None)
    if len(found) < len(self):
      raise ValueError(
        f"{self.places[len(found)]}: got another row than was encoded, "
        "expected files that do not change while they are read. Run the same "
        "command again."
      )
    return found


def _weigh(
  table: _Table, filters: tuple[Condition, ...], weighting: Weighting | None
) -> tuple[np.ndarray, Float64[np.ndarray, " rows"]]:
  """Of each row why it is dropped, or '', and its weight before scaling."""
  reason = np.full(len(table), "", object)
  weight = np.ones(len(table))
  for condition in filters:
    which = np.flatnonzero(reason == "")
    if condition.op in SHARES:
      order = np.argsort(_numbers(table, which, condition.name), kind="stable")
      if condition.op == "highest":
        order = order[::-1]
      dropped = which[order[max(1, round(condition.value * len(which))) :]]
    else:
      values = table.column(condition.name, reason == "")
      pairs = ((i, values[i], table.places[i]) for i in which)
      dropped = [i for i, x, at in pairs if not condition.holds(x, at)]
    reason[dropped] = f"fails {condition}"
  if weighting:
    which = np.flatnonzero(reason == "")
    chosen = _numbers(table, which, weighting.name)
    if weighting.points:
      chosen = np.interp(chosen, *np.transpose(weighting.points))
    for i, value in zip(which.tolist(), chosen.tolist(), strict=True):
      if not is_weight(value):
        raise ValueError(
          f"{table.places[i]}: got a weight of {value:g} by {weighting.name}, "
          f"expected {WEIGHTS}. Correct the row, or declare points: (name, "
          "(value, weight), (value, weight))."
        )
    weight[which] = chosen
    reason[which[chosen == 0]] = f"weight 0 by {weighting.name}"
  return reason, weight


def _numbers(
  table: _Table, which: Int64[np.ndarray, " some"], name: str
) -> Float64[np.ndarray, " some"]:
  """What some rows have under a name; raises where it is no number."""
  values = table.column(name, np.isin(np.arange(len(table)), which))
  for i in which.tolist():
    if not is_number(values[i]):
      raise ValueError(
        f"{table.places[i]}: got {values[i]!r} under {name}, expected a finite "
        "number. Correct the row, or choose another name."
      )
  return np.array([values[i] for i in which], np.float64)


class RowScore(NamedTuple):
  place: str  # 'rows.jsonl:12'.
  content: int  # Hash of the row, `shards.content_of`.
  # Of each of `SCORES`, or of the first; None where a row has no such score.
  values: tuple[float | None, ...]
  reason: str = ""  # Why sft-jax select kept or left it; for people.


class Scores(NamedTuple):
  """A file of scores, as arrays; row i is the one whose place has hash i."""

  path: Path  # Of the file.
  by: dict[str, Any]  # What its first line says of who scored.
  places: UInt64[np.ndarray, " rows"]  # Hashes of the rows' places, ascending.
  contents: UInt64[np.ndarray, " rows"]  # Hashes of the rows.
  # Of each of `SCORES`; NaN is none.
  values: Float64[np.ndarray, "rows scores"]

  def find(self, place: str) -> int | None:
    key = np.uint64(_hash(place))
    at = int(np.searchsorted(self.places, key))
    found = at < len(self.places) and self.places[at] == key
    return at if found else None


def scores_path(file: str | Path, folder: str | Path = "") -> Path:
  """Where the scores of a file of rows are; '': beside it."""
  file = Path(file)
  return (Path(folder) if folder else file.parent) / (file.name + SCORES_ENDING)


def write_scores(
  path: Path, by: dict[str, Any], rows: Iterable[RowScore]
) -> None:
  """Writes a file of scores of rows in their order, whole or not at all.

  `by` says who scored: anything JSON can hold.
  """
  lines = [{"scores": _VERSION, **by}]
  for row in rows:
    line = {"place": row.place, "content": f"{row.content:016x}"}
    line |= dict(zip(SCORES, row.values, strict=False))
    lines.append(line | ({"reason": row.reason} if row.reason else {}))
  workdir.write_text(path, "".join(json.dumps(one) + "\n" for one in lines))


def read_scores(path: Path) -> Scores:
  """Reads a file of scores; memory holds some 56 bytes per row.

  Raises ValueError: no such file, or one that `write_scores` did not write,
  with the command that makes it.
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
          np.nan if (x := line.get(name)) is None else float(x)
          for name in SCORES
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
  hashes, contents = np.array(places, np.uint64), np.array(contents, np.uint64)
  order = np.argsort(hashes, kind="stable")
  if len(np.unique(hashes)) != len(hashes):
    expected = "expected every row once"
    raise ValueError(f"{path}: got a place twice, {expected}. {CURE}")
  by_row = np.array(values, np.float64).reshape(-1, len(SCORES))
  return Scores(path, by, hashes[order], contents[order], by_row[order])


def look_up(
  files: Sequence[Scores], place: str, content: int
) -> tuple[Float64[np.ndarray, " scores"] | None, bool]:
  """The scores of a row, or None; and then whether it has changed since.

  Files of one name in several folders have the same places: one may have it.
  """
  hits = [(one, at) for one in files if (at := one.find(place)) is not None]
  for one, at in hits:
    if one.contents[at] == content:
      return one.values[at], False
  return None, bool(hits)


def _hash(place: str) -> int:
  made = hashlib.blake2b(place.encode(), digest_size=8).digest()
  return int.from_bytes(made, "little")
