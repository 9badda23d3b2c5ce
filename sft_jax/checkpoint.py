"""Checkpoints on Orbax: saved whole, verified by digest when restored.

Orbax writes asynchronously and commits atomically, but does not notice a
flipped bit in a committed file. So every array's digest is stored beside it,
and a checkpoint that does not hold what was saved is set aside for an older
one, never loaded and never deleted.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32
from orbax.checkpoint import v1 as ocp


class Restored(NamedTuple):
  """What a checkpoint held.

  Attributes:
    step: the number of steps taken when it was saved.
    state: the tree of arrays, on the shardings asked for.
    meta: the JSON-like dict saved with it.
  """

  step: int
  state: Any
  meta: dict[str, Any]


@jax.jit
def digest(x: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
  """64 bits that change whenever any one element of `x` changes.

      d_j = sum_i mix(bits(x_i) + i * odd_j)  mod 2**32,  j = 0, 1

  where mix is a bijection of 32-bit words (Murmur3's finaliser). Integer
  sums wrap exactly, so the digest is the same on any sharding and device. It
  guards against decay, not against an adversary.
  """
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  width = x.dtype.itemsize * 8
  bits = jax.lax.bitcast_convert_type(x, f"uint{min(width, 32)}")
  bits = bits.astype(jnp.uint32)
  index = jnp.zeros(bits.shape, jnp.uint32)
  for axis, size in enumerate(bits.shape):
    index = index * np.uint32(size) + jax.lax.broadcasted_iota(
      jnp.uint32, bits.shape, axis
    )

  def mixed_sum(odd: int) -> Array:
    word = bits + (index + 1) * np.uint32(odd)
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return (word ^ (word >> 16)).sum(dtype=jnp.uint32)

  return jnp.stack([mixed_sum(0x9E3779B1), mixed_sum(0x7FEB352D)])


def digests(tree: Any) -> dict[str, str]:
  """{path of leaf: 16 hex digits} over all arrays of any tree."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  values = jax.device_get([digest(jnp.asarray(x)) for _, x in leaves])
  return {
    jax.tree_util.keystr(path): f"{int(v[0]):08x}{int(v[1]):08x}"
    for (path, _), v in zip(leaves, values, strict=True)
  }


class Checkpoints:
  """The checkpoints of one run, under `directory`."""

  def __init__(self, directory: Path, *, keep: int):
    """Opens (or creates) the folder; keeps the newest `keep` steps."""
    self._directory = directory
    self._keep = keep
    self._open()

  def _open(self) -> None:
    self._directory.mkdir(parents=True, exist_ok=True)
    # Orbax's policies do not match its own protocol in a type checker's eyes.
    every_save: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
    newest: Any = ocp.training.preservation_policies.LatestN(self._keep)
    self._orbax = ocp.training.Checkpointer(
      str(self._directory.absolute()),
      save_decision_policy=every_save,
      preservation_policy=newest,
    )

  def steps(self) -> list[int]:
    """Committed steps, oldest first."""
    return sorted(c.step for c in self._orbax.checkpoints)

  def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Starts a save of a tree of arrays and a JSON-like dict.

    The arrays are copied before this returns; writing goes on behind. The
    failure of an earlier save surfaces here, or in `wait`.
    """
    metadata: dict[str, Any] = {"meta": meta, "digests": digests(state)}
    self._orbax.save_checkpointables_async(
      step, {"state": state}, custom_metadata=metadata
    )

  def restore(
    self, abstract: Any, announce: Callable[[str], None]
  ) -> Restored | None:
    """The newest checkpoint that verifies, or None if there is none at all.

    Args:
      abstract: tree of jax.ShapeDtypeStruct with shardings.
      announce: called with a line for every checkpoint that is rejected.

    Raises:
      ValueError: there are checkpoints and none of them verifies.
    """
    steps = self.steps()
    for step in reversed(steps):
      try:
        return self._load(step, abstract)
      except Exception as error:
        # Whatever a damaged file makes Orbax raise, the answer is the same:
        # say so, and try the step before.
        aside = self._set_aside(step)
        reason = " ".join(str(error).split())[:300]
        announce(
          f"checkpoint {step} rejected ({type(error).__name__}: {reason}); "
          f"set aside as {aside}"
        )
    if steps:
      raise ValueError(
        f"{self._directory}: none of the checkpoints {steps} could be "
        "restored, expected one that verifies. They are in "
        f"{self._rejected()}; start again in a new workdir."
      )
    return None

  def _load(self, step: int, abstract: Any) -> Restored:
    metadata = self._orbax.checkpointables_metadata(step)
    custom: Any = metadata.custom_metadata
    if not isinstance(custom, dict) or "digests" not in custom:
      raise ValueError("its digests are missing")
    loaded = self._orbax.load_checkpointables(step, {"state": abstract})
    state = loaded["state"]
    expected, got = custom["digests"], digests(state)
    wrong = sorted(
      path
      for path in expected.keys() | got.keys()
      if expected.get(path) != got.get(path)
    )
    if wrong:
      raise ValueError(f"digest mismatch in {wrong[:3]} ({len(wrong)} arrays)")
    return Restored(step, state, custom["meta"])

  def _rejected(self) -> Path:
    return self._directory.with_name(self._directory.name + "_rejected")

  def _set_aside(self, step: int) -> Path:
    self._orbax.close()
    self._rejected().mkdir(exist_ok=True)
    target = self._rejected() / str(step)
    number = 0
    while target.exists():
      number += 1
      target = self._rejected() / f"{step}.{number}"
    shutil.move(self._directory / str(step), target)
    self._open()
    return target

  def wait(self) -> None:
    """Returns when the save under way is on disk; raises if it failed."""
    self._orbax.wait()

  def close(self) -> None:
    """Waits for the save under way and lets go of the folder."""
    self._orbax.close()
