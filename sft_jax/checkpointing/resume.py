"""Going on where a run stopped: its config, its data, its newest state."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sft_jax.checkpointing.manager import Checkpoints
from sft_jax.common import trees
from sft_jax.data.store.fingerprint import differences
from sft_jax.step.train_step import TrainState
from sft_jax.training.build.build import Setup
from sft_jax.training.build.data import Config, Say


class Resumed(NamedTuple):
  """Where a run goes on.

  Attributes:
    state: on its devices.
    memory: what the loop remembers besides; {} at the start.
    breaks: how the data differ from what the checkpoint was made from, where
      that was forced.
  """

  state: TrainState
  memory: dict[str, Any]
  breaks: list[str]


def stored(state: TrainState) -> tuple[TrainState, trees.Tree]:
  """A state as (what a checkpoint holds, what it holds the digests of).

  The frozen parameters of the model's folder are there already, and many
  times the size of adapters. What adapters start from is not: it is saved.
  """
  own, base = trees.partition(state.frozen, lambda path: "lora_" in path)
  return state._replace(frozen=own), base


def restore(
  checkpoints: Checkpoints, run_: Setup, say: Say, *, force: bool = False
) -> Resumed:
  """The newest state that verifies; the fresh one if there is none.

  Args:
    checkpoints: of the run.
    run_: what the config now gives.
    say: told of every checkpoint that is rejected.
    force: goes on with other data, and with other dtypes.

  Raises:
    ValueError: the checkpoint was made from other data, or holds other arrays.
  """
  fresh, base = stored(run_.state)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    fresh,
  )
  if checkpoints.steps():  # Makes room for what is about to be read.
    jax.tree.map(lambda x: x.delete(), fresh)
  restored = checkpoints.restore(abstract, say, beside=base, cast=force)
  if restored is None:
    return Resumed(run_.state, {}, [])
  changed = []
  if restored.meta["data"] != run_.stream.fingerprint:
    changed = differences(
      restored.meta["data_fingerprint_inputs"], run_.stream.fingerprint_inputs
    )
    if not force:
      raise ValueError(
        f"checkpoint {restored.step}: made from other data than the config "
        "now gives:\n  " + "\n  ".join(changed) + "\nexpected the same. Undo "
        "the change, start in a new workdir, or go on with --force."
      )
  state = restored.state
  state = state._replace(frozen=trees.merge(state.frozen, base))
  return Resumed(state, restored.meta["memory"], changed)


def restore_best(
  checkpoints: Checkpoints, state: TrainState, say: Say
) -> TrainState:
  """The state of the best checkpoint, in place of the one given.

  Args:
    checkpoints: of the run, some of them scored.
    state: the newest; its arrays make room unless it is itself the best.
    say: told of every checkpoint that is rejected.
  """
  best = checkpoints.best()
  if best is None or best[0] == int(state.step):
    return state
  now, base = stored(state)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), now
  )
  jax.tree.map(lambda x: x.delete(), now)
  restored = checkpoints.restore(abstract, say, beside=base, best=True)
  assert restored is not None  # There is a best one.
  found = restored.state
  return found._replace(frozen=trees.merge(found.frozen, base))


# Where a run is and who looks on, which changes nothing of what it computes.
_PLACES = ("workdir", "compile_cache", "log/writers", "log/project")
_PLACES += ("profile/start", "profile/steps")


def changes_of_config(config: Config, workdir: Path) -> list[str]:
  """What differs from the config of the run that the workdir holds."""
  path = workdir / "config.json"
  if not path.exists():
    return []
  old = trees.flatten(json.loads(path.read_text()))
  new = trees.flatten(json.loads(json.dumps(config.to_dict())))
  return [
    f"{key.replace('/', '.')}: {old.get(key)!r} -> {new.get(key)!r}"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and key not in _PLACES
  ]


def check_same_config(changed: list[str], workdir: Path) -> None:
  """Raises ValueError with the difference if the workdir has another config."""
  if changed:
    raise ValueError(
      f"{workdir}: holds a run with another config:\n  "
      + "\n  ".join(changed)
      + "\nexpected the same. Undo the change, choose another workdir, or go "
      "on with --force."
    )
