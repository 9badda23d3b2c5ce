"""Metrics: sums over a window of steps, divided once; one jsonl record."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

Pairs = Mapping[str, tuple[jax.Array, jax.Array]]


class Window:
  """(sum, weight) pairs of several steps, fetched from the device late.

  Adding does not wait for the device: the arrays are kept and fetched
  together by `take`. Every mean is a ratio of sums over the window, never a
  mean of ratios.
  """

  def __init__(self) -> None:
    self._steps: list[tuple[int, Pairs]] = []

  def add(self, step: int, pairs: Pairs) -> None:
    """Adds the metrics of one step."""
    self._steps.append((step, pairs))

  def take(self) -> dict[str, float]:
    """Returns {name: sum / weight} over the window, and empties it.

    `loss/trained_tokens` is the window's trained weight in all.

    Raises:
      FloatingPointError: a step's gradients were not finite; names the step.
    """
    fetched = jax.device_get(self._steps)
    self._steps = []
    sums: dict[str, list[float]] = {}
    for step, pairs in fetched:
      if pairs["optim/nonfinite"][0]:
        raise FloatingPointError(
          f"step {step}: the loss or its gradient is not finite; expected "
          "finite numbers. The step was not applied. Lower "
          "optim.learning_rate, or look at the rows of this step."
        )
      for name, (total, weight) in pairs.items():
        pair = sums.setdefault(name, [0.0, 0.0])
        pair[0] += float(total)
        pair[1] += float(weight)
    values = {
      name: total / weight if weight else 0.0
      for name, (total, weight) in sums.items()
      if name != "optim/nonfinite"
    }
    values["loss/trained_tokens"] = sums["loss/nats_per_token"][1]
    return values


class JsonlWriter:
  """metrics.jsonl: one object per record, `step` first; the run's record."""

  def __init__(self, path: Path, *, resume_step: int) -> None:
    """Opens the file, forgetting records after `resume_step`.

    Steps after the checkpoint are about to be taken again; keeping their
    first record would draw every curve twice. A last line cut short by a
    crash is dropped with them.
    """
    kept = []
    if path.exists():
      for line in path.read_text().splitlines():
        if not line.endswith("}"):
          continue
        if json.loads(line)["step"] <= resume_step:
          kept.append(line + "\n")
    path.write_text("".join(kept))
    self._file = path.open("a")

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends {"step": step, **values}; non-finite numbers become null."""
    clean = {
      key: None if isinstance(v, float) and not math.isfinite(v) else v
      for key, v in values.items()
    }
    self._file.write(json.dumps({"step": step, **clean}) + "\n")
    self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
  """All records of a metrics.jsonl."""
  return [json.loads(line) for line in path.read_text().splitlines()]
