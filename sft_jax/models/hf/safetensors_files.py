"""Safetensors files: what one holds, rows of it on demand, and one written
tensor by tensor.

    8 bytes: n, little-endian | n bytes of JSON | the tensors, end to end
    {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}

The `safetensors` library reads and writes this too (and is the oracle of our
tests), but it maps whole files into memory, takes the last of two tensors of
one name, and writes only what is all in memory at once.
https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np

_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
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
_MAX_HEADER = 100_000_000  # Bytes, as the format has it.


class Tensor(NamedTuple):
  """Where a tensor lies in a file; nothing of it is read yet.

  Attributes:
    path: the file.
    name: the tensor.
    dtype: of its elements.
    shape: of the whole.
    offset: of its first byte in the file.
  """

  path: Path
  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    """The tensor, or its rows `start` to `stop` along the first axis.

    Raises:
      ValueError: the file has become shorter.
    """
    shape, offset = self.shape, self.offset
    if shape:
      first, last, _ = slice(start, stop).indices(shape[0])
      shape = (max(last - first, 0), *shape[1:])
      offset += first * math.prod(shape[1:]) * self.dtype.itemsize
    size = math.prod(shape) * self.dtype.itemsize
    data = np.fromfile(self.path, np.uint8, count=size, offset=offset)
    if data.size != size:
      raise _refuse(
        self.path, f"{data.size} bytes of {self.name!r}", f"{size} bytes"
      )
    return data.view(self.dtype).reshape(shape)


def read_header(path: Path) -> dict[str, Tensor]:
  """What a file holds, by name; every byte of it accounted for.

  Raises:
    ValueError: a file that is cut off, or whose header is malformed, names a
      tensor twice, or leaves bytes out, to two tensors or beyond the end.
  """
  with path.open("rb") as file:
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
      raise _refuse(
        path, f"a header of {length} bytes in {size}", "one within the file"
      )
    text = file.read(length)
  try:
    header = json.loads(text, object_pairs_hook=_without_duplicates)
  # Too deep a nesting is malformed too.
  except (ValueError, RecursionError) as error:
    raise _refuse(path, f"a header with {error}", "JSON") from error
  if not isinstance(header, dict):
    raise _refuse(path, type(header).__name__, "an object of tensors")
  metadata = header.pop("__metadata__", {})
  if not isinstance(metadata, dict):
    raise _refuse(path, "__metadata__ of another kind", "an object")
  tensors = [
    _entry(path, name, entry, 8 + length) for name, entry in header.items()
  ]
  at = 8 + length
  for tensor in sorted(tensors, key=lambda t: (t.offset, t.num_bytes)):
    if tensor.offset != at:
      raise _refuse(
        path, f"{tensor.name!r} at byte {tensor.offset}", f"it at byte {at}"
      )
    at += tensor.num_bytes
  if at != size:
    raise _refuse(path, f"{size} bytes", f"{at} bytes, by its header")
  return {tensor.name: tensor for tensor in tensors}


def _entry(path: Path, name: str, entry: Any, start: int) -> Tensor:
  """One line of the header, its size checked against its shape."""
  if not isinstance(entry, dict):
    entry = {}
  dtype, shape = entry.get("dtype"), entry.get("shape")
  offsets = entry.get("data_offsets")
  if not isinstance(dtype, str) or dtype not in _DTYPES:
    raise _refuse(path, f"{name!r} of dtype {dtype!r}", f"{list(_DTYPES)}")
  if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
    raise _refuse(
      path, f"{name!r} with shape {shape!r} at {offsets!r}", "whole numbers"
    )
  found = np.dtype(_DTYPES[dtype])
  wanted = math.prod(shape) * found.itemsize
  if offsets[1] - offsets[0] != wanted:
    raise _refuse(
      path,
      f"{name!r} in {offsets[1] - offsets[0]} bytes",
      f"{wanted} bytes for {dtype} {shape}",
    )
  return Tensor(path, name, found, tuple(shape), start + offsets[0])


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
  return isinstance(value, list) and all(
    type(x) is int and 0 <= x < 2**63 for x in value
  )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"{twice!r} twice")
  return found


def _refuse(path: Path, got: str, expected: str) -> ValueError:
  return ValueError(
    f"{path}: not a whole safetensors file: got {got[:400]}; expected "
    f"{expected}. Download it again."
  )


class Pending(NamedTuple):
  """A tensor to write, made when its turn comes.

  Attributes:
    name: its name in the file.
    dtype: of its elements there.
    shape: of the whole.
    make: gives the array.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]

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
      tensor.make()
    return
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in ordered:
      array = tensor.make()
      assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape)
      # In C order, whatever its strides.
      flat = np.ascontiguousarray(array).reshape(-1)
      file.write(flat.view(np.uint8).data)
