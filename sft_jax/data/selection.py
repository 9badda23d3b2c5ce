"""Selection: rows are dropped, or weighted, by their scores and columns.

A row that a condition drops is a drop in the ledger, with the condition as
its reason; so is one whose weight is 0. Weights of a source are scaled to a
mean of 1 over its trained tokens, so that weighting moves a source's loss
between its rows and never between sources.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from sft_jax.data import conditions, scores
from sft_jax.data.conditions import Condition, Weighting
from sft_jax.data.conversation import RowError
from sft_jax.data.readers import files as rows
from sft_jax.data.sources import Source
from sft_jax.data.store import shards
from sft_jax.data.store.files import digest
from sft_jax.data.store.store import Store


def select(
  store: Store,
  *,
  folder: str = "",
  seed: int = 0,
  announce: Callable[[str], None] = print,
) -> Store:
  """The rows that the sources' filters keep, with the weights they have.

  Args:
    store: rows to train on; its sources say what to select, see
      `sources.Source`.
    folder: that holds the scores; '' = beside the rows.
    seed: drew the rows of sources with a limit; see `cache.build`.
    announce: told in a line each what rows were weighted by.

  Returns:
    A store of other fingerprint, in whose causes are the conditions and the
    digests of the scores; the same one where no source selects.

  Raises:
    ValueError: a row without a score, or whose score is of what it was before
      it changed; a column that a row lacks or that cannot be compared; a
      source of which nothing is left.
  """
  weights = np.ones(len(store.index), np.float32)
  reasons: dict[str, np.ndarray] = {}
  causes: dict[str, dict[str, Any]] = {}
  for number, source in enumerate(store.sources):
    filters, weighting = source.conditions, source.weighting
    examples = np.flatnonzero(store.source == number)
    if not len(examples) or not (filters or weighting):
      continue
    # A row's examples follow each other; the row is the first of them.
    first = np.diff(store.index["row"][examples], prepend=-1) > 0
    of_row = np.cumsum(first) - 1
    table = _Table(store, source, examples[first], folder, seed)
    reason, weight = _judge(table, filters, weighting)
    for why in dict.fromkeys(filter(None, reason)):
      mask = reasons.setdefault(why, np.zeros(len(weights), bool))
      mask[examples] = (reason == why)[of_row]
    if weighting:
      kept = (reason == "")[of_row]
      weights[examples] = _scaled(weight[of_row], store.trained[examples], kept)
      if kept.any():
        spread = weights[examples][kept]
        announce(
          f"data: rows of {source.label} weigh {spread.min():.3g} to "
          f"{spread.max():.3g} by {weighting.name}"
        )
    if not (reason == "").any():
      raise ValueError(
        f"data source {source.label}: got no row that data.filter and "
        f"data.weight_by keep of {len(reason):,}, expected at least one. Relax "
        f"{', '.join(dict.fromkeys(reason))}."
      )
    causes[f"source {number + 1}"] = {
      "filter": json.loads(json.dumps(filters)),
      "weight_by": json.loads(json.dumps(weighting)),
      **table.digests,
    }
  if not causes:
    return store
  return store.select(reasons, weights, causes)


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
    if name.startswith(conditions.ROW):
      return self._own(name.removeprefix(conditions.ROW), chosen)
    if self._scores is None:
      self._scores = self._read()
    found = self._scores[:, scores.SCORES.index(name)].tolist()
    for i in np.flatnonzero(chosen).tolist():
      if np.isnan(found[i]):
        raise ValueError(
          f"{self.places[i]}: got no {name} of this row, expected a number; "
          "raw text and answers without a prompt have none. Give its source a "
          "filter and a weight_by of its own: {'path': ..., 'filter': (), "
          "'weight_by': ()}."
        )
    return [x if keep else None for x, keep in zip(found, chosen, strict=True)]

  def _read(self) -> Float64[np.ndarray, "rows scores"]:
    """Scores of the rows, from the files beside theirs."""
    files = []
    for number, file in enumerate(rows.find_files(self._source.path), 1):
      path = scores.path_of(file, self._folder)
      files.append(scores.read(path))
      self.digests[f"scores {number} ({path.name})"] = digest(path)
    made = np.empty((len(self), len(scores.SCORES)))
    for i, place in enumerate(self.places):
      values, changed = scores.look_up(files, place, int(self._contents[i]))
      if values is None:
        got = (
          "scores of what it was before it changed" if changed else "no score"
        )
        names = ", ".join(str(one.path) for one in files)
        raise ValueError(
          f"{place}: got {got} in {names}, expected those of the row as it is. "
          f"{scores.CURE}"
        )
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
      row = item[1]
      if shards.content_of(row) != self._contents[at]:
        continue
      if chosen[at] and row.get(name) is None:
        raise ValueError(
          f"{item[0]}: got nothing under {name!r}, which data.filter or "
          f"data.weight_by names; expected a value in every row. Mend the row, "
          "or give its source a filter of its own."
        )
      found.append(row[name] if chosen[at] else None)
    if len(found) < len(self):
      raise ValueError(
        f"{self.places[len(found)]}: got another row than was encoded, "
        "expected files that do not change while they are read. Run the same "
        "command again."
      )
    return found


def _judge(
  table: _Table, filters: tuple[Condition, ...], weighting: Weighting | None
) -> tuple[np.ndarray, Float64[np.ndarray, " rows"]]:
  """Of each row why it is dropped, or '', and its weight before scaling."""
  reason = np.full(len(table), "", object)
  weight = np.ones(len(table))
  for condition in filters:
    kept = reason == ""
    values = table.column(condition.name, kept)
    which = np.flatnonzero(kept)
    if condition.op in conditions.SHARES:
      _check_numbers(values, which, table, condition.name)
      order = np.argsort([values[i] for i in which], kind="stable")
      if condition.op == "highest":
        order = order[::-1]
      dropped = which[order[max(1, round(condition.value * len(which))) :]]
    else:
      dropped = [
        i for i in which if not condition.holds(values[i], table.places[i])
      ]
    reason[dropped] = f"fails {condition}"
  if weighting:
    kept = reason == ""
    values = table.column(weighting.name, kept)
    which = np.flatnonzero(kept)
    _check_numbers(values, which, table, weighting.name)
    chosen = np.array([values[i] for i in which], np.float64)
    if weighting.points:
      chosen = np.interp(chosen, *np.transpose(weighting.points))
    if (chosen < 0).any():
      worst = int(which[chosen.argmin()])
      raise ValueError(
        f"{table.places[worst]}: got a weight of {chosen.min():g} by "
        f"{weighting.name}, expected 0 or more. Mend the row, or declare "
        "points: (name, (value, weight), (value, weight))."
      )
    weight[which] = chosen
    reason[which[chosen == 0]] = f"weight 0 by {weighting.name}"
  return reason, weight


def _check_numbers(
  values: list[Any], which: np.ndarray, table: _Table, name: str
) -> None:
  for i in which.tolist():
    value = values[i]
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise ValueError(
        f"{table.places[i]}: got {value!r} under {name}, expected a number. "
        "Mend the row, or choose another name."
      )


def _scaled(
  weight: Float64[np.ndarray, " examples"],
  trained: np.ndarray,
  kept: Bool[np.ndarray, " examples"],
) -> Float64[np.ndarray, " examples"]:
  """Weights whose mean over the trained tokens that are kept is 1."""
  total = (weight * trained)[kept].sum()
  return weight * (trained[kept].sum() / total) if total else weight
