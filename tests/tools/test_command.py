"""The frame of the tools: errors are a line, and a trace where it is asked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


CONFIG = "--config=configs/base.py"


@pytest.mark.parametrize(
  "words",
  [
    ["tools/replay.py", "--workdir=none", "--step=1"],
    ["tools/plan.py", CONFIG, "--config.model.path=none"],
  ],
)
def test_debug_shows_the_trace_of_an_error(words):
  def told(*more):
    return subprocess.run(
      [sys.executable, *words, *more],
      cwd=ROOT,
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      capture_output=True,
      text=True,
      check=False,
    )

  plain, debug = told(), told("--debug")
  assert plain.returncode == 2
  assert plain.stderr.startswith("error: ")
  assert "Traceback" not in plain.stderr
  assert debug.returncode == 1
  assert "Traceback" in debug.stderr
  assert "none" in debug.stderr
