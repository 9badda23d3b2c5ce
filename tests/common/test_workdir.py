"""A workdir has one run at a time, whole files and a record of incidents."""

import contextlib
import json
import os
import re
from pathlib import Path

import pytest

from sft_jax.common import workdir
from sft_jax.common.workdir import Incidents, locked, write_json


def test_a_second_run_is_told_who_has_the_workdir(tmp_path):
  with locked(tmp_path / "run"):
    with pytest.raises(ValueError, match=f"process {os.getpid()} on .*one run"):
      with locked(tmp_path / "run"):
        pytest.fail("two runs in one workdir")
  with locked(tmp_path / "run"):
    pass


@contextlib.contextmanager
def unprivileged():
  """As somebody whom permissions bind: root may write everywhere."""
  user = os.geteuid()
  if user == 0:
    os.seteuid(65534)
  try:
    yield
  finally:
    os.seteuid(user)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  tmp_path.chmod(0o555)
  try:
    with (
      unprivileged(),
      pytest.raises(OSError, match=r"run: cannot be written"),
    ):
      with locked(tmp_path / "run"):
        pytest.fail("written where nobody may")
  finally:
    tmp_path.chmod(0o755)


def test_incidents_survive_a_line_cut_short(tmp_path):
  incidents = Incidents(tmp_path)
  assert incidents.read() == []
  incidents.add("halted", 3, "a reason")
  with (tmp_path / "incidents.jsonl").open("a") as file:
    file.write('{"time": "2026')
  incidents.add("resumed", 2, "at step 2")
  read = [(line["kind"], line["step"]) for line in incidents.read()]
  assert read == [("halted", 3), ("resumed", 2)]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / "folder" / "x.json"
  write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}


def test_no_duration_is_measured_by_the_clock_on_the_wall():
  """It jumps; of it there is only the time of day, of incidents and copies."""
  package = Path(__file__).parents[2] / "sft_jax"
  wall = re.compile(r"time\.time\(|datetime\.now|utcnow|from time import")
  found = {
    path.name for path in package.rglob("*.py") if wall.search(path.read_text())
  }
  assert found == {"workdir.py", "trackers.py"}


def test_a_power_cut_finds_the_file_before_its_name(tmp_path, monkeypatch):
  """First what is in it goes to the disk, then its name, then the folder's."""
  happened = []
  names = lambda number: os.readlink(f"/proc/self/fd/{number}")
  fsync, replace = os.fsync, os.replace
  monkeypatch.setattr(
    os, "fsync", lambda n: (happened.append(("sync", names(n))), fsync(n))
  )
  monkeypatch.setattr(
    *(os, "replace"),
    lambda a, b: (happened.append(("name", str(b))), replace(a, b)),
  )
  write_json(tmp_path / "x.json", {"a": 1})
  assert happened == [
    ("sync", str(tmp_path / f".x.json.{os.getpid()}.part")),
    ("name", str(tmp_path / "x.json")),
    ("sync", str(tmp_path)),
  ]
  happened.clear()
  (tmp_path / "a" / "b").mkdir(parents=True)
  (tmp_path / "a" / "b" / "c").write_text("")
  workdir.sync_tree(tmp_path / "a")
  assert [Path(x).name for _, x in happened] == ["c", "b", "a"]
