"""Copies of the state in the memory of each host, between checkpoints.

Each process writes the shards of its own devices to a folder of its machine,
a RAM disk as /dev/shm is, and keeps those of two steps:

    folder/process_3/40/shards          bytes, one shard after the other
    folder/process_3/40/manifest.json   the checkpoint's manifest, and which
                                        part of which array is where; sealed

A run that was killed continues from the newest step of which every shard is
somewhere: on the process's own machine or, where several hosts hold it
(`mesh.data` across hosts), on another's, which sends it. What is put together
is compared with the digests, as a checkpoint is. Only a mesh that cuts arrays
as before finds its shards; every other one starts from the checkpoint.

Orbax's manager for this (`experimental.emergency`, of its older interface)
needs whole replicas along one axis of the mesh, and has no digests.
"""

import concurrent.futures
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sft_jax.checkpointing import digests
from sft_jax.common import distributed

# Steps that a process keeps, all of which but the newest every process has.
_KEPT = 2
_MANIFEST, _SHARDS = "manifest.json", "shards"
# Which part of which array: its path and, of each axis, where it begins and
# ends.
Shard = tuple[str, tuple[tuple[int, int], ...]]


class Copy(NamedTuple):
  """A step of which every shard was found.

  Attributes:
    manifest: what a checkpoint's says.
    owners: of each shard the process that gives it to those that lack it, and
      has a device for it.
    lacking: paths of arrays of which a process lacks a shard.
  """

  step: int
  manifest: dict[str, Any]
  owners: dict[Shard, int]
  lacking: set[str]


class LocalCopies:
  """The copies of one run on this machine, under `directory`."""

  def __init__(self, directory: Path):
    """Opens or makes the folder; removes what a kill has left half written.

    Raises OSError: it cannot be made.
    """
    self._folder = directory
    self._own = directory / f"process_{jax.process_index()}"
    self._writer = concurrent.futures.ThreadPoolExecutor(1, "local copies")
    self._writing: concurrent.futures.Future | None = None
    # Where each shard is of those of this machine, by step.
    self._places: dict[int, dict[Shard, tuple[Path, int, int]]] = {}
    try:
      self._own.mkdir(mode=0o700, parents=True, exist_ok=True)
      for part in self._own.glob("*.part"):
        shutil.rmtree(part)
    except OSError as error:
      raise OSError(
        f"checkpoint.local_dir: got {directory}, which cannot be written "
        f"({error.strerror}), expected a folder in memory such as /dev/shm. "
        "Name another, or set checkpoint.local_every=0."
      ) from error

  def save(self, step: int, state: Any, manifest: dict[str, Any]) -> None:
    """Copies this process's shards; writing continues behind.

    Raises OSError: the copy before could not be written.
    """
    self.wait()
    # From here on every process has the copy before: no other is needed.
    distributed.barrier("local copies")
    parts: dict[Shard, np.ndarray] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
      for shard in x.addressable_shards:
        key = _shard(jax.tree_util.keystr(path), shard.index, x.shape)
        if key not in parts:  # A device's memory is used again: a copy.
          parts[key] = np.array(shard.data)
    self._writing = self._writer.submit(self._write, step, parts, manifest)

  def _write(
    self, step: int, parts: dict[Shard, np.ndarray], manifest: dict[str, Any]
  ) -> None:
    part = self._own / f"{step}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    with (part / _SHARDS).open("wb") as file:
      for x in parts.values():
        file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    sizes = [[*key, x.nbytes] for key, x in parts.items()]
    sealed = digests.seal({"checkpoint": manifest, "shards": sizes})
    (part / _MANIFEST).write_text(json.dumps(sealed))
    shutil.rmtree(self._own / str(step), ignore_errors=True)
    part.rename(self._own / str(step))
    for old in _steps(self._own)[:-_KEPT]:
      shutil.rmtree(self._own / str(old))

  def wait(self) -> None:
    """Returns when the copy under way is whole; OSError if it failed."""
    writing, self._writing = self._writing, None
    try:
      if writing:
        writing.result()
    except OSError as error:
      raise OSError(
        f"{self._own}: a copy could not be written ({error.strerror}), "
        "expected room for three copies of this host's shards. Make room, or "
        "set checkpoint.local_every=0 and continue with --force."
      ) from error

  def remove(self, steps: range) -> None:
    """Removes this process's copies of these, and all of processes that the
    run no longer has."""
    for folder in self._folder.glob("process_*"):
      if int(folder.name.rpartition("_")[2]) >= jax.process_count():
        shutil.rmtree(folder, ignore_errors=True)
    for step in _steps(self._own):
      if step in steps:
        shutil.rmtree(self._own / str(step))

  def find(
    self, abstract: Any, newer: int, log: Callable[[str], None]
  ) -> list[Copy]:
    """Steps that all processes can put together, the newest first.

    Every process calls it.

    Args:
      abstract: tree of jax.ShapeDtypeStruct with shardings.
      newer: only steps after this one.
      log: called with a line for each step of which shards are missing.
    """
    here = self._read()
    said = {
      step: [digests.seal(manifest)["digest"], [*self._places[step]]]
      for step, manifest in here.items()
    }
    everywhere = distributed.all_say(said)
    wanted = {i: set[Shard]() for i in range(len(everywhere))}
    for path, x in jax.tree_util.tree_leaves_with_path(abstract):
      indices = x.sharding.devices_indices_map(x.shape)
      for device, index in indices.items():
        key = _shard(jax.tree_util.keystr(path), index, x.shape)
        wanted[device.process_index].add(key)
    found = []
    steps = {int(step) for one in everywhere for step in one}
    for step in sorted((s for s in steps if s > newer), reverse=True):
      have = [
        {_shard_of(x) for x in one[str(step)][1]} if str(step) in one else set()
        for one in everywhere
      ]
      seals = {one[str(step)][0] for one in everywhere if str(step) in one}
      # Who gives a shard needs a device that holds it.
      owners = {key: i for i in reversed(wanted) for key in wanted[i] & have[i]}
      needed = set().union(*wanted.values())
      missing = needed - owners.keys()
      if missing or len(seals) > 1:
        log(
          f"local copy {step} is not used: of {len(needed)} shards "
          f"{len(missing)} are in no host's {self._folder.parent}, or cut for "
          f"another mesh; {len(seals)} versions of it, expected one."
        )
        continue
      giver = min(i for i, one in enumerate(everywhere) if str(step) in one)
      manifest = distributed.first_says(here.get(step), giver)
      lacking = {key for i, keys in wanted.items() for key in keys - have[i]}
      paths = {path for path, _ in lacking}
      found.append(Copy(step, manifest, owners, paths))
    return found

  def _read(self) -> dict[int, dict[str, Any]]:
    """{step: manifest} of what is whole on this machine, of any process."""
    found: dict[int, dict[str, Any]] = {}
    self._places = {}
    folders = sorted(self._folder.glob("process_*"))
    for folder in sorted(folders, key=lambda folder: folder != self._own):
      for step in _steps(folder):
        where = folder / str(step)
        try:
          held = digests.unseal(json.loads((where / _MANIFEST).read_text()))
          sizes = [size for *_, size in held["shards"]]
          if sum(sizes) != (where / _SHARDS).stat().st_size:
            continue  # As a missing one.
        except (OSError, ValueError):
          continue
        if found.setdefault(step, held["checkpoint"]) != held["checkpoint"]:
          continue  # Of a process that went another way.
        places, offset = self._places.setdefault(step, {}), 0
        for *key, size in held["shards"]:
          places.setdefault(_shard_of(key), (where / _SHARDS, offset, size))
          offset += size
    return found

  def load(self, copy: Copy, asked: Any) -> Any:
    """The arrays of a copy, on the shardings asked for; every process calls."""

    def one(path: Any, x: Any) -> jax.Array:
      name = jax.tree_util.keystr(path)
      if name in copy.lacking:
        return self._gathered(copy, name, x)
      return jax.make_array_from_callback(
        x.shape,
        x.sharding,
        lambda at: self._bytes(copy, _shard(name, at or (), x.shape), x),
      )

    return jax.tree_util.tree_map_with_path(one, asked)

  def _bytes(self, copy: Copy, key: Shard, x: Any) -> np.ndarray:
    file, offset, size = self._places[copy.step][key]
    raw = np.fromfile(file, np.uint8, size, offset=offset)
    return raw.view(x.dtype).reshape(x.sharding.shard_shape(x.shape))

  def _gathered(self, copy: Copy, name: str, x: Any) -> jax.Array:
    """An array of which a process lacks shards, sent by those that have them.

    Each shard's words are added to zeros over the devices that hold it, which
    changes no bit.
    """
    sharding: Any = x.sharding
    mesh, shape = sharding.mesh, sharding.shard_shape(x.shape)
    indices = sharding.devices_indices_map(x.shape)
    gives: set[int] = set()  # The first device of each shard's owner.
    seen: set[Shard] = set()
    for i, device in enumerate(mesh.devices.flat):
      key = _shard(name, indices[device], x.shape)
      if copy.owners[key] == device.process_index and key not in seen:
        seen.add(key)
        gives.add(i)
    width = np.dtype(f"uint{8 * x.dtype.itemsize}")

    def words(index: Any) -> np.ndarray:
      i = index[0].indices(mesh.size)[0]
      if i not in gives:
        return np.zeros((1, *shape), width)
      key = _shard(name, indices[mesh.devices.flat[i]], x.shape)
      return self._bytes(copy, key, x).view(width)[None]

    every = PartitionSpec(mesh.axis_names)
    held = jax.make_array_from_callback(
      (mesh.size, *shape), NamedSharding(mesh, every), words
    )
    divided = jax.tree.leaves(tuple(sharding.spec))
    over = tuple(a for a in mesh.axis_names if a not in divided)

    def add(part: jax.Array) -> jax.Array:
      total = jax.lax.psum(part[0].astype(jnp.uint32), over).astype(width)
      if x.dtype == jnp.bool_:
        return total.astype(jnp.bool_)
      return jax.lax.bitcast_convert_type(total, x.dtype)

    return jax.jit(
      jax.shard_map(add, mesh=mesh, in_specs=every, out_specs=sharding.spec)
    )(held)


def _steps(folder: Path) -> list[int]:
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def _shard(path: str, index: Iterable[slice], shape: tuple[int, ...]) -> Shard:
  ends = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
  return path, tuple(ends)


def _shard_of(read: Any) -> Shard:
  path, ends = read
  return path, tuple((int(a), int(b)) for a, b in ends)
