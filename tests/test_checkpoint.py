"""Checkpoints come back bit for bit, or are refused and set aside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax import sharding
from sft_jax.checkpoint import Checkpoints, digest, digests

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


def test_every_single_bit_changes_the_digest():
  x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
  seen = {tuple(np.asarray(digest(jnp.asarray(x))))}
  raw = x.view(np.uint32)
  for i in range(3):
    for j in range(5):
      for bit in range(32):
        flipped = raw.copy()
        flipped[i, j] ^= np.uint32(1) << np.uint32(bit)
        seen.add(
          tuple(np.asarray(digest(jnp.asarray(flipped.view(np.float32)))))
        )
  assert len(seen) == 1 + 3 * 5 * 32


def test_digest_sees_order_and_not_sharding():
  x = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
  mesh = sharding.make_mesh(2, 4, 1)
  spread = jax.device_put(x, sharding.rows(mesh))
  assert digests({"x": x}) == digests({"x": spread})
  assert digests({"x": x}) != digests({"x": x[::-1]})


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
      (64, 128), jnp.float32, sharding=sharding.rows(mesh)
    )
  }
  restored = Checkpoints(tmp_path / "c", keep=1).restore(target, pytest.fail)
  assert restored is not None
  assert restored.state["w"].sharding == sharding.rows(mesh)
  assert equal(restored.state, state)


def corrupt(path, how: str) -> None:
  raw = bytearray(path.read_bytes())
  if how == "flip":
    raw[len(raw) // 2] ^= 0x10
  elif how == "truncate":
    raw = raw[: len(raw) // 2]
  path.write_bytes(raw) if how != "delete" else path.unlink()


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, how):
  checkpoints = Checkpoints(tmp_path / "c", keep=2)
  for step in (1, 2):
    checkpoints.save(step, make_state(step), {})
  checkpoints.close()
  largest = max(
    (p for p in (tmp_path / "c" / "2").rglob("*") if p.is_file()),
    key=lambda p: p.stat().st_size,
  )
  corrupt(largest, how)
  said = []
  again = Checkpoints(tmp_path / "c", keep=2)
  restored = again.restore(abstract(make_state(0)), said.append)
  assert restored is not None
  assert restored.step == 1
  assert equal(restored.state, make_state(1))
  assert len(said) == 1
  assert "checkpoint 2 rejected" in said[0]
  assert (tmp_path / "c_rejected" / "2").is_dir()


def test_all_damaged_is_an_error(tmp_path):
  checkpoints = Checkpoints(tmp_path / "c", keep=1)
  checkpoints.save(5, make_state(1), {})
  checkpoints.close()
  (tmp_path / "c" / "5" / "_CHECKPOINT_METADATA").unlink()
  again = Checkpoints(tmp_path / "c", keep=1)
  with pytest.raises(ValueError, match=r"none of the checkpoints \[5\]"):
    again.restore(abstract(make_state(0)), lambda line: None)
