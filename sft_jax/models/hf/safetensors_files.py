"""Folders of safetensors: tensors read row by row, written one at a time.

    8 bytes: n, little-endian | n bytes of JSON | the tensors, end to end
    {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}

The `safetensors` library checks every file (holes, overlaps, missing bytes); of
two tensors of one name it takes the last, so that is refused here. Rows are
read from the offsets of the header, as the library maps whole files into
memory. It writes only what is all in memory at once, hence `write_file`.
https://github.com/huggingface/safetensors#format

Nothing here knows of models. A checkpoint is untrusted: it names only files
of its own folder, and only safetensors are opened; nothing is unpickled.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sft_jax.common.buckets import ranges
from sft_jax.common.workdir import digest

_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E8M0": ml_dtypes.float8_e8m0fnu,
  "I64": np.int64,
  "U64": np.uint64,
  "I32": np.int32,
  "U32": np.uint32,
  "I16": np.int16,
  "U16": np.uint16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Digests of an export's files, as `sha256sum -c` reads them.
CHECKSUMS = "SHA256SUMS"
_LONGEST_HEADER = 100_000_000  # That the library takes.


class Tensor(NamedTuple):
  """A tensor of a file, not read yet; `offset` is of its first byte there."""

  path: Path
  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def fetch(self, *axes: range) -> None:
    """Has a part of it on this machine's disk, a range for each axis."""

    def spans() -> list[tuple[int, int]]:
      # Of the last axis that is cut on, bytes are contiguous.
      ends = [(min(x), max(x) + 1) if x else (0, 0) for x in axes]
      cut = [i for i, n in enumerate(self.shape) if ends[i] != (0, n)]
      last = cut[-1] if cut else 0
      size = self.dtype.itemsize
      strides = [math.prod(self.shape[i + 1 :]) * size for i in range(last + 1)]
      starts = np.zeros(1, np.int64)
      for (first, end), stride in zip(ends[:last], strides, strict=False):
        steps = np.arange(first, end) * stride
        starts = (starts[:, None] + steps).reshape(-1)
      first, end = ((at * strides[last]) for at in ends[last])
      starts = (starts + self.offset).tolist()
      return [(i + first, i + end) for i in starts]

    ranges.need(self.path, spans)

  def read(
    self, start: int = 0, stop: int | None = None, *, fetched: bool = False
  ) -> np.ndarray:
    """The tensor, or its rows `start` to `stop` along the first axis.

    `fetched`: what is wanted is there, all else may be zeros.

    Raises ValueError: the file has become shorter.
    """
    shape, offset = self.shape, self.offset
    if shape:
      first, last, _ = slice(start, stop).indices(shape[0])
      shape = (max(last - first, 0), *shape[1:])
      offset += first * math.prod(shape[1:]) * self.dtype.itemsize
    size = math.prod(shape) * self.dtype.itemsize
    if not fetched:
      ranges.need(self.path, [(offset, offset + size)])
    data = np.fromfile(self.path, np.uint8, count=size, offset=offset)
    if data.size != size:
      got = f"{data.size} bytes of {self.name!r}"
      raise _refuse(self.path, got, f"{size} bytes")
    return data.view(self.dtype).reshape(shape)


def read_header(path: Path) -> dict[str, Tensor]:
  """The tensors of a file by name; every byte of it accounted for.

  Raises:
    ValueError: the library refuses the file, or a dtype that is unknown here.
  """
  ranges.need(path, [(0, 8)])
  with _refused(path), path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
  ranges.need(path, [(8, 8 + min(length, _LONGEST_HEADER))])
  with _refused(path), safe_open(path, framework="numpy"):
    with path.open("rb") as file:
      file.seek(8)
      # Of two tensors of one name the library takes the last.
      header = json.loads(file.read(length), object_pairs_hook=_without_twins)
  header.pop("__metadata__", None)
  tensors = {}
  for name, entry in header.items():
    dtype = entry["dtype"]
    if dtype not in _DTYPES:
      raise _refuse(path, f"{name!r} of dtype {dtype!r}", f"{list(_DTYPES)}")
    offset = 8 + length + entry["data_offsets"][0]
    kind, shape = np.dtype(_DTYPES[dtype]), tuple(entry["shape"])
    tensors[name] = Tensor(path, name, kind, shape, offset)
  return tensors


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError("a name twice in one object")
  return found


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
  try:
    yield
  except (SafetensorError, OSError, ValueError) as error:
    raise _refuse(path, str(error), "a whole file") from error


def _refuse(path: Path, got: str, expected: str) -> ValueError:
  return ValueError(
    f"{path}: not a whole safetensors file: got {got[:400]}; expected "
    f"{expected}. Download it again."
  )


def open_tensors(folder: Path) -> dict[str, Tensor]:
  """Where each tensor of a folder is; headers are read, weights are not.

  Raises ValueError: no weights, pickled weights, a file that is broken or
  outside the folder, an index that is not true.
  """
  if (folder / _SINGLE).exists():
    return read_header(_weight_file(folder, _SINGLE))
  if not (folder / _INDEX).exists():
    pickles = [p.name for p in folder.iterdir() if p.suffix in _PICKLES]
    if pickles:
      raise ValueError(
        f"{folder}: pickled weights {sorted(pickles)}; expected safetensors, "
        "as unpickling runs code. Convert them: transformers' save_pretrained."
      )
    raise ValueError(
      f"{folder}: no weights; expected {_SINGLE} or {_INDEX}. Download them, "
      "or set model.from_scratch."
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

  try:
    text = path.read_text(encoding="utf-8")
    index = json.loads(text, object_pairs_hook=_without_twins)
    return {str(k): str(file) for k, file in index["weight_map"].items()}
  except Exception as error:  # Whatever is wrong with it.
    raise ValueError(
      f"{path}: no weight_map in it ({error!r}); expected "
      '{"weight_map": {tensor: file}}. Download it again.'
    ) from error


def inside(folder: Path, name: str) -> Path:
  """The file of this name, wherever it is.

  Raises ValueError: a link out of the folder. The hub's cache is allowed: there
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
  """A weight file, which is in the folder itself."""
  if Path(name).name != name or not name.endswith(".safetensors"):
    raise ValueError(
      f"{folder}: the index names {name!r}; expected a plain *.safetensors "
      "name in this folder. Do not trust this checkpoint."
    )
  if not inside(folder, name).is_file():
    raise ValueError(
      f"{folder / name}: no such file; expected the weights that the index "
      "names. Download it."
    )
  return folder / name


# -- Writing -------------------------------------------------------------


class Pending(NamedTuple):
  """A tensor to write; `make` gives it, or blocks of its rows, in its turn."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray | Iterable[np.ndarray]]

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path | None, tensors: Sequence[Pending]) -> None:
  """Writes one file, as torch's users expect it; one tensor in memory.

  Args:
    path: the file; None makes every tensor and writes none, which is what
      the other processes of a run do while the first one writes.
    tensors: in any order; the file has the widest dtype first, for alignment.
  """
  ordered = sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.name))
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  at = 0
  for tensor in ordered:
    header[tensor.name] = {
      "dtype": _NAMES[tensor.dtype],
      "shape": list(tensor.shape),
      "data_offsets": [at, at + tensor.num_bytes],
    }
    at += tensor.num_bytes
  text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
  text += b" " * (-len(text) % 8)
  if path is None:
    for tensor in ordered:
      for _ in _blocks(tensor):
        pass
    return
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in ordered:
      size = 0
      for array in _blocks(tensor):
        assert array.dtype == tensor.dtype
        assert array.shape[1:] == tensor.shape[1:]
        write_array(file, array)
        size += array.nbytes
      assert size == tensor.num_bytes


def _blocks(tensor: Pending) -> Iterable[np.ndarray]:
  made = tensor.make()
  return [made] if isinstance(made, np.ndarray) else made


def write_array(file: BinaryIO, array: np.ndarray) -> None:
  """Writes the bytes of an array in C order, whatever its strides."""
  flat = np.ascontiguousarray(array).reshape(-1)
  file.write(flat.view(np.uint8).data)


def write_tensors(
  folder: Path | None, tensors: Iterable[Pending], *, max_shard_bytes: int
) -> None:
  """Writes model.safetensors, or numbered shards and their index.

  With `folder` None every tensor is made and nothing written; see
  `write_file`.
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
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / _INDEX, index)


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
  """Writes arrays in memory as one file."""
  made = lambda array: lambda: array
  pending = [Pending(k, x.dtype, x.shape, made(x)) for k, x in tensors.items()]
  write_file(path, pending)


def write_json(path: Path, value: dict[str, Any]) -> None:
  text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
  path.write_text(text + "\n", encoding="utf-8")


def write_checksums(folder: Path) -> None:
  """Writes the digests of all files that are in a folder."""
  files = (p for p in folder.iterdir() if p.is_file() and p.name != CHECKSUMS)
  names = sorted(p.name for p in files)
  lines = [f"{digest(folder / name)}  {name}\n" for name in names]
  (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def check_checksums(folder: Path) -> None:
  """Compares a folder's files with their digests, if it has any.

  Of several processes none has all of the weights in a bucket: those have the
  store's digest.

  Raises ValueError: a file is missing, or is not what was written.
  """
  path = folder / CHECKSUMS
  if not path.exists():
    return
  wrong = []
  for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
    expected, _, name = line.partition("  ")
    file = folder / name
    # A damaged name must not lead out of the folder.
    if not name or file.parent != folder or not file.is_file():
      wrong.append(f"{name} (missing)")
      continue
    if ranges.is_partial(file):
      if jax.process_count() > 1:
        continue
      ranges.need_all(file)
    if digest(file) != expected:
      wrong.append(name)
  if wrong:
    raise ValueError(
      f"{folder}: got other contents than were written of {wrong}, expected "
      f"those of its {CHECKSUMS}. Export again, or copy the folder again; if "
      f"you changed the files on purpose, delete {CHECKSUMS}."
    )
