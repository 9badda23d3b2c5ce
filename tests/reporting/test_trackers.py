"""Writers copy every record once, over restarts and over failures."""

import json
import struct
import sys
import time
from types import ModuleType
from typing import ClassVar

import pytest
from tensorboardX.proto import event_pb2

from sft_jax.reporting import trackers
from sft_jax.reporting.trackers import About, Copies


class Fake:
  """A writer that keeps what it is given, and may be made to fail."""

  opened: ClassVar[list["Fake"]] = []
  broken = False

  def __init__(self, about: About, identity: str):
    self.identity = identity or f"run of {about.workdir.name}"
    self.again = bool(identity)
    self.got: list[tuple[int, dict]] = []
    self.ended = None
    Fake.opened.append(self)

  def write(self, step, values):
    if Fake.broken:
      raise ConnectionError("no network")
    self.got.append((step, dict(values)))

  def close(self, done):
    self.ended = done


@pytest.fixture
def fake(monkeypatch):
  monkeypatch.setattr(trackers, "WRITERS", {"fake": Fake, "other": Fake})
  monkeypatch.setattr(Fake, "opened", [])
  monkeypatch.setattr(Fake, "broken", False)
  return Fake


def start(folder, kept=(), names=("fake",)):
  said = []
  about = About(folder / "mine", "project", {"optim": {"b1": 0.9}})
  (folder / "mine").mkdir(exist_ok=True)
  return Copies(names, about, kept=kept, log=said.append), said


def test_numbers_are_copied_and_texts_are_not(tmp_path, fake):
  copies, _ = start(tmp_path, names=("fake", "other"))
  values = {"loss": 1.5, "rows": 3, "chain": "ab", "bad": float("nan")}
  copies.write(1, values)
  copies.close(done=True)
  for one in fake.opened:
    assert one.got == [(1, {"loss": 1.5, "rows": 3.0})]
    assert one.ended is True


def test_a_resumed_run_goes_on_in_the_same_run_and_doubles_nothing(
  tmp_path, fake
):
  """Killed after step 3, of which the checkpoint is step 2, where there was an
  evaluation, too."""
  records = [
    {"step": 1, "loss": 1.0},
    {"step": 2, "loss": 0.5},
    {"step": 2, "held_out": 0.7},
    {"step": 3, "loss": 0.3},
  ]
  copies, _ = start(tmp_path)
  for record in records:
    copies.write(record["step"], record)
  again, _ = start(tmp_path, kept=records[:3])
  again.write(3, {"loss": 0.3})
  again.write(4, {"loss": 0.2})
  again.close()
  first, second = fake.opened
  assert (first.again, second.again) == (False, True)
  assert second.identity == "run of mine"
  assert [step for step, _ in first.got] == [1, 2, 2, 3]
  assert second.got == [(4, {"loss": 0.2})]
  assert second.ended is False


def test_a_writer_that_comes_later_catches_up(tmp_path, fake):
  """It may be added to a run that is resumed: the record has everything."""
  kept = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5, "chain": "x"}]
  start(tmp_path, kept=kept)[0].write(3, {"loss": 0.4})
  assert fake.opened[0].got == [
    (1, {"loss": 1.0}),
    (2, {"loss": 0.5}),
    (3, {"loss": 0.4}),
  ]


def test_a_failure_is_said_once_and_made_good(tmp_path, fake):
  copies, said = start(tmp_path)
  copies.write(1, {"loss": 1.0})
  fake.broken = True
  for step in (2, 3):
    copies.write(step, {"loss": 1 / step})
  (line,) = said
  assert "fake failed at step 2 (ConnectionError: no network)" in line
  fake.broken = False
  copies.write(4, {"loss": 0.25})
  assert said[1:] == ["log.writers: fake has all records again."]
  assert [step for step, _ in fake.opened[0].got] == [1, 2, 3, 4]


def test_what_was_never_sent_is_named_and_sent_by_the_next_start(
  tmp_path, fake
):
  copies, said = start(tmp_path)
  fake.broken = True
  copies.write(1, {"loss": 1.0})
  copies.close()
  assert said[-1] == (
    "log.writers: fake lacks 1 records; metrics.jsonl has them."
  )
  fake.broken = False
  start(tmp_path, kept=[{"step": 1, "loss": 1.0}])
  assert fake.opened[1].got == [(1, {"loss": 1.0})]


def test_one_that_cannot_begin_is_an_error(tmp_path, fake, monkeypatch):
  def refuse(about, identity):
    raise RuntimeError("no account")

  monkeypatch.setattr(trackers, "WRITERS", {"fake": refuse})
  with pytest.raises(ValueError, match=r"fake could not begin .*no account"):
    start(tmp_path)


def test_processes_other_than_the_first_write_nothing(
  tmp_path, fake, monkeypatch
):
  monkeypatch.setattr(trackers.jax, "process_index", lambda: 1)
  copies, _ = start(tmp_path, kept=[{"step": 1, "loss": 1.0}])
  copies.write(2, {"loss": 1.0})
  copies.close()
  assert fake.opened == []
  assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize("names", ["tensorboard", ("tensorbord",)])
def test_an_unknown_writer_is_refused(names):
  with pytest.raises(ValueError, match=r"log\.writers: got .*expected a tuple"):
    trackers.check(names)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch):
  monkeypatch.setattr(
    trackers.importlib.util, "find_spec", lambda package: None
  )
  with pytest.raises(ValueError, match=rf"pip install 'sft_jax\[{name}\]'"):
    trackers.check(("tensorboard", name))
  trackers.check(("tensorboard",))


def real(tmp_path, monkeypatch, name):
  """A run of two starts in the writer of this name; what it remembers."""
  monkeypatch.chdir(tmp_path)
  kept = [{"step": 1, "loss/source/a*b": 1.0}, {"step": 2, "loss": 0.5}]
  start(tmp_path, kept=kept, names=(name,))[0].close()
  copies, said = start(tmp_path, kept=kept, names=(name,))
  copies.write(2, {"held_out": 0.75, "loss/source//x/../y": 0.5})
  copies.write(3, {"loss": 0.25})
  copies.close(done=True)
  assert said == []
  return json.loads((tmp_path / "mine" / "writers.json").read_text())[name]


def wandb_records(data):
  """Of a .wandb file: after 7 bytes a log as LevelDB has it, in blocks of 32
  KiB; a part is CRC, length, kind (whole, first, middle, last), bytes."""
  at, record = 7, b""
  while at + 7 <= len(data):
    left = 32768 - at % 32768
    if left < 7:
      at += left
      continue
    _, length, kind = struct.unpack_from("<IHB", data, at)
    record += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):
      yield record
      record = b""


def until_its_exit(file):
  """(kind, record) of a .wandb file, which W&B's own process ends to write."""
  from wandb.proto import wandb_internal_pb2

  end = time.monotonic() + 30
  while True:
    read = map(
      wandb_internal_pb2.Record.FromString, wandb_records(file.read_bytes())
    )
    found = [(record.WhichOneof("record_type"), record) for record in read]
    if any(kind == "exit" for kind, _ in found) or time.monotonic() > end:
      return found
    time.sleep(0.2)


# The clients' own warnings are not ours to mend.
@pytest.mark.filterwarnings("ignore")
def test_mlflow_itself_has_one_run_with_every_step_once(tmp_path, monkeypatch):
  pytest.importorskip("mlflow", reason="pip install 'sft_jax[mlflow]'")
  from mlflow.tracking import MlflowClient

  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
  state = real(tmp_path, monkeypatch, "mlflow")
  client = MlflowClient()
  experiment = client.get_experiment_by_name("project")
  assert experiment is not None
  (run,) = client.search_runs([experiment.experiment_id])
  assert run.info.run_id == state["run"]
  assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
  assert run.data.params == {"optim.b1": "0.9"}
  history = lambda name: [
    (m.step, m.value) for m in client.get_metric_history(state["run"], name)
  ]
  assert history("loss") == [(2, 0.5), (3, 0.25)]
  assert history("loss/source/a_b") == [(1, 1.0)]
  assert history("held_out") == [(2, 0.75)]
  assert history("loss/source/_x/_/y") == [(2, 0.5)]


@pytest.mark.filterwarnings("ignore")
def test_wandb_itself_has_one_run_with_every_step_once(tmp_path, monkeypatch):
  pytest.importorskip("wandb", reason="pip install 'sft_jax[wandb]'")
  monkeypatch.setenv("WANDB_MODE", "offline")
  state = real(tmp_path, monkeypatch, "wandb")
  files = sorted(tmp_path.glob("mine/wandb/offline-run-*/*.wandb"))
  assert {file.name for file in files} == {f"run-{state['run']}.wandb"}
  rows = []
  for file in files:
    for kind, record in until_its_exit(file):
      if kind == "history":
        rows.append(
          {
            (item.key or "/".join(item.nested_key)): json.loads(item.value_json)
            for item in record.history.item
          }
        )
  values = [
    {k: v for k, v in row.items() if not k.startswith("_") or k == "_step"}
    for row in rows
  ]
  assert values == [
    {"_step": 1, "loss/source/a*b": 1.0},
    {"_step": 2, "loss": 0.5},
    {"_step": 2, "held_out": 0.75, "loss/source//x/../y": 0.5},
    {"_step": 3, "loss": 0.25},
  ]


def test_wandb_is_asked_to_open_the_same_run(tmp_path, monkeypatch):
  """By a module of the same calls, where W&B is not installed."""
  calls = []

  class Run:
    def log(self, values, step):
      calls.append(("log", step, values))

    def finish(self, exit_code):
      calls.append(("finish", exit_code))

  module = ModuleType("wandb")
  module.Settings = lambda **settings: settings  # type: ignore[attr-defined]

  def init(**arguments):
    calls.append(("init", arguments))
    return Run()

  module.init = init  # type: ignore[attr-defined]
  monkeypatch.setitem(sys.modules, "wandb", module)
  about = About(tmp_path / "mine", "project", {"b1": 0.9})
  one = trackers.Wandb(about, "")
  one.write(3, {"loss": 1.0})
  one.close(done=False)
  trackers.Wandb(about, one.identity)
  assert [call[0] for call in calls] == ["init", "log", "finish", "init"]
  first, second = calls[0][1], calls[3][1]
  assert first == second
  assert (first["id"], first["resume"]) == (one.identity, "allow")
  assert (first["project"], first["name"]) == ("project", "mine")
  assert calls[1:3] == [("log", 3, {"loss": 1.0}), ("finish", 1)]


def _events(path):
  """The events of a file, read by the format: length, CRC, data, CRC."""
  data, found = path.read_bytes(), []
  while data:
    (length,) = struct.unpack("<Q", data[:8])
    found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
    data = data[16 + length :]
  return found


def test_event_files_hold_the_records(tmp_path):
  """Two starts within a second: two files; long names, large steps."""
  name = "loss/source/" + "ü" * 200
  about = trackers.About(tmp_path, "", {})
  for start in (1, 2):
    writer = trackers.TensorBoard(about, "")
    writer.write(start, {"loss/nats_per_token": 0.5 / start, name: -1.0})
    writer.write(2**40, {name: 7.0})
    if start == 1:
      writer.close(True)  # The second is read while it is open.
  files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda p: p.suffix)
  assert len(files) == 2
  for start, file in enumerate(files, 1):
    head, first, last = _events(file)
    assert head.file_version == "brain.Event:2"
    assert (first.step, last.step) == (start, 2**40)
    values = {v.tag: v.simple_value for v in first.summary.value}
    assert values == {"loss/nats_per_token": 0.5 / start, name: -1.0}
  writer.close(True)


def test_tensorboard_itself_reads_them(tmp_path):
  reader = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator",
    reason="the reader of TensorBoard itself: pip install tensorboard",
  )
  writer = trackers.TensorBoard(trackers.About(tmp_path, "", {}), "")
  for step in (1, 2, 2**40):
    writer.write(step, {"loss/nats_per_token": 1 / step})
  writer.close(True)
  found = reader.EventAccumulator(str(tmp_path / "tensorboard"))
  found.Reload()
  events = found.Scalars("loss/nats_per_token")
  assert [e.step for e in events] == [1, 2, 2**40]
