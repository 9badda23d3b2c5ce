"""Killed at any moment, a run that is started again ends as if it never was."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from sft_jax.reporting.metrics import read_jsonl

ROOT = Path(__file__).parents[2]
PATHS = (ROOT, ROOT / "tests" / "support")
DRIVER = Path(__file__).with_name("driver.py")
# One device, and compiled in a hurry: see conftest.py.
QUICK = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
CHANGES = ("steps=12", "eval__every=4", "data__holdout=0.2")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
  """A folder with a model, rows, a compile cache and a run that went well."""
  place = tmp_path_factory.mktemp("faults")
  tiny.model_folder(place / "model")
  tiny.rows_file(place / "rows.jsonl")
  assert drive(place, "whole", "whole")[0] == [0]
  return place


def drive(
  place: Path,
  name: str,
  *phases: str,
  python: str = sys.executable,
  **environment,
):
  """(exit codes, stderr) of runs in place/name, one per phase."""
  done = subprocess.run(
    [
      *(python, str(DRIVER), str(place / name)),
      *(str(place / "model"), str(place / "rows.jsonl"), *phases, *CHANGES),
    ],
    env={
      **os.environ,
      "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
      "XLA_FLAGS": QUICK,
      "OPENBLAS_NUM_THREADS": "1",
      "FAULTS_COMPILE_CACHE": str(place / "compiled"),
      **environment,
    },
    capture_output=True,
    text=True,
    timeout=600,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1]), done.stderr


def records(place: Path, name: str) -> list[dict]:
  """What a run recorded, but for what a clock said."""
  return [
    {
      k: v
      for k, v in row.items()
      if not k.startswith(("time/", "speed/", "memory/"))
    }
    for row in read_jsonl(place / name / "run" / "metrics.jsonl")
  ]


def check_same(place: Path, name: str) -> None:
  """The run ended as the one that was never disturbed."""
  assert records(place, name) == records(place, "whole")
  for file in ("export/model.safetensors", "evals/after.json"):
    one, other = (place / n / "run" / file for n in (name, "whole"))
    assert one.read_bytes() == other.read_bytes(), file


def test_killed_three_times_in_an_epoch(place):
  """Also: every digest of the rows consumed stands in the records."""
  phases = ("step", "mid-save", "before retention")
  codes, error = drive(place, "killed", *phases, "whole")
  assert codes == [-9, -9, -9, 0], error
  check_same(place, "killed")
  chains = [
    row["data/chain"] for row in records(place, "killed") if "data/chain" in row
  ]
  assert len(set(chains)) == 12


@pytest.mark.slow
def test_killed_in_every_phase(place):
  phases = (
    *("preparing the cache", "moving the cache", "load", "evaluation before"),
    *("compile", "step", "evaluation within", "mid-save", "commit"),
    *("before retention", "export", "after export"),
  )
  codes, error = drive(place, "everywhere", *phases, "whole")
  assert codes == [-9] * len(phases) + [0], error
  check_same(place, "everywhere")


def test_sigterm_while_saving_and_twice_loses_no_step(place):
  codes, error = drive(place, "stopped", "SIGTERM twice", "whole")
  assert codes == [75, 0], error
  step = int(error.split("stopped by signal after step ")[1].split(",")[0])
  told = incidents(place, "stopped")
  assert [(i["kind"], i["step"]) for i in told] == [
    ("stopped", step),
    ("resumed", step),
  ]
  check_same(place, "stopped")


def test_ctrl_c_saves_and_says_how_to_go_on(place):
  """And the records, the trackers' copies too, have every step once."""
  codes, error = drive(place, "interrupted", "Ctrl-C", "whole")
  assert codes == [75, 0], error
  assert "stopped by signal after step 5, which is saved" in error
  assert "Run the same command again to continue from there." in error
  assert "Traceback" not in error
  check_same(place, "interrupted")
  run = place / "interrupted" / "run"
  copied = json.loads((run / "writers.json").read_text())["tensorboard"]
  steps = [row["step"] for row in records(place, "interrupted")]
  # Up to the last record; of its step there may be several.
  assert copied["copied"] == [12, steps.count(12)]
  assert len(list((run / "tensorboard").iterdir())) == 2


@pytest.mark.slow
def test_signals_of_a_terminal(place):
  """SIGHUP saves; a second Ctrl-C ends at once; Ctrl-Z only takes time."""
  phases = ("hang up", "Ctrl-C twice", "suspended")
  codes, error = drive(place, "terminal", *phases)
  assert codes == [75, 130, 0], error
  assert "stopped by signal after step 3, which is saved" in error
  check_same(place, "terminal")


@pytest.mark.slow
def test_sigterm_while_measuring_and_at_the_last_step(place):
  phases = "SIGTERM while measuring", "SIGTERM at the last step", "whole"
  codes, error = drive(place, "asked", *phases)
  assert codes == [75, 75, 0], error
  assert "nothing is lost" in error
  check_same(place, "asked")


@pytest.mark.slow
def test_resumed_on_fewer_devices(place):
  """8, then 4, then 1: the same rows, and losses that differ by rounding."""
  # The second save of a run begins when the first is whole.
  for devices, phase in ((8, "mid-save"), (4, "mid-save"), (1, "whole")):
    flags = f"{QUICK} --xla_force_host_platform_device_count={devices}"
    codes, error = drive(place, "moved", phase, XLA_FLAGS=flags)
    assert codes == [0 if phase == "whole" else -9], error
  moved, whole = records(place, "moved"), records(place, "whole")
  assert len(moved) == len(whole)
  for one, other in zip(moved, whole, strict=True):
    assert one["step"] == other["step"]
    assert one.get("data/chain") == other.get("data/chain")
    for name in ("loss/nats_per_token", "held_out/nats_per_token"):
      if name in other:
        assert one[name] == pytest.approx(other[name], rel=1e-5)
  resumed = [i["step"] for i in incidents(place, "moved")]
  assert resumed == [2, 4]


OTHER = os.environ.get("OTHER_PYTHON", "")


@pytest.mark.slow
@pytest.mark.skipif(
  not OTHER, reason="OTHER_PYTHON names no interpreter with other versions"
)
@pytest.mark.parametrize(
  "pythons", [(sys.executable, OTHER), (OTHER, sys.executable)]
)
def test_resumed_by_another_python_and_jax(place, pythons):
  """Begun under one, finished under the other: the same rows and losses."""
  name = f"versions{pythons.index(OTHER)}"
  for python, phase, code in zip(
    pythons, ("mid-save", "whole"), (-9, 0), strict=True
  ):
    codes, error = drive(place, name, phase, python=python)
    assert codes == [code], error
  found, whole = records(place, name), records(place, "whole")
  for one, other in zip(found, whole, strict=True):
    assert one["step"] == other["step"]
    assert one.get("data/chain") == other.get("data/chain")
    if "loss/nats_per_token" in other:
      assert one["loss/nats_per_token"] == pytest.approx(
        other["loss/nats_per_token"], rel=1e-5
      )
  assert [i["kind"] for i in incidents(place, name)] == ["resumed"]


def incidents(place: Path, name: str) -> list[dict]:
  return read_jsonl(place / name / "run" / "incidents.jsonl")


def test_hangs_dead_readers_and_a_full_disk_end_the_run(place):
  """Each in bounded time, with a code and words; then the run goes on."""
  phases = (
    "a hanging step",
    "a stalled reader",
    "a dying reader",
    "a full disk",
  )
  codes, error = drive(
    *(place, "troubled", *phases, "whole", "faults__hang_seconds=8")
  )
  assert codes == [1, 1, 2, 2, 0], error
  assert error.count("Timeout (0:00:08)!") == 2
  assert "loop.py" in error  # Of the stacks: where it hung.
  assert "Input/output error" in error
  assert "could not be saved" in error
  assert "File too large" in error
  check_same(place, "troubled")


@pytest.mark.slow
def test_a_disk_that_is_full_in_every_phase(place):
  """A small one: each run says where and what to do, and the next goes on."""
  disk = place / "full"
  disk.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)]
  if not shutil.which("mount") or subprocess.run(mount).returncode:
    pytest.skip("may not mount a small disk: needs root")
  try:
    phases = (
      *("cache", "compiled", "start page", "records", "checkpoint"),
      *("evaluation", "measured", "export", "exporting", "report", "result"),
    )
    codes, error = drive(
      *(place, "full", *(f"full: {phase}" for phase in phases), "whole"),
      FAULTS_DISK=str(disk),
      FAULTS_COMPILE_CACHE=str(disk / "compiled"),
    )
    assert codes == [2] * len(phases) + [0], error
    said = [x for x in error.splitlines() if x.startswith("error: ")]
    assert len(said) == len(phases), error
    for line in said:
      assert str(disk) in line, line
      assert "ake room" in line, line
  finally:
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_replay_shows_the_rows_of_a_step(place):
  """What it shows is what stands in the file at the places it names."""
  done = subprocess.run(
    [
      *(sys.executable, "tools/replay.py", "--step=3"),
      f"--workdir={place / 'whole' / 'run'}",
    ],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
    capture_output=True,
    text=True,
    check=True,
  )
  rows = [
    json.loads(x) for x in (place / "rows.jsonl").read_text().splitlines()
  ]
  blocks = done.stdout.split("\npack ")[1:]
  assert len(blocks) >= 8
  for block in blocks:
    title, text = block.split("\n", 1)
    row = rows[int(title.split("rows.jsonl:")[1].split(":")[0]) - 1]
    text = text.replace("\n", " ")
    assert row["instruction"] in text
    prompt, trained = text.split("[[", 1)
    assert row["output"] not in prompt
    assert row["output"] in trained.replace("]][[", "")
