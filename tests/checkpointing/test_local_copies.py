"""Copies in the memory of hosts: to the bit, found on others, or not used."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sft_jax
import tiny
from host_runs import ROOT, finish, free_port, records, start, wait_for_step
from sft_jax.checkpointing.local_copies import LocalCopies
from sft_jax.checkpointing.manager import Checkpoints, Mismatch
from sft_jax.common import sharding

SPECS = {
  "w": PartitionSpec(None, "fsdp"),
  "half": PartitionSpec("tensor", "fsdp"),
  "mask": PartitionSpec("tensor"),
  "count": PartitionSpec(),
}


def make_state(seed: int, fsdp: int = 2):
  """Arrays in which a sum of floats would change bits: -0.0 and NaNs."""
  mesh = sharding.make_mesh(-1, fsdp, 2)
  rng = np.random.default_rng(seed)
  w = rng.normal(size=(3, 8)).astype(np.float32)
  w[0, :3] = -0.0, np.nan, np.float32(1e-42)
  host = {
    "w": w,
    "half": rng.normal(size=(4, 8)).astype(jnp.bfloat16) * -0.0,
    "mask": rng.random(8) < 0.5,
    "count": np.int32(seed),
  }
  place = lambda x, spec: jax.make_array_from_callback(
    np.shape(x), NamedSharding(mesh, spec), lambda index: np.asarray(x)[index]
  )
  return {name: place(x, SPECS[name]) for name, x in host.items()}


def abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state,
  )


def same_bits(a, b) -> bool:
  bits = lambda x: np.asarray(x).tobytes()
  return all(
    jax.tree.leaves(jax.tree.map(lambda x, y: bits(x) == bits(y), a, b))
  )


@pytest.fixture
def opened(tmp_path):
  """Opens the run, as its next process does; what it said is in `said`."""

  def run():
    local = LocalCopies(tmp_path / "memory" / "id")
    return Checkpoints(tmp_path / "c", keep=1, local=local)

  run.said = []
  run.folder = tmp_path / "memory" / "id" / "process_0"

  def restored(asked, **options):
    checkpoints = run()
    copies = checkpoints.find_copies(asked, run.said.append)
    return checkpoints.restore(asked, run.said.append, copies=copies, **options)

  run.restored = restored
  return run


def copied(opened, *steps):
  checkpoints = opened()
  for step in steps:
    state = make_state(step)
    checkpoints.copy(step, state, {"at": step}, beside={"base": state["w"]})
  checkpoints._local.wait()
  return checkpoints


def test_the_newest_of_two_comes_back_bit_for_bit(opened):
  copied(opened, 1, 2, 3)
  assert sorted(p.name for p in opened.folder.iterdir()) == ["2", "3"]
  (opened.folder / "4.part").mkdir()  # As a kill leaves it.
  asked, base = abstract(make_state(0)), {"base": make_state(3)["w"]}
  found = opened.restored(asked, beside=base)
  assert (found.step, found.meta, opened.said) == (3, {"at": 3}, [])
  assert same_bits(found.state, make_state(3))
  assert sorted(p.name for p in opened.folder.iterdir()) == ["2", "3"]
  with pytest.raises(Mismatch, match="local copy 3: the frozen parameters"):
    opened.restored(asked, beside={"base": make_state(2)["w"]})


@pytest.mark.parametrize("fault", ["bit", "cut", "manifest", "gone"])
def test_a_damaged_copy_is_not_used(opened, fault):
  copied(opened, 2, 3)
  shards, manifest = (
    opened.folder / "3" / x for x in ("shards", "manifest.json")
  )
  data = bytearray(shards.read_bytes())
  data[5] ^= 1
  if fault == "bit":
    shards.write_bytes(data)
  elif fault == "cut":
    shards.write_bytes(data[:-1])
  elif fault == "manifest":
    manifest.write_text(manifest.read_text().replace('"at": 3', '"at": 4'))
  else:
    shards.unlink()
  base = {"base": make_state(2)["w"]}
  if fault == "bit":  # The copy of step 3 was beside another base.
    base = {"base": make_state(3)["w"]}
    asked = abstract(make_state(0))
    with pytest.raises(Mismatch, match="local copy 2: the frozen"):
      opened.restored(asked, beside=base)
    assert "local copy 3 rejected (digest mismatch in" in opened.said[0]
    return
  found = opened.restored(abstract(make_state(0)), beside=base)
  assert found.step == 2
  assert same_bits(found.state, make_state(2))


def test_a_newer_checkpoint_wins_and_the_run_is_cleared(opened):
  checkpoints = copied(opened, 3)
  state = make_state(4)
  checkpoints.save(4, state, {}, beside={"base": state["w"]})
  checkpoints.wait()
  found = opened.restored(abstract(state), beside={"base": state["w"]})
  assert (found.step, opened.said) == (4, [])
  checkpoints.close()
  assert not list(opened.folder.iterdir())


def test_another_mesh_starts_from_the_checkpoint(opened):
  checkpoints = copied(opened, 3)
  state = make_state(2)
  checkpoints.save(2, state, {}, beside=None)
  checkpoints.wait()
  found = opened.restored(abstract(make_state(0, fsdp=4)))
  assert found.step == 2
  assert same_bits(found.state, state)
  (said,) = opened.said
  assert said.startswith("local copy 3 is not used: of ")
  checkpoints.forget_copies(2)  # Step 3 is taken again.
  assert not list(opened.folder.iterdir())


def test_shards_that_are_sent_keep_every_bit(opened):
  """As if some process lacked all of them."""
  checkpoints = copied(opened, 3)
  asked = abstract(make_state(0))
  (copy,) = checkpoints.find_copies(asked, opened.said.append)
  copy = copy._replace(lacking={path for path, _ in copy.owners})
  assert len(copy.lacking) == 4
  got = checkpoints._local.load(copy, asked)
  assert same_bits(got, make_state(3))
  assert jax.tree.map(lambda x: x.sharding, got) == jax.tree.map(
    lambda x: x.sharding, asked
  )


_HOST = """
import sys
from pathlib import Path
import jax
import numpy as np
from sft_jax.common import distributed
import test_local_copies as tests
from sft_jax.checkpointing import digests
from sft_jax.checkpointing.local_copies import LocalCopies

process, port, folder, what = sys.argv[1:]
with distributed.joined(f"localhost:{port}", 2, int(process)):
  local = LocalCopies(Path(folder) / process)
  state = tests.make_state(7)
  if what == "save":
    for step in (6, 7):
      arrays = digests.describe(state)
      local.save(step, state, {"step": step, "arrays": arrays})
    local.wait()
  else:
    said = []
    found = local.find(tests.abstract(state), 0, said.append)
    print([copy.step for copy in found], [len(copy.lacking) for copy in found])
    print(*said)
    for copy in found:
      got = local.load(copy, tests.abstract(state))
      assert not digests.damaged(copy.manifest["arrays"], got)
      for name, x in got.items():
        for a, b in zip(x.addressable_shards, state[name].addressable_shards):
          assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
"""


def pair(folder, what) -> list[list[str]]:
  """What two processes of four devices said."""
  flags = "--xla_force_host_platform_device_count=4"
  paths = os.pathsep.join(map(str, (ROOT, *sys.path)))
  port = str(free_port())
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", _HOST, str(i), port, str(folder), what],
      env={
        **os.environ,
        **{"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths},
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  ended = [process.communicate(timeout=120) for process in processes]
  assert [p.returncode for p in processes] == [0, 0], ended
  said = [out.splitlines() for out, _ in ended]
  return [[x for x in one if not x.startswith("[Gloo]")] for one in said]


@pytest.mark.slow
def test_a_host_that_is_new_gets_its_shards_from_another(tmp_path):
  """`data` is 2, across two real processes; one has lost its memory, then the
  older one of the other's copies is all there is, then nothing."""
  pair(tmp_path, "save")
  shutil.rmtree(tmp_path / "1")
  for out in pair(tmp_path, "restore"):
    assert out == ["[7, 6] [4, 4]", ""]
  shutil.rmtree(tmp_path / "0" / "process_0" / "7")
  manifest = tmp_path / "0" / "process_0" / "6" / "manifest.json"
  assert pair(tmp_path, "restore") == [["[6] [4]", ""]] * 2
  manifest.unlink()
  assert pair(tmp_path, "restore") == [["[] []", ""]] * 2


@pytest.fixture
def hosts(tmp_path):
  """(choices of a run whose copies are in each host's own folder, folders)."""
  folders = [tmp_path / name for name in ("host0", "host1")]
  for folder in folders:
    folder.mkdir()
  choices = {
    "model__path": str(tiny.model_folder(tmp_path / "model")),
    "data__train": str(tiny.rows_file(tmp_path / "rows.jsonl")),
    "compile_cache": str(tmp_path / "compiled"),
    **{"steps": 30, "batch_size": 16, "eval__behaviors": ""},
    **{"mesh__data": 2, "mesh__fsdp": 4, "checkpoint__every": 20},
    **{"checkpoint__local_every": 2, "checkpoint__local_dir": "memory"},
  }
  return choices, folders


@pytest.mark.slow
def test_killed_runs_continue_from_memory(tmp_path, hosts):
  """Both killed; then one machine lost, whose copies the other one has; then
  both lost: the end is that of an undisturbed pair, byte for byte."""
  choices, folders = hosts
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  for code, said in finish(start(whole, choices, folders=folders), whole, 300):
    assert code == 0, said
  begun = [0]
  for step, victim, lost in ((5, 0, ()), (11, 1, (1,)), (15, 0, (0, 1))):
    processes = start(killed, choices, folders=folders)
    wait_for_step(killed, processes, step)
    processes[victim].kill()
    ended = finish(processes, killed, 60)
    assert ended[victim][0] == -signal.SIGKILL
    begun.append(records(killed)[-1]["step"])
    for i in lost:  # Its memory is gone.
      shutil.rmtree(folders[i] / "memory")
  ended = finish(start(killed, choices, folders=folders), killed, 300)
  for code, said in ended:
    assert code == 0, said
  lines = (killed / "incidents.jsonl").read_text().splitlines()
  steps = [one["step"] for one in map(json.loads, lines)]
  # At most the step being copied, and the one before it, are lost; of two
  # machines without their memory, all since the checkpoint.
  assert len(steps) == 2
  assert begun[1] - 4 <= steps[0] <= begun[1]
  assert begun[2] - 4 <= steps[1] <= begun[2]
  assert begun[3] < 20
  timeless = lambda folder: [
    {
      k: v
      for k, v in one.items()
      if not k.startswith(("time/", "speed/", "mem"))
    }
    for one in records(folder)
  ]
  assert timeless(killed) == timeless(whole)
  one, other = (x / "export" / "model.safetensors" for x in (whole, killed))
  assert one.read_bytes() == other.read_bytes()
  for folder in folders:  # Nothing stays in memory.
    assert not list(folder.glob("memory/*/process_*/*"))


@pytest.mark.slow
def test_a_run_of_one_process_continues_from_memory(tmp_path, monkeypatch):
  """Its checkpoints taken away; a new run in the workdir finds no copies."""
  model = tiny.model_folder(tmp_path / "model")
  rows = tiny.rows_file(tmp_path / "rows.jsonl")
  choices = {"export": False, "steps": 5, "checkpoint__every": 0}
  config = tiny.config(tmp_path, model, rows, **choices)
  config.checkpoint.local_every = 2
  config.checkpoint.local_dir = str(tmp_path / "memory")
  with monkeypatch.context() as patched:
    patched.setattr(LocalCopies, "remove", lambda *_: None)
    whole = sft_jax.train(config)
  for name in ("checkpoints/5", "result.json"):
    path = whole.workdir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  again = sft_jax.train(config)
  text = (whole.workdir / "incidents.jsonl").read_text()
  assert [json.loads(x)["step"] for x in text.splitlines()] == [4]
  assert same_bits(again.params, whole.params)
  shutil.rmtree(whole.workdir)
  sft_jax.train(config)
  assert not (whole.workdir / "incidents.jsonl").exists()
