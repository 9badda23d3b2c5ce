"""The notebooks run from the first cell to the last, and stay small."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


def _code(path: Path) -> str:
  cells = json.loads(path.read_text())["cells"]
  code = ("".join(c["source"]) for c in cells if c["cell_type"] == "code")
  return "\n\n".join(code)


def test_their_order():
  numbers = ["01", "02", "03", "04", "05"]
  assert [name[:2] for name in NAMES] == numbers


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_outputs_are_small_and_of_no_machine(path):
  text = path.read_text()
  assert len(text) < 300_000
  for folder in ("/tmp", "/root", "/home", "/work"):
    assert f"{folder}/" not in text, folder
  cells = json.loads(text)["cells"]
  kinds = [o["output_type"] for c in cells for o in c.get("outputs", ())]
  assert "error" not in kinds
  assert kinds, "no outputs: run it, so that it reads as a page"


def _cells(path: Path) -> list[str]:
  cells = json.loads(path.read_text())["cells"]
  return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def test_the_opening_cell_is_the_same_in_all():
  assert len({_cells(path)[0] for path in NOTEBOOKS}) == 1


@pytest.mark.parametrize(
  ("devices", "extras"),
  [
    (["null"], "notebooks"),
    (["null", "nvidia0", "vfio"], "notebooks,cuda"),  # Colab with a GPU
    (["accel0", "accel1"], "notebooks,tpu"),  # TPU v2 to v4
    (["vfio"], "notebooks,tpu"),  # TPU v5e and later
  ],
)
def test_the_opening_cell_installs_where_there_is_no_checkout(
  tmp_path, monkeypatch, devices, extras
):
  """As on Colab or a fresh TPU VM: cloned, installed for the chip, entered."""
  calls = []

  def run(command, check):
    assert check
    calls.append([str(word) for word in command])
    if command[0] == "git":
      Path(command[-1]).mkdir()

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(subprocess, "run", run)
  monkeypatch.setattr(os, "listdir", lambda folder: devices)
  monkeypatch.setattr(sys, "path", list(sys.path))
  cell = _cells(NOTEBOOKS[0])[0]
  with pytest.raises(AssertionError, match="REPOSITORY"):
    exec(cell, {})
  exec(cell.replace('REPOSITORY = ""', 'REPOSITORY = "the address"'), {})
  clone, install = calls
  root = tmp_path / "sft_jax"
  assert clone[:2] == ["git", "clone"]
  assert clone[-2:] == ["the address", str(root)]
  assert install[-2:] == ["-e", f"{root}[{extras}]"]
  assert (Path.cwd(), sys.path[0]) == (root, str(root))
  known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert set(extras.split(",")) <= set(known["optional-dependencies"])


def test_the_whole_experiment_is_40_lines():
  experiment = _cells(NOTEBOOKS[3])[1]
  assert len([line for line in experiment.splitlines() if line.strip()]) <= 40


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_every_cell_runs(path, tmp_path):
  """As one script, in a checkout of its own that it may write to."""
  pytest.importorskip("matplotlib", reason="needs the [notebooks] extra")
  for name in ("sft_jax", "configs", "tools"):
    (tmp_path / name).symlink_to(ROOT / name)
  done = subprocess.run(
    [sys.executable, "-c", _code(path)],
    cwd=tmp_path,
    env={
      **os.environ,
      "PYTHONPATH": str(tmp_path),
      "MPLBACKEND": "Agg",
      "XLA_FLAGS": "",
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
