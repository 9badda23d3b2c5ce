"""What the sides of the step's benchmark are given, and how they are paced."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import bench_step  # noqa: E402  # tools/ is no package.
import bench_step_sides as sides  # noqa: E402

ROWS = [
  {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
  {"input_ids": [8, 9], "labels": [-100, 9]},
  {"input_ids": [4], "labels": [-100]},
]
SETTINGS = {"seq_len": 4, "batch_size": 2, "gate": 1, "warm_up": 1}


def test_rows_are_filled_up_in_order():
  ((ids, labels),) = sides.padded(ROWS, SETTINGS)
  assert ids.tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]
  assert labels.tolist() == [[-100, 6, 7, -100], [-100, 9, -100, -100]]


def test_a_pace_reports_what_passed(capsys, monkeypatch):
  monkeypatch.setattr(sys, "stdin", io.StringIO("0\n"))
  pace = sides.Pace(SETTINGS, lambda: None)
  pace.losses = [2.5, 2.0, 1.5]
  for _ in range(SETTINGS["gate"] + SETTINGS["warm_up"]):
    assert pace.step()
    pace.count(1, 1, 1)
  assert pace.step()  # Says the first losses, then is told to go on.
  pace.count(trained=7, tokens=20, slots=32)
  assert not pace.step()  # The time is up, and nobody asks for more.
  first, second = (
    json.loads(line.removeprefix("BENCH "))
    for line in capsys.readouterr().out.splitlines()
  )
  assert first == {"losses": [2.5]}
  assert (second["trained"], second["tokens"], second["slots"]) == (7, 20, 32)
  assert second["steps"] == 1


class _Side:
  def __init__(self, name: str, losses: list[float]):
    self.name, self.losses = name, losses


def test_sides_that_compute_something_else_are_refused():
  ours = _Side("sft_jax", [10.0, 9.0])
  bench_step.check_losses([ours, _Side("TRL padded", [10.001, 9.001])])
  bench_step.check_losses([ours, _Side("TRL packed", [3.0, 2.0])])
  with pytest.raises(ValueError, match="Tunix: its losses"):
    bench_step.check_losses([ours, _Side("Tunix", [10.0, 9.1])])


def test_a_matrix_product_is_counted_as_two_operations_per_pair():
  square = np.ones((64, 64), np.float32)
  rate = sides.matmul_rate(lambda: square @ square, 64)
  assert 1e6 < rate < 1e14
