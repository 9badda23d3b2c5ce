"""Copies in the memory of hosts: to the bit, found on others, or not used."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

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
from sft_jax.training.build import outputs

LIMIT = 120  # Seconds: a hang fails.
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
import json
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
    held = [[copy.step, len(copy.lacking)] for copy in found]
    # Gloo writes to stdout, and into lines.
    Path(f"{folder}/{process}.said").write_text(json.dumps([held, said]))
    for copy in found:
      got = local.load(copy, tests.abstract(state))
      assert not digests.damaged(copy.manifest["arrays"], got)
      for name, x in got.items():
        for a, b in zip(x.addressable_shards, state[name].addressable_shards):
          assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
"""


def pair(folder, what) -> list:
  """Two processes of four devices save or restore; [[step, arrays lacking]]
  of what each found, and what it said."""
  flags = "--xla_force_host_platform_device_count=4"
  here = Path(__file__).parent
  paths = os.pathsep.join(map(str, (ROOT, here, *sys.path)))
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
  try:
    ended = [process.communicate(timeout=LIMIT) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [p.returncode for p in processes] == [0, 0], ended
  return [json.loads(x.read_text()) for x in sorted(folder.glob("*.said"))]


@pytest.mark.slow
def test_a_host_that_is_new_gets_its_shards_from_another(tmp_path):
  """`data` is 2, across two real processes; one has lost its memory, then the
  older one of the other's copies is all there is, then nothing."""
  pair(tmp_path, "save")
  shutil.rmtree(tmp_path / "1")
  assert pair(tmp_path, "restore") == [[[[7, 4], [6, 4]], []]] * 2
  shutil.rmtree(tmp_path / "0" / "process_0" / "7")
  manifest = tmp_path / "0" / "process_0" / "6" / "manifest.json"
  assert pair(tmp_path, "restore") == [[[[6, 4]], []]] * 2
  manifest.unlink()
  assert pair(tmp_path, "restore") == [[[], []]] * 2


SHAPE = tiny.SHAPE | {
  **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
  **{"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8},
}


def timeless(folder) -> list[dict]:
  """Its records, without what says how fast they came."""
  timed = ("time/", "speed/", "mem")
  return [
    {key: value for key, value in one.items() if not key.startswith(timed)}
    for one in records(folder)
  ]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("devices", "kills"),
  [((1, 1), ((26, (0, 1), 1), (46, (0,), None))), ((4,), ((26, (0,), None),))],
  ids=["whole on each of two", "parts on one"],
)
def test_killed_runs_continue_from_memory(tmp_path, devices, kills):
  """Killed between checkpoints: both of two processes, and the machine of one
  is lost, whose shards the other has; then one of them, which ends the other;
  and a process whose devices hold a part each. The end is that of an
  undisturbed run, byte for byte.

  Each kill: after which step, which processes, whose memory is lost.
  """
  hosts = [tmp_path / f"host{i}" for i in range(len(devices))]
  for host in hosts:
    host.mkdir()
  choices = {
    "model__path": str(tiny.model_folder(tmp_path / "model", SHAPE)),
    "data__train": str(tiny.rows_file(tmp_path / "rows.jsonl")),
    "compile_cache": str(tmp_path / "compiled"),
    **{"steps": 60, "checkpoint__every": 20, "mesh__fsdp": max(devices)},
    **{"checkpoint__local_every": 2, "checkpoint__local_dir": "memory"},
  }
  begin = lambda workdir: start(
    workdir, choices, folders=hosts, devices=devices
  )

  def complete(workdir):
    for code, said in finish(begin(workdir), workdir, LIMIT):
      assert code == 0, said

  whole, killed = tmp_path / "whole", tmp_path / "killed"
  complete(whole)
  copied = []
  for step, victims, lost in kills:
    processes = begin(killed)
    wait_for_step(killed, processes, step, LIMIT)
    for i in victims:
      processes[i].kill()
    ended = finish(processes, killed, LIMIT)
    assert all(ended[i][0] == -signal.SIGKILL for i in victims), ended
    if lost is not None:
      shutil.rmtree(hosts[lost] / "memory")
    folders = tmp_path.glob("host*/memory/*/process_*/*")
    copied.append(max(int(p.name) for p in folders if p.name.isdigit()))
    folders = (killed / "checkpoints").iterdir()
    saved = max(int(p.name) for p in folders if p.name.isdigit())
    last = records(killed)[-1]["step"]
    assert saved < copied[-1] <= last < 60
    # The step being copied, and the one before it, are lost at most.
    assert last - 4 <= copied[-1]
  complete(killed)
  lines = (killed / "incidents.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == copied
  assert timeless(killed) == timeless(whole)
  one, other = (x / "export" / "model.safetensors" for x in (whole, killed))
  assert one.read_bytes() == other.read_bytes()
  assert not list(tmp_path.glob("host*/memory/*/process_*/*"))


@pytest.mark.slow
def test_a_run_of_one_process_continues_from_memory(tmp_path, monkeypatch):
  """Its checkpoints taken away; a new run in the workdir finds no copies.

  Who opens the checkpoints and does not run them leaves the copies alone.
  """
  model = tiny.model_folder(tmp_path / "model")
  rows = tiny.rows_file(tmp_path / "rows.jsonl")
  choices = {"export": False, "steps": 5, "checkpoint__every": 0}
  config = tiny.config(tmp_path, model, rows, **choices)
  config.checkpoint.local_every = 2
  config.checkpoint.local_dir = str(tmp_path / "memory")
  with monkeypatch.context() as patched:
    patched.setattr(LocalCopies, "remove", lambda *_: None)
    whole = sft_jax.train(config)
  outputs.open_checkpoints(config, whole.workdir).close()
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
