"""Continuing where a run stopped: its config, its data, its newest state."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sft_jax.checkpointing.manager import Checkpoints
from sft_jax.common import sharding, trees
from sft_jax.common.workdir import find_json
from sft_jax.data.store.fingerprint import differences
from sft_jax.step.train_step import TrainState


class Origin(NamedTuple):
  """What a run is made from; a checkpoint holds it, and resuming compares.

  The files of the workdir that say the same are copies for people.

  Attributes:
    data: the fingerprint of the training data.
    data_fingerprint_inputs: what that is made from, to name a difference.
    model: config.json of the model's folder; its weights are compared by
      digest with the arrays beside the checkpoint.
    own: names of the loss and optimizer that are no config's.
  """

  config: dict[str, Any]
  data: str
  data_fingerprint_inputs: dict[str, Any]
  model: dict[str, Any]
  own: dict[str, str]


class Resumed(NamedTuple):
  """Where a run continues.

  Attributes:
    loop: what the loop saved besides arrays; {} at the start.
    changes: how what the run is made from differs from what the checkpoint
      was made from, where that was forced.
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
  origin: Origin,
  log: Callable[[str], None],
  *,
  force: bool = False,
  allowed: Sequence[str] = (),
) -> Resumed:
  """The newest state that verifies; the fresh one if there is none.

  Args:
    fresh: what training would start from; its arrays make room.
    log: called with a line for each checkpoint that is rejected.
    force: continues with another config, other data and other dtypes.
    allowed: keys of the config that may differ, and are no change.

  Raises ValueError: the checkpoint is of another run, or holds other arrays.
  """
  own, base = split_stored(fresh)
  abstract = _abstract(own)
  copies = checkpoints.find_copies(abstract, log)
  if copies or checkpoints.steps():  # Makes room for what is about to be read.
    jax.tree.map(lambda x: x.delete(), own)
  restored = checkpoints.restore(
    abstract, log, copies=copies, beside=base, cast=force
  )
  checkpoints.forget_copies(restored.step if restored else 0)
  if restored is None:
    return Resumed(fresh, {}, [])
  meta, step = restored.meta, restored.step
  changed = config_changes(meta["config"], origin.config, step, allowed)
  if changed and not force:
    check_same_config(changed, f"checkpoint {step}")
  now = origin._asdict()
  other = []
  if meta["data"] != origin.data:
    name = "data_fingerprint_inputs"
    other += differences(meta[name], now[name])
  model = lambda of: {"config.json": of["model"], "own": of["own"]}
  other += differences(model(meta), model(now))
  if other and not force:
    raise ValueError(
      f"checkpoint {step}: made from other data or another model than the "
      "config now gives:\n  " + "\n  ".join(other) + "\nexpected the same. "
      "Undo the change, start in a new workdir, or continue with --force."
    )
  state = _with_base(restored.state, base)
  return Resumed(state, meta["loop"], changed + other)


def restore_best(
  checkpoints: Checkpoints, state: TrainState, log: Callable[[str], None]
) -> TrainState:
  """The state of the best checkpoint that was scored, in place of the newest,
  whose arrays make room; `log` is called as by `restore`."""
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


# Where a run is, on which devices, who watches it: this changes nothing that
# it computes, but for the order of sums.
_WITHOUT_EFFECT = (
  *("workdir", "compile_cache", "log/writers", "log/project"),
  *("profile/start", "profile/steps"),
  *(f"mesh/{axis}" for axis in sharding.AXES),
)


def saved_config(
  checkpoints: Checkpoints, workdir: Path
) -> dict[str, Any] | None:
  """The config of the run that is in a workdir, if there is one.

  By the newest checkpoint; before there is one, by the copy in config.json.
  """
  if meta := checkpoints.newest_meta():
    return meta["config"]
  return find_json(workdir / "config.json")


# What --extend changes.
LENGTH = ("steps", "epochs", "optim/extended")


def config_changes(
  old: dict[str, Any],
  new: dict[str, Any],
  step: int = 0,
  allowed: Sequence[str] = (),
) -> list[str]:
  """What differs, a line for each key but those allowed; `step` is where the
  run continues."""
  before, after = (trees.flatten(json.loads(json.dumps(x))) for x in (old, new))
  lines = [
    f"{key.replace('/', '.')}: {before.get(key)!r} -> {after.get(key)!r}"
    for key in sorted((before.keys() | after.keys()) - {*allowed})
    if before.get(key) != after.get(key) and key not in _WITHOUT_EFFECT
  ]
  seen, now = (step * x.get("batch_size", 0) for x in (before, after))
  if seen != now:
    what = "skipped" if now > seen else "trained on again"
    lines.append(
      f"batch_size: the order of the data continues after {now} packs, and "
      f"{seen} were trained on: {abs(now - seen)} are {what}"
    )
  return lines


def check_same_config(changed: list[str], where: str) -> None:
  """Raises ValueError with the difference if there is another config."""
  if changed:
    lines = "\n  ".join(changed)
    raise ValueError(
      f"{where}: holds a run with another config:\n  {lines}\nexpected the "
      "same. Undo the change, choose another workdir, or continue with --force."
    )
