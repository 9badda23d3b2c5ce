"""Two processes of four devices are one process of eight."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import sft_jax
import tiny
from host_runs import (
  ROOT,
  finish,
  free_port,
  records,
  start,
  wait_for,
  wait_for_step,
)
from sft_jax.common import distributed, lifeline, trees
from sft_jax.models.hf import load_save

HELD_OUT = [
  {"instruction": f"What goes with {word}?", "output": f"The {word}."}
  for word in ("bee", "tea", "sea")
]
CHOICES = {
  "steps": 6,
  "batch_size": 16,
  "accum_steps": 2,
  "mesh__data": 2,
  "mesh__fsdp": 2,
  "mesh__tensor": 2,
  "checkpoint__every": 2,
  "checkpoint__keep": 9,
  "eval__max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
  """Keys of a config: a model, rows, held-out rows, behaviors."""
  folder = tmp_path_factory.mktemp("hosts")
  behaviors = folder / "behaviors.jsonl"
  behaviors.write_text(
    "".join(
      json.dumps(
        {
          "messages": [{"role": "user", "content": f"What goes with {word}?"}],
          "checks": [{"check": "contains", "text": "The"}],
          "group": "pairs",
        }
      )
      + "\n"
      for word in ("cat", "dog", "hat")
    )
  )
  return {
    "model__path": str(tiny.model_folder(folder / "model")),
    "data__train": str(tiny.rows_file(folder / "rows.jsonl")),
    "data__eval": str(tiny.rows_file(folder / "held_out.jsonl", HELD_OUT)),
    "eval__behaviors": str(behaviors),
  }


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path, inputs):
  alone = sft_jax.train(
    tiny.config(
      tmp_path / "alone", **_paths(inputs), **CHOICES | _others(inputs)
    )
  )
  workdir = tmp_path / "two"
  for code, said in finish(start(workdir, CHOICES | inputs), workdir, 600):
    assert code == 0, said
  # The same losses of the same rows: the chain digests what was trained on.
  ours, theirs = records(alone.workdir), records(workdir)
  assert [r["step"] for r in ours] == [r["step"] for r in theirs]
  for one, other in zip(ours, theirs, strict=True):
    assert one.get("data/chain") == other.get("data/chain")
    for name, value in one.items():
      if name.split("/")[0] in ("loss", "acc", "optim", "held_out"):
        np.testing.assert_allclose(other[name], value, rtol=2e-4, err_msg=name)
  # The same parameters and checkpoints, and one of each file.
  _, want = load_save.load_pretrained(alone.workdir / "export")
  _, got = load_save.load_pretrained(workdir / "export")
  for path, x in trees.flatten(want).items():
    np.testing.assert_allclose(trees.flatten(got)[path], x, atol=2e-5)
  names = lambda folder: sorted(
    # An events file is named by its second and machine.
    re.sub(r"tfevents.*", "tfevents", str(p.relative_to(folder)))
    for p in folder.rglob("*")
    if "checkpoints/" not in str(p) and "cache" not in str(p)
  )
  assert names(alone.workdir) == names(workdir)
  steps = lambda folder: sorted(
    p.name for p in (folder / "checkpoints").iterdir()
  )
  assert steps(alone.workdir) == steps(workdir)
  result = lambda folder: json.loads((folder / "result.json").read_text())
  assert [b["n"] for b in result(workdir)["behaviors"]] == [3]
  for one, other in zip(
    result(alone.workdir)["losses"], result(workdir)["losses"], strict=True
  ):
    np.testing.assert_allclose(other["after"], one["after"], rtol=1e-3)


def _paths(inputs: dict) -> dict:
  return {"model": inputs["model__path"], "train": inputs["data__train"]}


def _others(inputs: dict) -> dict:
  return {
    k: v for k, v in inputs.items() if k not in ("model__path", "data__train")
  }


@pytest.mark.slow
def test_a_signal_to_one_stops_both_at_the_same_step(tmp_path, inputs):
  """Saved, exit 75."""
  workdir, choices = tmp_path / "two", CHOICES | inputs | {"steps": 400}
  choices |= {"checkpoint__every": 0, "export": False}
  processes = start(workdir, choices)
  wait_for_step(workdir, processes, 2)
  processes[1].send_signal(signal.SIGTERM)
  ended = finish(processes, workdir, 120)
  stopped = []
  for code, said in ended:
    assert code == 75, said
    stopped.append(re.search(r"stopped by signal after step (\d+)", said)[1])
  assert stopped[0] == stopped[1]
  (saved,) = (workdir / "checkpoints").iterdir()
  assert saved.name == stopped[0]
  assert int(stopped[0]) < 400


@pytest.mark.slow
def test_what_two_processes_began_one_finishes(tmp_path, inputs):
  """Stopped by a signal, resumed by one process of eight devices."""
  choices = CHOICES | inputs | {"steps": 60, "checkpoint__every": 20}
  choices |= {"eval__behaviors": "", "export": False}
  workdir = tmp_path / "two"
  processes = start(workdir, choices)
  wait_for_step(workdir, processes, 2)
  processes[0].send_signal(signal.SIGTERM)
  for code, said in finish(processes, workdir, 120):
    assert code == 75, said
  begun = records(workdir)
  at = begun[-1]["step"]
  assert 2 <= at < 60
  one = tiny.config(tmp_path, "", "", **choices)
  one.workdir = str(workdir)
  # Every array restored is compared with its digest, whatever the sharding.
  assert sft_jax.train(one).workdir == workdir
  one.workdir = str(tmp_path / "alone")
  sft_jax.train(one)
  found, wanted = records(workdir), records(tmp_path / "alone")
  assert found[: len(begun)] == begun
  # At the step of the stop there is a record more, of what was lost with it.
  elsewhere = lambda all_: [r for r in all_ if r["step"] != at]
  assert found[-1]["step"] == 60
  for record, other in zip(elsewhere(found), elsewhere(wanted), strict=True):
    assert record["step"] == other["step"]
    assert record.get("data/chain") == other.get("data/chain")
    if "optim/grad_norm" not in record:
      continue  # An evaluation's, not a step's.
    for name in ("loss/nats_per_token", "optim/grad_norm"):
      np.testing.assert_allclose(record[name], other[name], rtol=2e-3)
    if record["step"] == at + 1:
      np.testing.assert_allclose(
        record["loss/nats_per_token"], other["loss/nats_per_token"], rtol=1e-4
      )
  happened = (workdir / "incidents.jsonl").read_text()
  assert "resumed" in happened
  assert "rejected" not in happened
  assert not (workdir / "checkpoints_rejected").exists()


@pytest.mark.slow
def test_the_same_command_continues_on_other_machines(tmp_path, inputs):
  """A process killed while it saves; then fewer devices, more, and all."""
  choices = CHOICES | _keys(inputs) | {"steps": 40, "checkpoint__every": 1}
  choices |= {"eval__behaviors": "", "export": False, "checkpoint__keep": 2}
  choices |= {"mesh__data": 1, "mesh__fsdp": -1}
  cache = {"compile_cache": str(tmp_path / "cache")}
  workdir = tmp_path / "moved"
  stays, ends = {"mesh__fsdp": 2}, {"mesh__fsdp": -1}
  kills = (((4, 4), 4, 1, {}), ((4,), 12, 0, stays), ((8,), 20, 0, ends))
  for devices, step, victim, mesh in kills:
    processes = start(workdir, choices | cache | mesh, devices=devices)
    wait_for_step(workdir, processes, step)
    processes[victim].kill()
    ended = finish(processes, workdir, 60)
    assert ended[victim][0] == -signal.SIGKILL
    assert all(code == 1 for code, _ in ended[:victim] + ended[victim + 1 :])
  # A mesh that does not fit what is left is a line with its cure.
  processes = start(workdir, choices | stays, devices=(2,))
  ((code, said),) = finish(processes, workdir, 100)
  assert code == 2
  assert re.search(
    r"error: mesh: got .*fsdp=2.* for 2 devices, .*to -1\.", said
  )
  for code, said in finish(start(workdir, choices | cache), workdir, 300):
    assert code == 0, said
  one = tiny.config(tmp_path, "", "", **choices)
  one.workdir = str(tmp_path / "alone")
  sft_jax.train(one)
  found, wanted = records(workdir), records(tmp_path / "alone")
  assert [r["step"] for r in found] == list(range(1, 41))
  for record, other in zip(found, wanted, strict=True):
    for name in ("step", "data/chain", "data/rows_seen", "data/tokens"):
      assert record[name] == other[name]
    for name in ("loss/nats_per_token", "optim/grad_norm"):
      np.testing.assert_allclose(record[name], other[name], rtol=1e-4)
  lost = json.loads((workdir / "result.json").read_text())["interruptions"]
  assert lost["times"] == 3
  assert lost["start_s"] > 0
  assert lost["away_s"] > 0


def test_the_lifeline_speaks_before_jax():
  """JAX asks twice in its time, and ends without a name at the first."""
  assert distributed._HEARTBEAT / 2 > lifeline.SILENCE + 2 * lifeline.BEAT


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_gone_the_other_names_it(tmp_path, inputs, victim, how):
  workdir = tmp_path / "two"
  processes = start(workdir, CHOICES | inputs | {"steps": 100_000})
  wait_for_step(workdir, processes, 2)
  processes[victim].send_signal(how)
  begin = time.monotonic()
  try:
    code = processes[1 - victim].wait(60)
  finally:
    processes[victim].kill()  # A stopped one does not end by itself.
    (_, said) = finish(processes, workdir, 0)[1 - victim]
  assert time.monotonic() - begin < 60
  assert code == 1, said
  assert f"error: process {victim} of 2, on " in said, said
  assert "is gone" in said


@pytest.mark.slow
def test_a_late_start_and_a_signal_while_waiting(tmp_path, inputs):
  workdir = tmp_path / "two"
  choices = CHOICES | _others(inputs) | _keys(inputs) | {"steps": 4}
  choices |= {"eval__behaviors": "", "export": False}

  def waits(first):
    time.sleep(15)
    assert first.poll() is None

  def asked_to_end(first):
    waits(first)
    first.terminate()
    assert first.wait(20) in (-signal.SIGTERM, 75)

  first, second = start(workdir, choices, between=asked_to_end)
  second.kill()
  finish([first, second], workdir, 20)
  # Nothing remains of it that would hinder the next.
  for code, said in finish(
    start(workdir, choices, between=waits), workdir, 400
  ):
    assert code == 0, said


@pytest.mark.slow
def test_signals_while_saving_and_loading_change_nothing(tmp_path, inputs):
  """A save is always under way; the end is that of an undisturbed pair."""
  choices = CHOICES | _keys(inputs) | {"checkpoint__every": 1, "steps": 8}
  choices |= {"eval__behaviors": "", "compile_cache": str(tmp_path / "cache")}
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  for code, said in finish(start(whole, choices), whole, 500):
    assert code == 0, said
  # While it saves, both stop after the same step; while it loads, one stops
  # at once, and the other with it.
  for victim, saving in ((0, True), (1, False)):
    processes = start(stopped, choices)
    if saving:
      wait_for_step(stopped, processes, 2)
    else:
      out = tmp_path / "stopped.0.out"
      wait_for(lambda out=out: "Loading" in out.read_text(), processes)
    processes[victim].terminate()
    for code, said in finish(processes, stopped, 300):
      assert code == 75, said
      assert "stopped by" in said
  for code, said in finish(start(stopped, choices), stopped, 500):
    assert code == 0, said
  timeless = lambda folder: [
    {k: v for k, v in one.items() if not k.startswith(_CLOCK)}
    for one in records(folder)
  ]
  assert timeless(stopped) == timeless(whole)
  one, other = (x / "export" / "model.safetensors" for x in (whole, stopped))
  assert one.read_bytes() == other.read_bytes()


_CLOCK = ("time/", "speed/", "memory/")


def _keys(inputs: dict) -> dict:
  return {k: inputs[k] for k in ("model__path", "data__train")}


@pytest.mark.parametrize("given", [("h:1", 0, -1), ("", 2, 0), ("h:1", 2, -1)])
def test_half_an_address_is_refused(given):
  with (
    pytest.raises(ValueError, match="--coordinator, --processes, --process"),
    distributed.joined(*given),
  ):
    pass


def test_alone_nothing_is_joined_and_wishes_are_read_at_once():
  with distributed.joined(), distributed.first_alone():
    wished = distributed.Agreement(None, behind=2)
    assert [wished(x) for x in (False, True)] == [False, True]


_PATHWAYS = """
import sys, types
import jax
from jax._src import xla_bridge
from sft_jax.common import distributed

def initialize():
  print("initialize", xla_bridge.backends_are_initialized())
  jax.config.update("jax_platforms", "cpu")  # As if the proxy had devices.

if "installed" in sys.argv:
  sys.modules["pathwaysutils"] = types.SimpleNamespace(initialize=initialize)
jax.distributed.initialize = lambda *_, **__: print("distributed")
given = ("h:1", 2, 0) if "given" in sys.argv else ()
try:
  with distributed.joined(*given):
    print(jax.process_count(), jax.devices()[0].platform)
except ValueError as error:
  print(error)
"""


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["installed"], "initialize False\n1 cpu\n"),
    ([], "JAX_PLATFORMS: got 'proxy', .* pip install pathwaysutils, or unset"),
    (["installed", "given"], "initialize False\n--coordinator: got 'h:1' with"),
  ],
)
def test_pathways_is_started_before_jax(words, said):
  """Once; with a package that is not the real one, which needs a cloud."""
  found = _child(_PATHWAYS, *words, JAX_PLATFORMS="proxy", SLURM_JOB_ID="1")
  assert re.match(said, found), found
  assert found.count("\n") == (2 if "installed" in words else 1)


_SERVICE = """
import os, signal, sys, time
import jax

heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
jax.config.update("jax_enable_preemption_service", "on" in sys.argv)
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 1, 0)
os.kill(os.getpid(), signal.SIGTERM)
deadline = time.monotonic() + 3
while not heard and time.monotonic() < deadline:
  time.sleep(0.1)
print(len(heard), signal.getsignal(signal.SIGTERM) != signal.SIG_DFL)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("service", "heard"), [("off", 1), ("on", 0)])
def test_why_jaxs_preemption_service_is_off(service, heard):
  """It takes SIGTERM from Python, which believes to have it: no run would
  end while it loads. If this fails, JAX has changed: see `joined`."""
  found = _child(_SERVICE, str(free_port()), service, JAX_PLATFORMS="cpu")
  assert found == f"{heard} True\n"


def _child(code: str, *words: str, **environment: str) -> str:
  return subprocess.run(
    [sys.executable, "-c", code, *words],
    env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    stdout=subprocess.PIPE,
    text=True,
    timeout=120,
    check=True,
  ).stdout


@pytest.fixture
def pod(monkeypatch):
  """Gives this process the environment of a pod."""
  for name in ("JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS"):
    monkeypatch.delenv(name, raising=False)

  def become(host="run-workers-0-3.run.default.svc", **env):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(distributed.socket, "getfqdn", lambda: host)
    for name, value in env.items():
      monkeypatch.setenv(name, value)

  return become


def kubernetes(monkeypatch, count):
  """The package is here, and says how many pods the job has."""
  from jax._src.clusters import K8sCluster

  monkeypatch.setattr(
    distributed.importlib.util, "find_spec", lambda name: name == "kubernetes"
  )
  monkeypatch.setattr(K8sCluster, "is_env_present", classmethod(lambda _: True))
  monkeypatch.setattr(K8sCluster, "get_process_count", classmethod(count))
  return K8sCluster


@pytest.mark.parametrize("package", [True, False])
def test_a_pod_that_is_no_job_is_alone_and_asks_nobody(
  pod, monkeypatch, package
):
  pod()
  if package:
    kubernetes(monkeypatch, lambda _: pytest.fail("asked"))
  with distributed.joined():
    pass


def test_pods_of_a_job_find_one_another(pod, monkeypatch):
  pod(JOB_COMPLETION_INDEX="3")
  cluster = kubernetes(monkeypatch, lambda _: 8)
  assert distributed._detected() == {}  # JAX asks Kubernetes itself.
  coordinator = lambda _, timeout_secs, override_coordinator_port: "pod-0:8476"
  for name, answer in (
    ("get_coordinator_address", coordinator),
    ("get_process_id", lambda _: 3),
  ):
    monkeypatch.setattr(cluster, name, classmethod(answer))
  assert distributed._found_by_jax() == {
    "coordinator_address": "pod-0:8476",
    "num_processes": 8,
    "process_id": 3,
    "local_device_ids": None,
  }
  kubernetes(monkeypatch, lambda _: 1)
  assert distributed._detected() is None

  def refused(_):
    raise RuntimeError("Kubernetes API Error: 403\nForbidden")

  kubernetes(monkeypatch, refused)
  with pytest.raises(ValueError, match=r"403 Forbidden.*may read pods"):
    distributed._detected()


def test_pods_of_a_job_without_the_package(pod, monkeypatch):
  monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda _: None)
  pod(JOB_COMPLETION_INDEX="3")
  with pytest.raises(ValueError, match=r"pod 3 .*JAX_NUM_PROCESSES"):
    distributed._detected()
  pod(JAX_NUM_PROCESSES="8")
  assert distributed._detected() == {
    "coordinator_address": "run-workers-0-0.run:55527",
    "num_processes": 8,
    "process_id": 3,
  }
  pod(host="run-workers-0-3")
  with pytest.raises(ValueError, match="subdomain"):
    distributed._detected()
  pod(JAX_NUM_PROCESSES="1")
  assert distributed._detected() is None
