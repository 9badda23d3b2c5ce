"""Summary of scores: how they spread, and the rows at the ends."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64

from sft_jax.data import selection
from sft_jax.data.audit import row_texts
from sft_jax.data.sources import Source
from sft_jax.data.store import shards
from sft_jax.data.store.store import Store

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)

# What is shown of a row: its place, prompt and answer.
Shown = Mapping[str, str]


def make(
  values: Float64[np.ndarray, "rows scores"],
  read: Callable[[Collection[int]], Mapping[int, Shown]],
  *,
  most: int,
) -> dict[str, Any]:
  """Figures of the scores of rows; NaN is none, and `most` are of each end.

  `read` gives rows by number, and is asked once for all that are shown.

  Returns rows: how many; spread: {score: {rows that have it, p0, p5, ...}};
  ends: [{name, rows: [{place, prompt, answer, score: value, ...}]}].
  """
  spread = {}
  for name, column in zip(selection.SCORES, values.T, strict=False):
    known = column[~np.isnan(column)]
    if len(known):
      found = np.percentile(known, PERCENTILES).tolist()
      of_name = {f"p{p}": x for p, x in zip(PERCENTILES, found, strict=True)}
      spread[name] = {"rows": len(known), **of_name}
  column = lambda name: values[:, selection.SCORES.index(name)]
  nats, ifd = (np.argsort(column(x), kind="stable") for x in ("nats", "ifd"))
  by_ifd = column("ifd")[ifd]
  ifd = ifd[~np.isnan(by_ifd)]
  above = int((by_ifd > 1).sum())  # NaN is not above.
  misled = f"IFD above 1: the prompt misleads ({above:,} rows)"
  ends = {
    "Hardest, by nats per token": nats[::-1][:most],
    "Easiest, by nats per token": nats[:most],
    misled: ifd[::-1][: min(above, most)],
    "Lowest IFD: the prompt says the answer": ifd[:most],
  }
  said = read({i for which in ends.values() for i in which.tolist()})

  def row(i: int) -> dict[str, Any]:
    known = zip(selection.SCORES, values[i].tolist(), strict=False)
    return {**said[i], **{name: x for name, x in known if not np.isnan(x)}}

  shown = {name: [*map(row, which.tolist())] for name, which in ends.items()}
  made = [{"name": name, "rows": rows} for name, rows in shown.items()]
  return {"rows": len(values), "spread": spread, "ends": made}


def of_store(
  store: Store,
  show: Callable[[row_texts.Row], Shown],
  *,
  folder: str,
  format: str,
  seed: int,
  most: int,
) -> dict[str, Any] | None:
  """Figures of a store's rows, of those that have scores; None of no file.

  `show` says what is shown of a row; see `selection.select` of the folder.

  Returns what `make` does, with the rows that are left out: unscored, without a
  score, and changed, with a score of what they were before.

  Raises ValueError: a file of scores that cannot be read.
  """
  files: list[list[selection.Scores]] = []
  for source in store.sources:  # Of its files, as far as there are any.
    paths = [selection.scores_path(file, folder) for file in source.files()]
    files.append([selection.read_scores(x) for x in paths if x.is_file()])
  if not any(files):
    return None
  found, keys = [], []
  left = {"unscored": 0, "changed": 0}
  # A row's examples follow each other; the row is the first of them.
  for i in np.flatnonzero(np.diff(store.index["row"], prepend=-1)).tolist():
    place, number = store.place(i), int(store.source[i])
    content = int(store.index["content"][i])
    values, changed = selection.look_up(files[number], place, content)
    if values is None:
      left["changed" if changed else "unscored"] += 1
    else:
      found.append(values)
      keys.append((number, place, content))

  def read(wanted: Collection[int]) -> dict[int, Shown]:
    said = {}
    for number in {keys[i][0] for i in wanted}:
      some = {keys[i][1:] for i in wanted if keys[i][0] == number}
      source = store.sources[number]
      for key, row in read_rows(source, some, format=format, seed=seed).items():
        said[(number, *key)] = show(row)
    return {i: said[keys[i]] for i in wanted}

  values = np.array(found, np.float64).reshape(-1, len(selection.SCORES))
  return {**make(values, read, most=most), **left}


def read_rows(
  source: Source,
  wanted: Collection[tuple[str, int]],
  *,
  format: str,
  seed: int = 0,
) -> dict[tuple[str, int], row_texts.Row]:
  """What some rows of a source say, by their place and the hash of each."""
  said = {}
  places = {place for place, _ in wanted}
  for item in shards.read_again(source, seed=seed):
    if not isinstance(item, tuple) or item[0] not in places:
      continue
    place, row = item
    # Files of one name in several folders have the same places.
    if (key := (place, shards.content_of(row))) in wanted:
      conversation = source.to_conversation(row, place, format)
      said[key] = row_texts.of_conversation(conversation, place)
  return said
