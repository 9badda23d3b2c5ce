"""Safetensors folders: named tensors in and out, safely and whole.

Nothing here knows of models. A checkpoint is untrusted: it names only files
of its own folder, and only safetensors are opened; nothing is unpickled.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file


class Pending(NamedTuple):
  """A tensor to write, made when its file is.

  Attributes:
    name: its name in the file.
    num_bytes: its size there.
    make: gives the array.
  """

  name: str
  num_bytes: int
  make: Callable[[], np.ndarray]


def open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
  """Maps each tensor's name to the open file that holds it.

  Raises:
    ValueError: no weights, pickled weights, a file that is broken or outside
      the folder, an index that is not true.
  """
  single = folder / "model.safetensors"
  index = folder / "model.safetensors.index.json"
  if single.exists():
    file = _open_one(folder, single.name, stack)
    return dict.fromkeys(file.keys(), file)
  if not index.exists():
    pickles = [
      p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")
    ]
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
  try:
    where = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{index}: no weight_map in it ({error!r}); expected "
      '{"weight_map": {tensor: file}}. Download it again.'
    ) from error
  tensors = {}
  for name in sorted(set(map(str, where.values()))):
    file = _open_one(folder, name, stack)
    listed = {tensor for tensor in where if where[tensor] == name}
    if listed != set(file.keys()):
      odd = sorted(listed ^ set(file.keys()))
      raise ValueError(
        f"{folder / name}: differs from the index at {odd[:3]} ({len(odd)} in "
        "all); expected the tensors that the index lists. Download it again."
      )
    tensors |= dict.fromkeys(listed, file)
  return tensors


def _open_one(folder: Path, name: str, stack: ExitStack) -> Any:
  """Opens a weight file that lies in the folder itself."""
  path = folder / name
  if Path(name).name != name or not name.endswith(".safetensors"):
    raise ValueError(
      f"{folder}: the index names {name!r}; expected a plain *.safetensors "
      "name in this folder. Do not trust this checkpoint."
    )
  real = path.resolve()
  # The hub's cache keeps the bytes of a snapshot two folders up, in blobs/.
  blobs = folder.resolve().parent.parent / "blobs"
  if real.parent not in (folder.resolve(), blobs):
    raise ValueError(
      f"{path}: a link to {real}; expected a file in the model's own folder. "
      "Copy the file there if you trust it."
    )
  if not real.is_file():
    raise ValueError(
      f"{path}: no such file; expected the weights that the index names. "
      "Download it."
    )
  try:
    return stack.enter_context(safe_open(real, framework="numpy"))
  except Exception as error:
    raise ValueError(
      f"{path}: not a safetensors file ({error}); expected one. "
      "Download it again."
    ) from error


def write_tensors(
  folder: Path, tensors: Iterable[Pending], *, max_shard_bytes: int
) -> None:
  """Writes model.safetensors, or numbered shards and their index."""
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
    file = "model.safetensors"
    if len(shards) > 1:
      file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    save_tensors(folder / file, {t.name: t.make() for t in shard})
    where |= {tensor.name: file for tensor in shard}
  if len(shards) > 1:
    write_json(
      folder / "model.safetensors.index.json",
      {"metadata": {"total_size": total}, "weight_map": where},
    )


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
  """Writes one file, as torch's users expect it."""
  # safetensors writes the buffer as it lies, whatever the strides.
  tensors = {k: np.ascontiguousarray(x) for k, x in tensors.items()}
  save_file(tensors, path, metadata={"format": "pt"})


def write_json(path: Path, value: dict[str, Any]) -> None:
  text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
  path.write_text(text + "\n", encoding="utf-8")


def replace_folder(
  path: Path, marker: str, write: Callable[[Path], None]
) -> None:
  """Fills a folder beside `path`, then puts it in its place: all or nothing.

  Raises:
    ValueError: `path` holds something else than a folder with a `marker`.
  """
  if path.exists() and not (
    path.is_dir() and ((path / marker).exists() or not any(path.iterdir()))
  ):
    raise ValueError(
      f"{path}: exists and is not a model folder (no {marker}); expected a "
      "new, an empty or a model folder. Choose another path."
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  fresh = path.with_name(f".{path.name}.writing-{os.getpid()}")
  old = path.with_name(f".{path.name}.replaced-{os.getpid()}")
  fresh.mkdir()
  try:
    write(fresh)
    if path.exists():
      path.rename(old)
    fresh.rename(path)
  finally:
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
