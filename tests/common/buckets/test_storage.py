"""Buckets by emulators: copies verified, one lease, faults outlived."""

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest

import buckets as emulators
import sft_jax
import tiny
from buckets import both, every, gs, s3
from host_runs import ROOT, finish, start
from sft_jax import main as cli
from sft_jax.common import hub
from sft_jax.common.buckets import remote_workdir, storage
from sft_jax.data.readers import files
from sft_jax.models.hf import load_save
from sft_jax.reporting import run_files
from sft_jax.training import config_check

# Clients keep their connections until the end of the process.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(remote_workdir, "BEAT", 0.2)
  monkeypatch.setattr(remote_workdir, "LAPSE", 1.0)


# -- Refusals ------------------------------------------------------------------


@pytest.mark.parametrize(
  "changes",
  [
    {"workdir": "hf://org/name"},
    {"workdir": "http://host/run"},
    {"compile_cache": "s3://bucket/cache"},
    {"data__cache_dir": "gs://bucket/cache"},
    {"data__train": ({"path": "ftp://host/rows.jsonl", "repeat": 2},)},
    {"data__train": "a.jsonl, ftp://host/rows.jsonl"},
    {"eval__behaviors": {"maths": "az://bucket/maths.jsonl"}},
    {"model__chat_template": "gs://bucket/template.jinja"},
  ],
)
def test_a_key_refuses_by_name_what_it_does_not_take(tmp_path, changes):
  key = next(iter(changes)).replace("__", ".")
  with pytest.raises(
    ValueError, match=rf"{key}: got '\w+://.*expected a local"
  ):
    config_check.check(tiny.config(tmp_path, "", "rows.jsonl", **changes))


def test_taken_schemes_pass(tmp_path):
  config_check.check(
    tiny.config(
      tmp_path,
      "gs://bucket/model",
      ("s3://bucket/a.jsonl", ("hf://org/rows#train", 2)),
      workdir="gs://bucket/run",
      compile_cache="gs://bucket/cache",
    )
  )


def test_without_its_client_a_scheme_is_refused(monkeypatch):
  storage._client.cache_clear()
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  with pytest.raises(ValueError, match=r"pip install 'sft_jax\[remote\]'"):
    storage.read("gs://bucket/object")
  storage._client.cache_clear()


# -- Copies --------------------------------------------------------------------


@every
def test_copies_are_fetched_once_and_again_when_they_change(url, monkeypatch):
  rows = [b'{"text": "one"}\n', b'{"text": "two"}\n']
  storage.write(f"{url}/rows/a.jsonl", rows[0])
  storage.write(f"{url}/rows/train/b.jsonl", rows[1])
  storage.write(f"{url}/rows/readme.md", b"none")
  one = storage.fetch(f"{url}/rows/a.jsonl")
  assert one.read_bytes() == rows[0]
  with monkeypatch.context() as once:
    once.setattr(storage, "_fetch_all", lambda *_: pytest.fail("again"))
    assert storage.fetch(f"{url}/rows/a.jsonl") == one
  # Of the same size; only the digest tells.
  storage.write(f"{url}/rows/a.jsonl", rows[1])
  assert storage.fetch(f"{url}/rows/a.jsonl").read_bytes() == rows[1]
  read = lambda path: [row for _, row in files.read_rows(path)]
  assert read(f"{url}/rows/a.jsonl") == [{"text": "two"}]
  assert read(f"{url}/rows#train") == [{"text": "two"}]
  assert read(f"{url}/rows/*.jsonl[:1]") == [{"text": "two"}]
  assert len(read(f"{url}/rows/**/*.jsonl")) == 2
  with pytest.raises(ValueError, match="no such file"):
    read(f"{url}/nothing.jsonl")
  with pytest.raises(ValueError, match="no file of a model"):
    hub.find_model(f"{url}/nothing")


@every
def test_a_damaged_copy_is_fetched_again_and_a_torn_one_refused(
  url, monkeypatch
):
  storage.write(f"{url}/a.jsonl", b"0123456789")
  copy = storage.fetch(f"{url}/a.jsonl")
  copy.write_bytes(b"0123")
  assert storage.fetch(f"{url}/a.jsonl").read_bytes() == b"0123456789"
  storage.write(f"{url}/b.jsonl", b"0123456789")
  fs, _ = storage.client(url)
  torn = lambda path, to: open(to, "wb").write(b"0123456788")  # noqa: SIM115
  monkeypatch.setattr(fs, "get_file", torn)
  with pytest.raises(OSError, match="digest says, expected 10, after 3 tries"):
    storage.fetch(f"{url}/b.jsonl")
  monkeypatch.setattr(fs, "put_file", lambda file, path: None)
  storage.write(f"{url}/c", b"")
  with pytest.raises(OSError, match="something else than"):
    storage.upload(copy, f"{url}/c")


@both
@pytest.mark.parametrize("kind", ["429", "503", "drop", "torn", "slow"])
def test_faults_are_outlived(url, buckets, kind, tmp_path):
  file = tmp_path / "a"
  file.write_bytes(b"0123456789" * 1000)
  buckets.fail(kind, times=2)
  storage.upload(file, f"{url}/a")
  buckets.fail(kind, times=2)
  assert storage.fetch(f"{url}/a").read_bytes() == file.read_bytes()
  assert buckets.left() == 0


@both
def test_a_missing_right_is_one_line(url, buckets):
  storage.write(f"{url}/a", b"1")
  buckets.fail("403", times=99)
  with pytest.raises(PermissionError) as reading:
    storage.read(f"{url}/a")
  with pytest.raises(PermissionError) as writing:
    storage.write(f"{url}/a", b"2")
  for caught, right in ((reading, "Get|get"), (writing, "Put|create")):
    caught.match(f"in bucket {emulators.BUCKET} the right .*({right})")
    assert "\n" not in str(caught.value)
  buckets.fail("", times=0)
  with pytest.raises(OSError, match="there is no such bucket"):
    storage.write(url.replace(emulators.BUCKET, "no-such-bucket"), b"")


@every
def test_the_marker_of_a_folder_is_written_last(url, tmp_path, monkeypatch):
  for name in ("config.json", "a", "z/b"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)
  written = []
  real = storage.upload

  def upload(file, there):
    assert not storage.exists(f"{url}/config.json")
    real(file, there)
    written.append(there)

  monkeypatch.setattr(storage, "upload", upload)
  storage.write(f"{url}/config.json", b"of before")
  storage.write(f"{url}/old", b"of before")
  storage.upload_folder(tmp_path, url, "config.json")
  assert written[-1] == f"{url}/config.json"
  assert set(storage.list_objects(url)) == {"config.json", "a", "z/b"}


# -- The lease -----------------------------------------------------------------


@every
def test_a_second_run_is_refused_by_name(url, tmp_path, quick, monkeypatch):
  here = remote_workdir._process_namespace()
  with remote_workdir.opened(url, tmp_path / "one"):
    # Else it sees a living process of this machine, and need not wait.
    monkeypatch.setattr(remote_workdir, "_process_namespace", lambda: "else")
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
      with remote_workdir.opened(url, tmp_path / "two"):
        pass
  monkeypatch.setattr(remote_workdir, "_process_namespace", lambda: here)
  with remote_workdir.opened(url, tmp_path / "two"):
    pass  # It was let go.


@every
def test_a_lapsed_lease_is_taken_and_who_had_it_learns(url, tmp_path, quick):
  first = remote_workdir.Lease(url)
  first.acquire()
  second = remote_workdir.Lease(url)
  second.acquire()
  second.check()
  with pytest.raises(OSError, match="its lease was taken by process"):
    first.beat()
  mirror = remote_workdir.Mirror(url, tmp_path, first)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(OSError, match="was taken"):
    mirror.push()
  assert not storage.exists(f"{url}/config.json")
  # A process of this machine that is no more needs no waiting for.
  ended = subprocess.Popen(["true"])
  ended.wait()
  second._me["process"] = ended.pid
  second.beat()
  third = remote_workdir.Lease(url)
  third._watch = lambda *_: pytest.fail("waited")
  third.acquire()


@every
def test_of_many_that_try_at_once_one_has_the_lease(url, quick):
  leases = [remote_workdir.Lease(url) for _ in range(4)]
  got, barrier = [], threading.Barrier(4)

  def take(lease):
    barrier.wait()
    with contextlib.suppress(ValueError):  # In use by another.
      lease.acquire()
      got.append(lease)

  beats = threading.Event()

  def beat():
    while not beats.wait(0.1):
      for lease in got:
        lease.beat()

  threads = [threading.Thread(target=take, args=(one,)) for one in leases]
  keeper = threading.Thread(target=beat)
  for thread in (*threads, keeper):
    thread.start()
  for thread in threads:
    thread.join()
  beats.set()
  keeper.join()
  assert len(got) == 1


@every
def test_a_listing_of_before_takes_no_lease_away(url, quick):
  first, second = remote_workdir.Lease(url), remote_workdir.Lease(url)
  first.acquire()
  answers, newest = [(0, None)], second._newest
  second._newest = lambda: answers.pop() if answers else newest()
  watched = []
  second._watch = lambda number, held: watched.append(held["id"])  # It lapses.
  second.acquire()
  assert watched == [first._me["id"]]
  assert second._number == 2


@every
def test_an_older_listing_or_a_cut_object_is_no_news_of_a_lease(url, quick):
  """Neither is a sign of life of who had it, nor takes it from who has it."""
  first, second = remote_workdir.Lease(url), remote_workdir.Lease(url)
  first.acquire()
  newest, answers = second._newest, [(0, None), (1, None)]
  second._newest = lambda: answers.pop() if answers else newest()
  second._watch(1, newest()[1])  # It lapses.
  assert not answers
  answers[:] = (0, None), (1, None)
  first._newest = second._newest
  for _ in (1, 2):
    first.check()
  # One that is let go meanwhile is free at once.
  monitor = threading.Timer(0.2, first.release)
  monitor.start()
  began = time.monotonic()
  second.acquire()
  monitor.join()
  assert time.monotonic() - began < 10
  assert second._number == 2


@every
def test_a_run_that_could_not_copy_its_end_lets_its_lease_go(
  url, tmp_path, quick, monkeypatch
):
  def fails(self):
    raise OSError("no room")

  with monkeypatch.context() as broken, pytest.raises(OSError, match="no room"):
    with remote_workdir.opened(url, tmp_path / "one"):
      broken.setattr(remote_workdir.Mirror, "push", fails)
  another = remote_workdir.Lease(url)
  another._watch = lambda *_: pytest.fail("waited")
  another.acquire()


@both
def test_an_answer_that_is_lost_takes_no_lease_away(url, buckets, quick):
  buckets.fail("late", "(POST|PUT) ")
  lease = remote_workdir.Lease(url)
  lease.acquire()
  assert buckets.left() == 0
  lease.check()


# -- The copy of a workdir -----------------------------------------------------


@every
def test_records_are_parts_that_readers_join(url, tmp_path, monkeypatch):
  monkeypatch.setattr(remote_workdir, "_MOST_PARTS", 4)
  folder = tmp_path / "run"
  folder.mkdir()
  mirror, log = remote_workdir.Mirror(url, folder), folder / "metrics.jsonl"
  parts = f"{url}/metrics.jsonl.parts"

  def other(name="other"):
    one = remote_workdir.Mirror(url, tmp_path / name)
    one.pull()
    return one, (tmp_path / name / log.name).read_bytes()

  whole = b""
  for i in range(10):
    whole += b'{"step": %d}\n' % i
    log.write_bytes(whole + b'{"half')  # A line that is being written.
    mirror.push()
    assert other()[1] == whole
  assert len(storage.list_objects(parts)) <= 4
  # Steps that are taken again: the end is another one.
  whole = whole[: len(whole) // 2 - 3].rpartition(b"\n")[0] + b"\n"
  resumed, _ = other("run")
  log.write_bytes(whole)
  resumed.push()
  assert other()[1] == whole
  whole += b'{"step": 99}\n'
  log.write_bytes(whole)
  resumed.push()
  assert other()[1] == whole
  # A part that a listing does not show is no silent gap.
  names = sorted(storage.list_objects(parts))
  storage.write(f"{parts}/{names[-1][:-1]}7", b"\n")
  with pytest.raises(OSError, match="expected all of them"):
    other()


@pytest.mark.parametrize("scheme", ["memory", s3])
def test_copied_checkpoints_are_those_that_are_here(url, tmp_path):
  folder, marker = tmp_path / "run", "_CHECKPOINT_METADATA"
  folder.mkdir()
  mirror = remote_workdir.Mirror(url, folder)
  mirror._copies_steps = True

  def save(step, text):
    (folder / "checkpoints" / step / "state").mkdir(parents=True)
    (folder / "checkpoints" / step / "state" / "d").write_text(text)
    (folder / "checkpoints" / step / marker).write_text(text)

  def delete(step):
    storage.shutil.rmtree(folder / "checkpoints" / step)

  def other():
    one = remote_workdir.Mirror(url, tmp_path / "other")
    one._copies_steps = True
    one.pull()
    found = (tmp_path / "other").glob("checkpoints/*/state/d")
    return {file.parts[-3]: file.read_text() for file in found}

  save("2", "a")
  mirror.push()
  save("4", "b")
  delete("2")
  mirror.push()
  assert other() == {"4": "b"}
  # Rejected, and the only one: it stays there until there is another.
  delete("4")
  mirror.push()
  assert other() == {"4": "b"}
  save("4", "of now")
  mirror.push()
  assert other() == {"4": "of now"}
  # One that is not whole there is none.
  storage.remove(f"{url}/checkpoints/4/{marker}")
  assert other() == {}


@pytest.mark.parametrize("scheme", ["memory", gs])
def test_processes_without_a_common_disk(url, tmp_path, monkeypatch, quick):
  """One holds the lease and writes; both begin with what is there, and share
  what the first exports."""
  storage.write(f"{url}/config.json", b"{}")
  storage.write(f"{url}/metrics.jsonl.parts/0000-000001", b'{"step": 1}\n')
  process, meeting = threading.local(), threading.Barrier(2, timeout=60)
  two = types.SimpleNamespace(
    process_count=lambda: 2, process_index=lambda: process.index
  )
  monkeypatch.setattr(remote_workdir, "jax", two)
  monkeypatch.setattr(remote_workdir.workdir, "jax", two)
  there = types.SimpleNamespace(barrier=lambda name: meeting.wait())
  monkeypatch.setattr(remote_workdir, "distributed", there)
  found = {}

  def live(index):
    process.index = index
    home = tmp_path / str(index)
    export = home / ".export.writing"
    with remote_workdir.opened(url, home):
      found[index] = (home / "metrics.jsonl").read_text()
      (home / "config.json").write_text(f'{{"of": {index}}}')
      if index == 0:
        (export / "inner").mkdir(parents=True)
        (export / "config.json").write_text("whole")
        (export / "inner" / "weights").write_text("w" * 1000)
      remote_workdir.share(export, url)
      found[f"export {index}"] = (export / "inner" / "weights").read_text()

  lives = [threading.Thread(target=live, args=(index,)) for index in (0, 1)]
  for one in lives:
    one.start()
  for one in lives:
    one.join()
  assert found[0] == found[1] == '{"step": 1}\n'
  assert found["export 0"] == found["export 1"] == "w" * 1000
  assert storage.read(f"{url}/config.json") == b'{"of": 0}'
  assert not any(".shared" in name for name in storage.list_objects(url))


# -- Whole runs ----------------------------------------------------------------

CHOICES = {
  "data__holdout": 0.2,
  "eval__every": 3,
  "eval__kl": False,
  "checkpoint__keep": 2,
  "lora__rank": 2,
}


def left(folder) -> tuple:
  """What a run has recorded, but for clocks."""
  clocks = ("time/", "speed/", "memory/")
  found = run_files.read(folder)
  rows = [
    {k: v for k, v in row.items() if not k.startswith(clocks)}
    for row in found["metrics"]
  ]
  clocks = ("time", "interruptions")
  result = {k: v for k, v in found["result"].items() if k not in clocks}
  result["export"].pop("path")
  return rows, result, found["held_out"]


def call(monkeypatch, capsys, name, *arguments) -> str:
  """What a command prints."""
  monkeypatch.setattr(sys, "argv", ["sft-jax", name, *map(str, arguments)])
  capsys.readouterr()
  with contextlib.suppress(SystemExit):
    cli.main()
  out, err = capsys.readouterr()
  assert "error:" not in err, err
  return out


@both
def test_a_run_with_everything_in_a_bucket_is_a_local_run(
  url, tmp_path, quick, monkeypatch, capsys
):
  model, rows = tiny.model_folder(tmp_path / "model"), tmp_path / "rows.jsonl"
  tiny.rows_file(rows)
  alone = sft_jax.train(tiny.config(tmp_path, model, rows, **CHOICES))
  storage.upload_folder(model, f"{url}/model", "config.json")
  storage.upload(rows, f"{url}/rows.jsonl")
  place = f"{url}/run"
  config = lambda **more: tiny.config(
    *(tmp_path, f"{url}/model", f"{url}/rows.jsonl"),
    **(CHOICES | {"workdir": place} | more),
  )
  # Stopped in the middle, and continued by a machine that has nothing of it.
  stopped = []

  def stop(record):
    if record["step"] == 5 and not stopped:
      stopped.append(1)
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    sft_jax.train(config(), on_record=stop)
  storage.shutil.rmtree(storage.cache_folder() / "workdirs")
  found = sft_jax.train(config())
  resumed = run_files.read(place)["incidents"]
  assert [(x["kind"], x["step"]) for x in resumed] == [("resumed", 4)]
  assert left(place) == left(alone.workdir)
  same = lambda x, y: np.testing.assert_array_equal(x, y)
  jax.tree.map(same, found.params, alone.params)
  load_save.load_pretrained(f"{place}/export")
  export = hub.find_model(f"{place}/export").folder
  for name in ("model.safetensors", "config.json", "tokenizer.json"):
    there = (alone.workdir / "export" / name).read_bytes()
    assert (export / name).read_bytes() == there
  steps = {
    n.split("/")[0] for n in storage.list_objects(f"{place}/checkpoints")
  }
  assert steps == {"4", "6"}
  # Finished is finished, here and elsewhere.
  assert sft_jax.train(config()).metrics["export"] == found.metrics["export"]
  assert not (ROOT / f"{url.partition(':')[0]}:").exists()
  # Commands take its address.
  act = functools.partial(call, monkeypatch, capsys)
  storage.remove(f"{place}/report.html")
  assert act("report", place) == f"{place}/report.html\n"
  assert b"<html" in storage.read(f"{place}/report.html")
  page = tmp_path / "page.html"
  act("compare", place, alone.workdir, f"--out={page}")
  assert "<html" in page.read_text()
  item = {"messages": [{"role": "user", "content": "What goes with cat?"}]}
  item["checks"] = [{"check": "contains", "text": "pet"}]
  storage.write(f"{url}/items.jsonl", json.dumps(item).encode())
  few = ("--max_new_tokens=4",)
  data = (f"--data={url}/items.jsonl", f"--text={url}/rows.jsonl", *few)
  for model in (place, f"{place}/checkpoints/4", f"{place}/export"):
    act("evaluate", f"--model={model}", f"--baseline={url}/model", *data)
  for model in (place, f"{place}/export"):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What goes with cat?\n"))
    act("chat", f"--model={model}", *few)
  for out in (tmp_path / "again", f"{url}/again"):
    act("export", f"--workdir={place}", f"--out={out}")
    load_save.load_pretrained(out)
    again = hub.find_model(out).folder
    there = (alone.workdir / "export" / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == there
  assert "What goes with" in act("replay", f"--workdir={place}", "--step=1")


@both
def test_a_run_among_faults_is_an_undisturbed_one(
  url, tmp_path, buckets, quick
):
  """Each eighth request fails, and fewer each time that this ends the run."""
  model, rows = tiny.model_folder(tmp_path / "model"), tmp_path / "rows.jsonl"
  tiny.rows_file(rows)
  alone = sft_jax.train(tiny.config(tmp_path, model, rows, **CHOICES))
  storage.upload_folder(model, f"{url}/model", "config.json")
  storage.upload(rows, f"{url}/rows.jsonl")
  kinds = "503,429,drop,torn,slow,late,stale,412"
  buckets.fail(kinds, times=10**6, every=8)
  met = 0
  for tries in range(9):
    config = tiny.config(
      *(tmp_path, f"{url}/model", f"{url}/rows.jsonl"),
      **(CHOICES | {"workdir": f"{url}/run"}),
    )
    try:
      found = sft_jax.train(config)
      break
    except (OSError, ValueError) as error:
      print(f"try {tries}: {error}")
      met += 10**6 - buckets.left()
      buckets.fail(kinds, times=10**6, every=8 * 2**tries)
  met += 10**6 - buckets.left()
  buckets.fail("", times=0)
  print(f"{met} faults in {tries + 1} tries")
  assert met > 5
  assert left(f"{url}/run") == left(alone.workdir)
  jax.tree.map(np.testing.assert_array_equal, found.params, alone.params)


@pytest.mark.parametrize("scheme", [gs])
def test_two_processes_that_share_no_disk(url, tmp_path):
  """Four devices each, stopped and continued: one process of eight."""
  model, rows = tiny.model_folder(tmp_path / "model"), tmp_path / "rows.jsonl"
  tiny.rows_file(rows)
  sizes = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
  choices = CHOICES | sizes | {"batch_size": 16, "steps": 6}
  alone = sft_jax.train(tiny.config(tmp_path, model, rows, **choices))
  storage.upload_folder(model, f"{url}/model", "config.json")
  storage.upload(rows, f"{url}/rows.jsonl")
  choices |= {
    "model__path": f"{url}/model",
    "data__train": f"{url}/rows.jsonl",
    "workdir": f"{url}/run",
  }
  homes = [tmp_path / "machine_0", tmp_path / "machine_1"]
  for code, said in finish(
    start(tmp_path / "two", choices, homes=homes), tmp_path / "two", 300
  ):
    assert code == 0, said
  found, wanted = run_files.read(f"{url}/run"), run_files.read(alone.workdir)
  assert len(found["metrics"]) == len(wanted["metrics"])
  for one, other in zip(found["metrics"], wanted["metrics"], strict=True):
    assert one.get("data/chain") == other.get("data/chain")
    for name, value in other.items():
      if name.split("/")[0] in ("loss", "held_out"):
        np.testing.assert_allclose(one[name], value, rtol=2e-4, err_msg=name)
  _, got = load_save.load_pretrained(f"{url}/run/export")
  _, want = load_save.load_pretrained(alone.workdir / "export")
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), got, want
  )
  # Other machines, one for two, continue from the bucket alone.
  storage.remove(f"{url}/run/checkpoints/6")
  storage.remove(f"{url}/run/result.json")
  one = tiny.config(tmp_path, "", "", **choices)
  sft_jax.train(one)
  happened = run_files.read(f"{url}/run")["incidents"]
  assert [(x["kind"], x["step"]) for x in happened] == [("resumed", 4)]
