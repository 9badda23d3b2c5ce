"""Plans for TPUs that are elsewhere are those that docs/planning.md shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# | `config` (note) | topology | 3.1 of 16.9 GB | ... | bound | tokens/s |
_ROW = re.compile(
  r"^\| `(\w+)`.*?\| (v\w+:[\dx]+) \| ([\d.]+) of [\d.]+ GB \|"
  r".*\| ([\d,]+) \|$",
  re.MULTILINE,
)
TABLE = _ROW.findall((ROOT / "docs" / "planning.md").read_text("utf-8"))


def number(text: str) -> float:
  return float(text.replace(",", ""))


def test_the_table_is_read():
  assert len(TABLE) == 4
  assert all(
    (ROOT / "configs" / "models" / f"{row[0]}.py").is_file() for row in TABLE
  )


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_what_the_page_shows_is_what_the_tool_says(row):
  """Compiled whole; another release of the compiler may move it by a tenth."""
  pytest.importorskip("libtpu", reason="needs the [tpu] extra")
  name, topology, gigabytes, speed = row
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    [
      *(sys.executable, "tools/plan.py", "--quick"),
      *(f"--config=configs/models/{name}.py", f"--topology={topology}"),
    ],
    cwd=ROOT,
    env={"PYTHONPATH": str(ROOT)} | environment | {"COLUMNS": "200"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  total = re.search(r"total\s+([\d.]+) GB of .*: fits", done.stdout)
  bound = re.search(r"at most ([\d,]+) tokens/s", done.stdout)
  assert total, done.stdout
  assert bound, done.stdout
  assert number(total[1]) == pytest.approx(number(gigabytes), rel=0.1)
  assert number(bound[1]) == pytest.approx(number(speed), rel=0.1)
  kernels = re.search(r"kernels\s+(\d+) of Pallas", done.stdout)
  assert kernels, done.stdout
  assert int(kernels[1]) > 0  # Splash attention.
