"""Metrics: sums over a window of steps, divided once; one jsonl record.

`step/train_step` makes the sums; docs/metrics.md defines every name, and says
which file computes it. What a progress line shows is in `terminal.figures`.
"""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sft_jax.common import workdir

Pairs = Mapping[str, tuple[jax.Array, jax.Array]]

# Sums of a window that a record holds besides the means: (of which pair, and
# whether its sum, 0, or its weight, 1).
_TOTALS = {
  "loss/trained_weight": ("loss/nats_per_token", 1),
  "data/tokens": ("data/trained_fraction", 1),
  "data/trained_tokens": ("data/trained_fraction", 0),
}


class Window:
  """(sum, weight) pairs of several steps, fetched from the device by `take`; a
  mean is a ratio of sums over the window, never a mean of ratios."""

  def __init__(self) -> None:
    self._steps: list[Pairs] = []

  def add(self, pairs: Pairs) -> None:
    self._steps.append(pairs)

  def take(self) -> dict[str, float]:
    """Returns {name: sum / weight} over the window, and empties it.

    With `loss/perplexity`, and the sums of `_TOTALS`. Of a window without a
    step the loss is NaN. What had no weight in any step, such as the loss on a
    source without a token, is left out; of the loss itself 0 stands there.
    """
    fetched = jax.device_get(self._steps)
    self._steps = []
    if not fetched:
      loss = {"loss/nats_per_token": math.nan, "loss/perplexity": math.nan}
      return loss | dict.fromkeys(_TOTALS, 0.0)
    sums: dict[str, list[float]] = {}
    for pairs in fetched:
      for name, (total, weight) in pairs.items():
        pair = sums.setdefault(name, [0.0, 0.0])
        pair[0] += float(total)
        pair[1] += float(weight)
    values = {
      name: total / weight
      for name, (total, weight) in sums.items()
      if weight and name not in ("optim/nonfinite", "optim/spike")
    }
    nats = values.setdefault("loss/nats_per_token", 0.0)
    values["loss/perplexity"] = math.exp(nats) if nats < 700 else math.inf
    for name, (pair, side) in _TOTALS.items():
      if pair in sums:
        values[name] = sums[pair][side]
    return values


class JsonlWriter:
  """metrics.jsonl: one object per record, `step` first; the run's record.

  `kept` are records of before that stand, `forgotten` those of steps that are
  about to be taken again, which would draw every curve twice.
  """

  def __init__(self, path: Path, *, resume_step: int) -> None:
    """Opens the file, forgetting records after `resume_step`."""
    self._file = None
    self.kept: list[dict[str, Any]] = []
    self.forgotten: list[dict[str, Any]] = []
    if jax.process_index():  # The first process writes for all.
      return
    for record in read_jsonl(path) if path.exists() else ():
      stands = record["step"] <= resume_step
      (self.kept if stands else self.forgotten).append(record)
    text = "".join(json.dumps(record) + "\n" for record in self.kept)
    workdir.write_text(path, text)  # It is the run's only record.
    self._file = path.open("a")

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends {"step": step, **values}, and the time of day as "time/at".

    Non-finite numbers become null.
    """
    if self._file is None:
      return
    lost = lambda x: isinstance(x, float) and not math.isfinite(x)
    clean = {key: None if lost(x) else x for key, x in values.items()}
    line = {"step": step, **clean, "time/at": workdir.wall_clock()}
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()

  def close(self) -> None:
    if self._file is not None:
      self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
  """All records of a metrics.jsonl but a last one that a crash cut short."""
  found = []
  for line in path.read_text(errors="replace").splitlines():
    with contextlib.suppress(ValueError):
      found.append(json.loads(line))
  return found
