"""Continuing where a run stopped: its config, its data, its newest state."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sft_jax.checkpointing.manager import Checkpoints
from sft_jax.common import trees
from sft_jax.data.store.fingerprint import differences
from sft_jax.step.train_step import TrainState


class Resumed(NamedTuple):
  """Where a run continues.

  Attributes:
    state: on its devices.
    loop: what the loop saved besides arrays; {} at the start.
    changes: how the data differ from what the checkpoint was made from, where
      that was forced.
  """

  state: TrainState
  loop: dict[str, Any]
  changes: list[str]


def split_stored(state: TrainState) -> tuple[TrainState, trees.Tree]:
  """A state as (what a checkpoint holds, what it holds the digests of).

  The frozen parameters of the model's folder are there already, and many
  times the size of adapters. What adapters start from is not: it is saved.
  """
  own, base = trees.partition(state.frozen, lambda path: "lora_" in path)
  return state._replace(frozen=own), base


def restore(
  checkpoints: Checkpoints,
  fresh: TrainState,
  *,
  fingerprint: str,
  inputs: dict[str, Any],
  log: Callable[[str], None],
  force: bool = False,
) -> Resumed:
  """The newest state that verifies; the fresh one if there is none.

  Args:
    checkpoints: of the run.
    fresh: what training would start from; its arrays make room.
    fingerprint: of the training data that the config now gives.
    inputs: what that fingerprint is made from, to name a difference.
    log: called with a line for each checkpoint that is rejected.
    force: continues with other data, and with other dtypes.

  Raises:
    ValueError: the checkpoint was made from other data, or holds other arrays.
  """
  own, base = split_stored(fresh)
  abstract = _abstract(own)
  if checkpoints.steps():  # Makes room for what is about to be read.
    jax.tree.map(lambda x: x.delete(), own)
  restored = checkpoints.restore(abstract, log, beside=base, cast=force)
  if restored is None:
    return Resumed(fresh, {}, [])
  changed = []
  if restored.meta["data"] != fingerprint:
    changed = differences(restored.meta["data_fingerprint_inputs"], inputs)
    if not force:
      raise ValueError(
        f"checkpoint {restored.step}: made from other data than the config "
        "now gives:\n  " + "\n  ".join(changed) + "\nexpected the same. Undo "
        "the change, start in a new workdir, or continue with --force."
      )
  return Resumed(
    _with_base(restored.state, base), restored.meta["loop"], changed
  )


def restore_best(
  checkpoints: Checkpoints, state: TrainState, log: Callable[[str], None]
) -> TrainState:
  """The state of the best checkpoint, in place of the one given.

  Args:
    checkpoints: of the run, some of them scored.
    state: the newest; its arrays make room unless it is itself the best.
    log: called with a line for each checkpoint that is rejected.
  """
  best = checkpoints.best()
  if best is None or best[0] == int(state.step):
    return state
  own, base = split_stored(state)
  abstract = _abstract(own)
  jax.tree.map(lambda x: x.delete(), own)
  restored = checkpoints.restore(abstract, log, beside=base, best=True)
  assert restored is not None  # There is a best one.
  return _with_base(restored.state, base)


def _abstract(state: TrainState) -> TrainState:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def _with_base(state: TrainState, base: trees.Tree) -> TrainState:
  return state._replace(frozen=trees.merge(state.frozen, base))


# Where a run is and who watches it, which changes nothing that it computes.
_WITHOUT_EFFECT = (
  *("workdir", "compile_cache", "log/writers", "log/project"),
  *("profile/start", "profile/steps"),
)


def config_changes(config: Mapping[str, Any], workdir: Path) -> list[str]:
  """How a config differs from that of the run that the workdir holds."""
  path = workdir / "config.json"
  if not path.exists():
    return []
  old = trees.flatten(json.loads(path.read_text()))
  new = trees.flatten(json.loads(json.dumps(config)))
  return [
    f"{key.replace('/', '.')}: {old.get(key)!r} -> {new.get(key)!r}"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and key not in _WITHOUT_EFFECT
  ]


def check_same_config(changed: list[str], workdir: Path) -> None:
  """Raises ValueError with the difference if the workdir has another config."""
  if changed:
    raise ValueError(
      f"{workdir}: holds a run with another config:\n  "
      + "\n  ".join(changed)
      + "\nexpected the same. Undo the change, choose another workdir, or "
      "continue with --force."
    )
