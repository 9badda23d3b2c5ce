"""Checkpoints on Orbax: saved whole, verified by digest when restored.

Orbax writes asynchronously and commits atomically, but does not notice a
flipped bit in a committed file. So a manifest with every array's digest is
part of what is committed, and a checkpoint that does not hold what was saved
is set aside for an older one, never loaded and never deleted.
"""

import concurrent.futures
import contextlib
import functools
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from sft_jax.checkpointing import digests, local_copies
from sft_jax.common import distributed
from sft_jax.common.buckets import storage
from sft_jax.common.workdir import sync_folder, sync_tree

# What Orbax writes last into a checkpoint of gs://, where nothing is renamed.
_COMMITTED = "commit_success.txt"
# One folder after the other.
_later = concurrent.futures.ThreadPoolExecutor(1, "sync")


class Restored(NamedTuple):
  """What a checkpoint held: the arrays are on the shardings asked for, `meta`
  is the JSON-like dict saved with them, `step` the number of steps taken."""

  step: int
  state: Any
  meta: dict[str, Any]


class Mismatch(ValueError):
  """A checkpoint is whole, but not of what was asked for."""


class Checkpoints:
  """The checkpoints of one run, under `directory`."""

  def __init__(
    self,
    directory: Path,
    *,
    keep: int,
    keep_every: int = 0,
    keep_best: str = "",
    before_save: Callable[[], None] = lambda: None,
    local: local_copies.LocalCopies | None = None,
  ):
    """Opens (or creates) the folder.

    Args:
      directory: holds a folder per step; one of gs:// is an epath.Path.
      keep: the newest so many are kept, 1 or more.
      keep_every: and those of steps that this divides; 0 = none.
      keep_best: and the one of the 'lowest' or 'highest' score; '' = none.
      before_save: called before each save: records must not be older.
      local: copies between the checkpoints; the newest of both is restored.
    """
    self._directory = directory
    self._rejected = directory.with_name(f"{directory.name}_rejected")
    self._keep, self._every = keep, keep_every
    self._scored = bool(keep_best)
    self._sign = -1 if keep_best == "highest" else 1
    self._scores: dict[int, float] = {}
    self._before_save, self._local = before_save, local
    self._saving = 0  # The step being written.
    self._syncing: concurrent.futures.Future | None = None
    self._open()

  def _open(self) -> None:
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise OSError(
        f"{self._directory}: cannot be written ({error}), expected a folder "
        "that can. Change its permissions, or choose another workdir."
      ) from error
    # Orbax's policies do not match its own protocol in a type checker's eyes.
    every_save: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
    retention: Any = self
    self._orbax = ocp.training.Checkpointer(
      address(self._directory),
      save_decision_policy=every_save,
      preservation_policy=retention,
    )
    for step in self.steps() if self._scored else ():
      with contextlib.suppress(ValueError):  # Restoring it will say so.
        score = self._manifest(step)["score"]
        if score is not None:
          self._scores[step] = score

  def steps(self) -> list[int]:
    """Committed steps, oldest first."""
    return sorted(c.step for c in self._orbax.checkpoints)

  def best(self) -> tuple[int, float] | None:
    """(step, score) of the best that was scored; the oldest of equals."""
    ranked = self._ranked(self.steps())
    return (ranked[0], self._scores[ranked[0]]) if ranked else None

  def _ranked(self, steps: list[int]) -> list[int]:
    """Those that were scored, the best first; of equals the oldest."""
    scored = [step for step in steps if step in self._scores]
    return sorted(scored, key=lambda s: (self._sign * self._scores[s], s))

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    """Orbax's question, asked when a save begins: which steps shall stay.

    It deletes the others once the new one is committed, so a whole checkpoint
    is there at any moment.
    """
    del context
    steps = [c.step for c in checkpoints]
    kept = set(sorted(steps)[-self._keep :])
    if self._every:
      kept |= {step for step in steps if step % self._every == 0}
    kept.update(self._ranked(steps)[:1])
    return [step in kept for step in steps]

  # -- Saving ---------------------------------------------------------------

  def save(
    self,
    step: int,
    state: Any,
    meta: dict[str, Any],
    *,
    beside: Any = None,
    score: float | None = None,
  ) -> None:
    """Starts a save of a tree of arrays and, sealed, of a JSON-like dict.

    The arrays are copied before this returns; writing continues behind. One
    save is under way at a time: this waits for the one before.

    Args:
      beside: a tree of arrays of which the digests are saved alone: whoever
        restores has them already, and proves it.
      score: what `keep_best` compares; None = this one is not compared.

    Raises OSError: the save before failed.
    """
    self.wait()
    self._synced()  # Before this save removes an older one.
    manifest = _new_manifest(step, state, meta, beside)
    sealed: Any = digests.seal(manifest | {"score": score})
    if score is not None and self._scored:
      self._scores[step] = score
    self._saving = step
    self._before_save()
    with self._explained():
      self._orbax.save_checkpointables_async(
        step, {"state": state}, custom_metadata=sealed
      )

  def copy(
    self, step: int, state: Any, meta: dict[str, Any], *, beside: Any
  ) -> None:
    """Starts a copy to this machine's memory, in place of a save."""
    assert self._local
    self._local.save(step, state, _new_manifest(step, state, meta, beside))

  def check(self) -> None:
    """Raises OSError if the save under way has failed; does not wait."""
    if not self._orbax.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Returns when the save under way is whole; OSError if it failed."""
    with self._explained():
      self._orbax.wait()
      if self._saving and self._syncing is None and not jax.process_index():
        self._syncing = _later.submit(
          self._sync, self._directory / str(self._saving)
        )

  def _sync(self, folder: Path) -> None:
    """A power cut keeps what this has seen: the checkpoint before the newest.

    Only on disks that the first process writes to; those of networks, and
    buckets, keep what is closed.
    """
    if storage.is_remote(self._directory):
      return
    if folder.exists():
      sync_tree(folder)
    sync_folder(self._directory)

  def _synced(self) -> None:
    if self._syncing is not None:
      with self._explained():
        self._syncing.result()
      self._syncing = None

  def close(self) -> None:
    """Waits for the save under way and lets go of the folder."""
    self.wait()
    self._synced()
    if self._local:
      self._local.wait()
      self._local.remove(range(max(self.steps(), default=0) + 1))
    with self._explained():
      self._orbax.close()

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    """Whatever a full or broken disk makes Orbax raise, as one OSError."""
    try:
      yield
    except Exception as error:
      self._scores.pop(self._saving, None)
      expected = "a disk with room that can be written"
      cure = "make room, and run the same command again"
      if storage.is_remote(self._directory):
        expected = "a bucket that answers and may be written"
        cure = "the same command continues from there"
      raise OSError(
        f"checkpoint {self._saving} in {self._directory}: could not be saved "
        f"({_line(error)}), expected {expected}. "
        f"The checkpoints {self.steps()} are whole; {cure}."
      ) from error

  # -- Restoring ------------------------------------------------------------

  def forget_copies(self, step: int) -> None:
    """Removes local ones of later steps, which are taken again."""
    if self._local:
      self._local.remove(range(step + 1, sys.maxsize))

  def find_copies(
    self, abstract: Any, log: Callable[[str], None]
  ) -> list[local_copies.Copy]:
    """Local ones newer than all checkpoints; for `restore`."""
    newest = max(self.steps(), default=0)
    return self._local.find(abstract, newest, log) if self._local else []

  def restore(
    self,
    abstract: Any,
    log: Callable[[str], None],
    *,
    copies: Sequence[local_copies.Copy] = (),
    beside: Any = None,
    cast: bool = False,
    best: bool = False,
  ) -> Restored | None:
    """The newest checkpoint that verifies, or None if there is none at all.

    Args:
      abstract: tree of jax.ShapeDtypeStruct with shardings.
      copies: what is tried first.
      log: called with a line for every checkpoint that is rejected.
      beside: the arrays that were beside the state when it was saved.
      cast: True gives arrays of another dtype the one asked for; else they
        are an error.
      best: the best that verifies of those that were scored, not the newest.

    Raises:
      Mismatch: a whole checkpoint of other shapes, dtypes or arrays beside it;
        names each.
      ValueError: there are checkpoints and none of them verifies.
    """
    self.wait()
    steps = self.steps()
    for copy in copies:
      assert self._local
      name, read = f"local copy {copy.step}", self._local.load
      try:
        return load(
          *(name, copy.manifest, abstract, beside, cast),
          functools.partial(read, copy),
        )
      except Mismatch:
        raise
      except ValueError as error:
        log(f"{name} rejected ({_line(error)})")
    for step in self._ranked(steps) if best else reversed(steps):
      try:
        return self._load(step, abstract, beside, cast)
      except (Mismatch, MemoryError, PermissionError):
        raise  # Nothing is wrong with the checkpoint.
      except Exception as error:
        # Whatever a damaged file makes Orbax raise, the answer is the same:
        # say so, and try the step before.
        if "RESOURCE_EXHAUSTED: Out of memory" in str(error):
          raise
        aside = self._set_aside(step)
        log(
          f"checkpoint {step} rejected ({type(error).__name__}: "
          f"{_line(error)}); set aside as {aside}"
        )
    if steps or copies:
      raise ValueError(
        f"{self._directory}: none of the checkpoints {steps} could be "
        "restored, expected one that verifies. They are in "
        f"{self._rejected}; start again in a new workdir."
      )
    return None

  def newest_meta(self) -> dict[str, Any] | None:
    """What was saved beside the newest arrays whose manifest is whole."""
    for step in reversed(self.steps()):
      with contextlib.suppress(Exception):  # Restoring it will say so.
        return self._manifest(step)["meta"]
    return None

  def _manifest(self, step: int) -> dict[str, Any]:
    """A ValueError where it is missing or damaged."""
    metadata = self._orbax.checkpointables_metadata(step)
    held = digests.unseal(metadata.custom_metadata)
    if held["step"] != step:
      raise ValueError(f"its manifest is of step {held['step']}")
    return held

  def _load(
    self, step: int, abstract: Any, beside: Any, cast: bool
  ) -> Restored:
    def read(asked: Any) -> Any:
      return self._orbax.load_checkpointables(step, {"state": asked})["state"]

    held = self._manifest(step)
    return load(f"checkpoint {step}", held, abstract, beside, cast, read)

  def _set_aside(self, step: int) -> Path:
    self._orbax.close()
    target, number = self._rejected / str(step), 0
    while target.exists():
      number += 1
      target = self._rejected / f"{step}.{number}"
    distributed.barrier("names of rejected checkpoints")
    if jax.process_index() == 0:
      self._rejected.mkdir(exist_ok=True)
      held = self._directory / str(step)
      if storage.is_remote(held):
        storage.move_folder(str(held), str(target), _COMMITTED)
      else:
        shutil.move(held, target)
    distributed.barrier("a checkpoint is set aside")
    self._scores.pop(step, None)
    self._open()
    return target

  def remove_unfinished(self) -> None:
    """Removes what saves that were killed have left; none is under way."""
    if jax.process_index() == 0:
      for path in self._directory.glob("*.orbax-checkpoint-tmp"):
        shutil.rmtree(path)
      if storage.is_remote(self._directory):
        names = storage.list_objects(str(self._directory))
        steps = {name.partition("/")[0] for name in names}
        for step in (s for s in steps if f"{s}/{_COMMITTED}" not in names):
          storage.remove(str(self._directory / step))
    distributed.barrier("unfinished checkpoints are removed")


def _new_manifest(
  step: int, state: Any, meta: dict[str, Any], beside: Any
) -> dict[str, Any]:
  """What is sealed beside a state."""
  return {
    "step": step,
    "arrays": digests.describe(state),
    "beside": digests.describe(beside),
    "meta": meta,
    "code": digests.code(),
  }


def load(
  name: str,
  held: dict[str, Any],
  abstract: Any,
  beside: Any,
  cast: bool,
  read: Callable[[Any], Any],
) -> Restored:
  """What a manifest says that it holds, read and verified.

  `read` is given what is asked for, as it was saved. The others and errors:
  see `Checkpoints.restore`; ValueError: a digest differs.
  """
  other = digests.differences(held["arrays"], abstract)
  if cast:
    other = [line for line in other if ": dtype " not in line]
  other += digests.differences(held["beside"], beside)
  if other:
    raise Mismatch(
      f"{name}: is whole, but not of what the config now gives:\n"
      "  " + "\n  ".join(other[:20]) + f"\n({len(other)} in all, saved -> "
      "asked for); expected the same. Undo the change of config, or start "
      "in a new workdir."
    )
  if changed := digests.damaged(held["beside"], beside):
    raise Mismatch(other_base(name, changed))

  def as_saved(path: Any, x: Any) -> jax.ShapeDtypeStruct:
    saved = held["arrays"][jax.tree_util.keystr(path)]["dtype"]
    dtype = saved if cast else x.dtype
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

  state = read(jax.tree_util.tree_map_with_path(as_saved, abstract))
  if wrong := digests.damaged(held["arrays"], state):
    raise ValueError(f"digest mismatch in {wrong[:3]} ({len(wrong)} arrays)")
  if cast:
    state = jax.tree.map(lambda x, y: x.astype(y.dtype), state, abstract)
  return Restored(held["step"], state, held["meta"])


def address(path: Path) -> str:
  """As Orbax wants it."""
  return str(path) if storage.is_remote(path) else str(path.absolute())


def other_base(where: str, changed: list[str]) -> str:
  """What to say of frozen parameters that have changed."""
  return (
    f"{where}: the frozen parameters {changed[:3]} ({len(changed)} arrays) are "
    "not those it was trained beside, expected the same: the model's folder "
    "has changed. Put the files back, or start in a new workdir."
  )


def _line(error: Exception) -> str:
  return " ".join(str(error).split())[:300]
