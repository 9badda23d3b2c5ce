"""Checkpoints come back bit for bit, or are refused and set aside."""

import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.checkpointing import digests, manager
from sft_jax.checkpointing.manager import Checkpoints
from sft_jax.common import sharding

# A read that fails half-way leaves Orbax coroutines unawaited.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


def make_state(seed: int):
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    "w": jax.random.normal(keys[0], (64, 128)),
    "b": jax.random.normal(keys[1], (7,)).astype(jnp.bfloat16),
    "count": jnp.asarray(seed, jnp.int32),
  }


def abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state,
  )


def equal(a, b) -> bool:
  return all(
    jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))
  )


def test_round_trip_and_retention(tmp_path):
  checkpoints = Checkpoints(tmp_path / "c", keep=2)
  for step in (1, 2, 3):
    checkpoints.save(step, make_state(step), {"note": f"at {step}"})
  checkpoints.close()
  again = Checkpoints(tmp_path / "c", keep=2)
  assert again.steps() == [2, 3]
  restored = again.restore(abstract(make_state(0)), pytest.fail)
  assert restored is not None
  assert (restored.step, restored.meta) == (3, {"note": "at 3"})
  assert equal(restored.state, make_state(3))


def test_nothing_there_is_none(tmp_path):
  empty = Checkpoints(tmp_path / "c", keep=1)
  assert empty.restore(abstract(make_state(0)), pytest.fail) is None


def test_restores_onto_another_mesh(tmp_path):
  state = {"w": make_state(1)["w"]}
  checkpoints = Checkpoints(tmp_path / "c", keep=1)
  checkpoints.save(1, state, {})
  checkpoints.close()
  mesh = sharding.make_mesh(1, 8, 1)
  target = {
    "w": jax.ShapeDtypeStruct(
      (64, 128), jnp.float32, sharding=sharding.row_sharding(mesh)
    )
  }
  restored = Checkpoints(tmp_path / "c", keep=1).restore(target, pytest.fail)
  assert restored is not None
  assert restored.state["w"].sharding == sharding.row_sharding(mesh)
  assert equal(restored.state, state)


def corrupt(path: Path, how: str) -> None:
  raw = bytearray(path.read_bytes())
  if how == "flip":
    raw[len(raw) // 2] ^= 0x10
  elif how == "truncate":
    raw = raw[: len(raw) // 2]
  path.write_bytes(raw) if how != "delete" else path.unlink()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
  """A folder with the steps 1 and 2, to be copied and damaged."""
  folder = tmp_path_factory.mktemp("saved") / "c"
  checkpoints = Checkpoints(folder, keep=2)
  for step in (1, 2):
    checkpoints.save(step, make_state(step), {"at": step})
  checkpoints.close()
  return folder


CLASSES = (
  "_CHECKPOINT_METADATA",
  "commit_success.txt",
  "state/_METADATA",
  "state/_sharding",
  "state/array_metadatas/process_0",
  "state/commit_success.txt",
  "state/d/*",
  "state/manifest.ocdbt",
  "state/ocdbt.process_0/d/*",
  "state/ocdbt.process_0/manifest.ocdbt",
)


def test_every_file_of_a_checkpoint_is_of_a_class_that_is_damaged(saved):
  step = saved / "2"
  known = {file for name in CLASSES for file in step.glob(name)}
  assert known == {file for file in step.rglob("*") if file.is_file()}


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
@pytest.mark.parametrize("name", CLASSES)
def test_damage_is_found_or_does_none(tmp_path, saved, name, how):
  """Whatever file is damaged, what is restored is what was saved then."""
  folder = Path(shutil.copytree(saved, tmp_path / "c"))
  for file in (folder / "2").glob(name):
    corrupt(file, how)
  said = []
  checkpoints = Checkpoints(folder, keep=2)
  restored = checkpoints.restore(abstract(make_state(0)), said.append)
  checkpoints.close()
  assert restored is not None
  assert restored.meta == {"at": restored.step}
  assert equal(restored.state, make_state(restored.step))
  if restored.step == 1:
    assert "checkpoint 2 rejected" in said[0]
    assert (tmp_path / "c_rejected" / "2").is_dir()
  # What holds numbers, or the manifest, is never read as if it were whole.
  if name in ("_CHECKPOINT_METADATA",):
    assert restored.step == 1


def test_every_bit_of_the_numbers_is_watched(tmp_path, saved):
  """One flipped bit in what is stored of the arrays, at 24 random places."""
  rng = np.random.default_rng(0)
  state, harmless = abstract(make_state(0)), 0
  for trial in range(24):
    folder = Path(shutil.copytree(saved, tmp_path / str(trial) / "c"))
    files = [f for f in (folder / "2" / "state").rglob("d/*") if f.is_file()]
    raw = [bytearray(f.read_bytes()) for f in files]
    at = int(rng.integers(max(map(len, raw))))
    for file, content in zip(files, raw, strict=True):
      # The same place in both copies that OCDBT may keep of small arrays.
      content[at % len(content)] ^= 1 << int(rng.integers(8))
      file.write_bytes(content)
    checkpoints = Checkpoints(folder, keep=2)
    restored = checkpoints.restore(state, lambda line: None)
    checkpoints.close()
    assert restored is not None
    assert equal(restored.state, make_state(restored.step))
    harmless += restored.step == 2
  assert harmless < 6


def test_arrays_that_are_not_those_of_the_manifest(tmp_path, monkeypatch):
  """What every layer below takes for whole, and is not what was saved."""
  checkpoints = Checkpoints(tmp_path / "c", keep=2)
  checkpoints.save(1, make_state(1), {})
  describe = digests.describe

  def of_another(tree, *rest):
    if isinstance(tree, dict) and "w" in tree:
      tree = tree | {"w": tree["w"].at[3, 5].add(1e-6)}
    return describe(tree, *rest)

  with monkeypatch.context() as patched:
    patched.setattr(digests, "describe", of_another)
    checkpoints.save(2, make_state(2), {})
  said = []
  restored = checkpoints.restore(abstract(make_state(0)), said.append)
  checkpoints.close()
  assert restored is not None
  assert restored.step == 1
  assert "digest mismatch in [\"['w']\"]" in said[0]


def test_all_damaged_is_an_error(tmp_path):
  checkpoints = Checkpoints(tmp_path / "c", keep=1)
  checkpoints.save(5, make_state(1), {})
  checkpoints.close()
  (tmp_path / "c" / "5" / "_CHECKPOINT_METADATA").unlink()
  again = Checkpoints(tmp_path / "c", keep=1)
  with pytest.raises(ValueError, match=r"none of the checkpoints \[5\]"):
    again.restore(abstract(make_state(0)), lambda line: None)


def test_retention_keeps_the_newest_every_nth_and_the_best(tmp_path):
  options = {"keep": 1, "keep_every": 4, "keep_best": "lowest"}
  checkpoints = Checkpoints(tmp_path / "c", **options)
  scores = {1: 0.9, 2: 0.3, 3: 0.5, 5: None}
  for step in range(1, 7):
    checkpoints.save(
      step, {"w": jnp.ones(step)}, {}, score=scores.get(step, 0.6)
    )
  checkpoints.wait()
  assert checkpoints.steps() == [2, 4, 6]
  assert checkpoints.best() == (2, 0.3)
  checkpoints.close()
  # The scores outlive the process.
  again = Checkpoints(tmp_path / "c", **options)
  assert again.best() == (2, 0.3)
  again.save(7, {"w": jnp.ones(1)}, {}, score=0.2)
  again.wait()
  assert again.steps() == [4, 7]
  again.close()


@pytest.mark.parametrize(
  ("best_is", "order"), [("lowest", [2, 1, 4]), ("highest", [3, 1, 4])]
)
def test_the_best_is_restored_or_else_the_next_best(tmp_path, best_is, order):
  """Of equals the oldest; one that was never scored is not asked."""
  checkpoints = Checkpoints(tmp_path / "c", keep=9, keep_best=best_is)
  for step, score in enumerate((0.5, 0.1, 0.9, 0.5, None), start=1):
    checkpoints.save(step, make_state(step), {}, score=score)
  checkpoints.wait()
  said = []
  for i, step in enumerate(order):
    if i:  # The one before is damaged now.
      for file in (tmp_path / "c" / str(order[i - 1])).glob("state/d/*"):
        corrupt(file, "truncate")
    found = checkpoints.restore(abstract(make_state(0)), said.append, best=True)
    assert found is not None
    assert found.step == step
    assert equal(found.state, make_state(step))
    assert len(said) == i
  checkpoints.close()


def test_another_dtype_is_an_error_unless_asked_for(tmp_path):
  checkpoints = Checkpoints(tmp_path / "c", keep=1)
  checkpoints.save(1, {"w": jnp.full(4, 1.001)}, {})
  target = {"w": abstract({"w": jnp.ones(4, jnp.bfloat16)})["w"]}
  with pytest.raises(ValueError, match=r"\['w'\]: dtype float32 -> bfloat16"):
    checkpoints.restore(target, pytest.fail)
  assert checkpoints.steps() == [1]
  restored = checkpoints.restore(target, pytest.fail, cast=True)
  assert restored is not None
  assert restored.state["w"].dtype == jnp.bfloat16
  assert (restored.state["w"] == jnp.bfloat16(1.001)).all()
  with pytest.raises(ValueError, match=r"shape \[4\] -> \[5\]"):
    checkpoints.restore(abstract({"w": jnp.ones(5)}), pytest.fail, cast=True)
  checkpoints.close()


def test_what_lies_beside_must_be_what_it_was(tmp_path):
  """Frozen parameters are not in the checkpoint, but their digests are."""
  base = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
  checkpoints = Checkpoints(tmp_path / "c", keep=1)
  checkpoints.save(1, {"lora": jnp.ones(4)}, {}, beside=base)
  target = abstract({"lora": jnp.ones(4)})
  assert checkpoints.restore(target, pytest.fail, beside=base) is not None
  files = [f for f in (tmp_path / "c").rglob("*") if f.is_file()]
  assert sum(f.stat().st_size for f in files) < base["kernel"].nbytes / 2
  other = {"kernel": base["kernel"].at[3, 4].add(1e-6)}
  with pytest.raises(ValueError, match=r"frozen parameters .*kernel"):
    checkpoints.restore(target, pytest.fail, beside=other)
  assert checkpoints.steps() == [1]
  checkpoints.close()


def test_restored_arrays_are_donated(tmp_path):
  """Warnings are errors here, and JAX warns of what it cannot donate."""
  mesh = sharding.make_mesh(1, 8, 1)
  state = {"w": jax.device_put(make_state(1)["w"], sharding.row_sharding(mesh))}
  checkpoints = Checkpoints(tmp_path / "c", keep=1)
  checkpoints.save(1, state, {})
  restored = checkpoints.restore(abstract(state), pytest.fail)
  checkpoints.close()
  assert restored is not None
  step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  after = step(restored.state)
  assert restored.state["w"].is_deleted()
  assert equal(after, {"w": state["w"] + 1})


def test_a_failed_save_is_an_error_at_the_next_step(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path / "c", keep=1)
  checkpoints.save(1, make_state(1), {})
  checkpoints.wait()

  def full(*arguments, **options):
    raise OSError(28, "No space left on device")

  manager = checkpoints._orbax._manager
  monkeypatch.setattr(manager, "_finalize_checkpoint", full)
  checkpoints.save(2, make_state(2), {})
  while checkpoints._orbax.is_saving_in_progress():
    time.sleep(0.01)
  with pytest.raises(OSError, match=r"checkpoint 2 .*No space left"):
    checkpoints.check()
  assert 1 in Checkpoints(tmp_path / "c", keep=1).steps()


def test_one_save_is_under_way_at_a_time(tmp_path, monkeypatch):
  """On a slow disk the next save waits; nothing piles up in memory."""
  checkpoints = Checkpoints(tmp_path / "c", keep=1)
  manager, busy, most = checkpoints._orbax._manager, [], []
  finalize = manager._finalize_checkpoint

  def slow(step):
    busy.append(step)
    most.append(len(busy))
    time.sleep(0.2)
    finalize(step)
    busy.remove(step)

  monkeypatch.setattr(manager, "_finalize_checkpoint", slow)
  for step in (1, 2, 3):
    checkpoints.save(step, make_state(step), {})
    checkpoints.check()  # Does not wait.
    assert checkpoints._orbax.is_saving_in_progress()
  checkpoints.close()
  assert most == [1, 1, 1]


def test_what_killed_saves_left_is_removed(tmp_path, saved):
  folder = Path(shutil.copytree(saved, tmp_path / "c"))
  shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
  checkpoints = Checkpoints(folder, keep=2)
  assert checkpoints.steps() == [1, 2]
  checkpoints.remove_unfinished()
  assert {path.name for path in folder.iterdir()} == {"1", "2"}
  checkpoints.close()


def test_a_checkpoint_is_removed_only_when_a_newer_one_is_on_the_disk(
  tmp_path, monkeypatch
):
  """Whatever a power cut takes, one checkpoint is whole."""
  synced = []

  def sync(folder):
    synced.append(folder.name)

  monkeypatch.setattr(manager, "sync_tree", sync)
  checkpoints = Checkpoints(tmp_path / "c", keep=2)
  for step in (1, 2, 3, 4):
    checkpoints.save(step, make_state(step), {})
    # This save removes step - 2 once it is whole.
    assert synced == [str(x) for x in range(1, step)]
  checkpoints.close()
  assert synced == ["1", "2", "3", "4"]
