"""Folders of safetensors: named tensors in and out, safely and whole.

Nothing here knows of models. A checkpoint is untrusted: it names only files
of its own folder, and only safetensors are opened; nothing is unpickled.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sft_jax.models.hf.safetensors_files import (
  Pending,
  Tensor,
  read_header,
  write_file,
)

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def open_tensors(folder: Path) -> dict[str, Tensor]:
  """Where each tensor of a folder lies; headers are read, weights are not.

  Raises:
    ValueError: no weights, pickled weights, a file that is broken or outside
      the folder, an index that is not true.
  """
  if (folder / _SINGLE).exists():
    return read_header(_weight_file(folder, _SINGLE))
  if not (folder / _INDEX).exists():
    pickles = [p.name for p in folder.iterdir() if p.suffix in _PICKLES]
    if pickles:
      raise ValueError(
        f"{folder}: pickled weights {sorted(pickles)}; expected "
        "model.safetensors, as unpickling runs code. Convert them with "
        "transformers: from_pretrained(...).save_pretrained(...)."
      )
    raise ValueError(
      f"{folder}: no weights; expected model.safetensors or "
      "model.safetensors.index.json. Download them, or set model.from_scratch."
    )
  where = _read_index(inside(folder, _INDEX))
  tensors: dict[str, Tensor] = {}
  # Every name is judged before any file is opened.
  paths = {name: _weight_file(folder, name) for name in set(where.values())}
  for name, path in sorted(paths.items()):
    listed = {tensor for tensor in where if where[tensor] == name}
    found = read_header(path)
    if listed != found.keys():
      odd = sorted(listed ^ found.keys())
      raise ValueError(
        f"{path}: differs from the index at {odd[:3]} ({len(odd)} in "
        "all); expected the tensors that the index lists. Download it again."
      )
    tensors |= found
  return tensors


def _read_index(path: Path) -> dict[str, str]:
  """{tensor: file} of an index; a tensor that it lists twice is refused."""

  def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
      raise ValueError("a name twice in one object")
    return dict(pairs)

  try:
    text = path.read_text(encoding="utf-8")
    where = json.loads(text, object_pairs_hook=once)["weight_map"]
    return {str(tensor): str(file) for tensor, file in where.items()}
  except (
    *(ValueError, KeyError, TypeError, AttributeError),
    RecursionError,
  ) as error:
    raise ValueError(
      f"{path}: no weight_map in it ({error!r}); expected "
      '{"weight_map": {tensor: file}}. Download it again.'
    ) from error


def inside(folder: Path, name: str) -> Path:
  """The file of this name, wherever it may lie.

  Raises:
    ValueError: a link out of the folder. The hub's cache is allowed: there
      snapshots/<commit>/file links to ../../blobs/<digest>.
  """
  path, home = folder / name, folder.resolve()
  real = path.resolve()
  allowed = [home]
  if home.parent.name == "snapshots":
    allowed.append(home.parent.parent / "blobs")
  if real.parent not in allowed:
    raise ValueError(
      f"{path}: a link to {real}; expected a file in the model's own folder. "
      "Copy the file there if you trust it."
    )
  return real


def _weight_file(folder: Path, name: str) -> Path:
  """A weight file, which lies in the folder itself."""
  if Path(name).name != name or not name.endswith(".safetensors"):
    raise ValueError(
      f"{folder}: the index names {name!r}; expected a plain *.safetensors "
      "name in this folder. Do not trust this checkpoint."
    )
  real = inside(folder, name)
  if not real.is_file():
    raise ValueError(
      f"{folder / name}: no such file; expected the weights that the index "
      "names. Download it."
    )
  return real


def write_tensors(
  folder: Path | None, tensors: Iterable[Pending], *, max_shard_bytes: int
) -> None:
  """Writes model.safetensors, or numbered shards and their index.

  With `folder` None every tensor is made and nothing written; see
  `tensor_file.write_file`.
  """
  shards: list[list[Pending]] = [[]]
  total = filled = 0
  for tensor in tensors:
    if shards[-1] and filled + tensor.num_bytes > max_shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(tensor)
    filled += tensor.num_bytes
    total += tensor.num_bytes
  where = {}
  for i, shard in enumerate(shards):
    file = _SINGLE
    if len(shards) > 1:
      file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    write_file(folder and folder / file, shard)
    where |= {tensor.name: file for tensor in shard}
  if folder and len(shards) > 1:
    write_json(
      folder / _INDEX,
      {"metadata": {"total_size": total}, "weight_map": where},
    )


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
  """Writes arrays that are at hand as one file."""
  write_file(
    path,
    [
      Pending(name, array.dtype, array.shape, lambda array=array: array)
      for name, array in tensors.items()
    ],
  )


def write_json(path: Path, value: dict[str, Any]) -> None:
  text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
  path.write_text(text + "\n", encoding="utf-8")


def replace_folder(
  path: Path, marker: str, write: Callable[[Path], None]
) -> None:
  """Fills a folder beside `path`, then puts it in its place: all or nothing.

  Of several processes the first one makes and moves the folder; every one
  calls `write`, which may gather arrays, and only the first may write.

  Raises:
    ValueError: `path` holds something else than a folder with a `marker`.
  """
  first = jax.process_index() == 0
  fresh = path.with_name(f".{path.name}.writing")
  old = path.with_name(f".{path.name}.replaced")
  if first:
    if path.exists() and not (
      path.is_dir() and ((path / marker).exists() or not any(path.iterdir()))
    ):
      raise ValueError(
        f"{path}: exists and is not a model folder (no {marker}); expected a "
        "new, an empty or a model folder. Choose another path."
      )
    path.parent.mkdir(parents=True, exist_ok=True)
    # What a killed process left behind.
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
  wait_for_all()
  try:
    write(fresh)
    wait_for_all()
    if first:
      if path.exists():
        path.rename(old)
      fresh.rename(path)
  finally:
    if first:
      shutil.rmtree(fresh, ignore_errors=True)
      shutil.rmtree(old, ignore_errors=True)
  wait_for_all()


def wait_for_all() -> None:
  """Returns when every process of the run has come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("sft_jax.models.hf.weights")
