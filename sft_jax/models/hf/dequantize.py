"""Checkpoints in few bits, read as plain weights.

Every published format keeps a module's weight as codes and scales, in tensors
of their own. `dequantized` replaces each such group by one tensor of the
module's weight, which is decoded while it is read:

    fp8              w (float8) * scale: one, one per row, or one per block
    compressed       packed int4/int8 in 32 bits, (q - zero) * scale per group
    gptq, awq        packed along the input or the output, likewise
    bitsandbytes     nf4/fp4 codes of a table, * absmax per block; int8 by row
    mxfp4            4-bit floats (e2m1) * 2^(scale - 127) per 32 (gpt-oss)

A format is found by its tensors; `quantization_config` gives its numbers.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Num, Shaped

from sft_jax.models.hf.safetensors_files import Tensor

Array = np.ndarray
Json = Mapping[str, Any]
_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4", "gptq", "awq")
_METHODS += ("bitsandbytes",)
# Scales of activations and of caches, which say nothing of weights.
_ACTIVATIONS = ("input_scale", "activation_scale", "k_scale", "v_scale")
_ACTIVATIONS += ("output_scale", "weight_format", "input_zero_point")


class Decoded(NamedTuple):
  """A weight made of several tensors; stands in for a `Tensor`.

  Attributes:
    shape: of the weight, [out, in] as in files that are not quantized.
    decode: gives rows, float32, from the same rows of its parts.
    parts: its tensors, None for one that this weight does without.
    unit: rows of the weight that can be decoded alone; 0 for none.
    rows: of each part that a unit takes; 0 is all of it, -1 the rows that the
      last part names.
    turned: rows are of the transposed weight: codes are packed along the
      input.
  """

  path: Path
  name: str
  shape: tuple[int, ...]
  decode: Callable[..., np.ndarray]
  parts: tuple[Tensor | None, ...]
  dtype: np.dtype = np.dtype(np.float32)
  unit: int = 0
  rows: tuple[int, ...] = ()
  turned: bool = False

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * 4

  def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows of the weight, as of a `Tensor`."""
    return (
      self.read_turned().T[start:stop]
      if self.turned
      else self._read(start, stop)
    )

  def read_turned(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows of the transposed weight, where they are `turned`."""
    assert self.turned
    return self._read(start, stop)

  def _read(self, start: int, stop: int | None) -> np.ndarray:
    total = self.shape[-1 if self.turned else 0]
    start, stop, _ = slice(start, stop).indices(total)
    if stop <= start:
      _, *rest = self.shape[::-1] if self.turned else self.shape
      return np.empty((0, *rest), np.float32)
    if not self.unit:
      return self.decode(*(x and x.read() for x in self.parts))[start:stop]
    first, last = start // self.unit, -(-stop // self.unit)
    named = self.parts[-1] if -1 in self.rows else None
    order = named.read(start, stop) if named else np.zeros(1, np.int32)
    least = int(order.min())

    def part(x: Tensor | None, rows: int) -> np.ndarray | None:
      if x is None or not rows:
        return x and x.read()
      if rows < 0:
        return x.read(least, int(order.max()) + 1)
      # Its own rows, among others that make the units whole.
      low, high = start * rows // self.unit, -(-stop * rows // self.unit)
      own = x.read(low, high) if x is not named else order - least
      if len(own) == (last - first) * rows:
        return own
      whole = np.zeros(((last - first) * rows, *own.shape[1:]), own.dtype)
      whole[low - first * rows :][: len(own)] = own
      return whole

    parts = map(part, self.parts, self.rows)
    return self.decode(*parts)[start - first * self.unit :][: stop - start]


def check_method(config: Json, where: Path) -> str:
  """The name of the format; '' without one. Raises ValueError: unknown."""
  found = config.get("quantization_config")
  if found is None:
    return ""
  method = found
  if isinstance(found, Mapping):
    bits = found.get("load_in_4bit") or found.get("load_in_8bit")
    method = found.get("quant_method") or ("bitsandbytes" if bits else None)
  if not isinstance(method, str) or method not in _METHODS:
    raise ValueError(
      f"{where}: quantization_config.quant_method={method!r:.80} is not "
      f"supported; expected one of {sorted(_METHODS)}. Load the model in "
      "transformers dequantized, save it, and use that folder."
    )
  return method


def dequantized(
  tensors: Mapping[str, Tensor], config: Json
) -> dict[str, Tensor | Decoded]:
  """The tensors of a checkpoint, with weights in place of their codes.

  Raises ValueError: a part of a weight is missing, or a variant is not
  supported; the tensor is named.
  """
  left: dict[str, Tensor] = dict(tensors)
  made: dict[str, Tensor | Decoded] = {}

  def may(name: str) -> Tensor | None:
    return left.pop(name, None)

  def take(name: str) -> Tensor:
    if name not in left:
      raise ValueError(
        f"{next(iter(tensors.values())).path.parent}: no tensor {name}; "
        "expected it beside the other parts of its weight. Download it again."
      )
    return left.pop(name)

  for name, codes in tensors.items():
    if name not in left:
      continue
    base, _, leaf = name.rpartition(".")
    weight, decode = f"{base}.weight", None
    parts: list[Tensor | None] = []
    rows: list[int] = []
    shape, unit, turned = codes.shape, 0, False
    if leaf == "qweight":
      bits = _choice(config.get("bits", 4), (2, 4, 8), "bits", name)
      _choice(config.get("version", "gemm"), ("gemm", "GEMM"), "version", name)
      scales = take(f"{base}.scales")
      parts = [take(name), take(f"{base}.qzeros"), scales]
      groups, turned = max(scales.shape[0], 1), True
      if config.get("quant_method") == "awq":
        _choice(bits, (4,), "bits", name)
        decode, inputs = _awq, shape[0]
        unit = inputs // groups
        rows = [unit, 1, 1]
      else:
        parts.append(may(f"{base}.g_idx"))
        offset = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
        decode, inputs = partial(_gptq, bits, offset), shape[0] * 32 // bits
        # With an order any input may be of any group.
        unit = 32 // bits if parts[-1] else inputs // groups
        rows = [unit * bits // 32, *([-1] * 2 if parts[-1] else [1] * 2), unit]
      shape = (scales.shape[1], inputs)
    elif leaf == "weight_packed":
      parts = [take(name), take(f"{base}.weight_scale")]
      more = ("weight_zero_point", "weight_g_idx")
      parts += [may(f"{base}.{s}") for s in more]
      shape = tuple(take(f"{base}.weight_shape").read().tolist())
      bits = codes.shape[1] * 32 // max(shape[1], 1)
      bits = _choice(bits, (2, 4, 8), "num_bits", name)
      decode = partial(_packed, bits, shape[1])
      zeros = parts[2]
      in_words = zeros is not None and zeros.dtype == np.int32
      unit = 32 // bits if in_words else 1
      rows = [unit, unit, 1, 0]
    elif leaf.endswith("_blocks"):
      weight = name.removesuffix("_blocks")
      parts = [take(name), take(f"{weight}_scales")]
      decode, unit, rows = _mxfp4, 1, [1, 1]
      shape = (shape[0], shape[2] * 32, shape[1])
    elif leaf == "weight" and codes.dtype == np.uint8:
      state = f"{name}.quant_state.bitsandbytes__"
      found = may(f"{state}fp4") or take(f"{state}nf4")
      says = json.loads(found.read().tobytes())
      parts = [take(name), take(f"{name}.absmax"), take(f"{name}.quant_map")]
      parts += [may(f"{name}.nested_{s}") for s in ("absmax", "quant_map")]
      decode, shape = partial(_bitsandbytes, says), tuple(says["shape"])
      unit, rows = _bitsandbytes_rows(says, nested=parts[3] is not None)
    elif leaf == "weight" and codes.dtype.itemsize == 1:
      by_row = may(f"{base}.SCB")
      scale = by_row or may(f"{base}.weight_scale_inv")
      parts = [take(name), scale or take(f"{base}.weight_scale")]
      parts.append(may(f"{base}.weight_zero_point"))
      block = config.get("weight_block_size")
      decode = partial(_scaled, block, 1 / 127 if by_row else 1.0)
      unit, rows = _scaled_rows(block, codes, parts[1] or codes)
    if decode is not None:
      made[weight] = Decoded(
        *(codes.path, weight, shape, decode, tuple(parts)),
        unit=unit,
        rows=tuple(rows),
        turned=turned,
      )
  for name, tensor in left.items():
    if not name.endswith(_ACTIVATIONS):
      made.setdefault(name, tensor)
  return made


def _choice(value: Any, allowed: tuple, field: str, name: str) -> Any:
  if value not in allowed:
    raise ValueError(
      f"{name}: quantization_config.{field}={value!r:.80} is not supported; "
      f"expected one of {list(allowed)}. Load the model in transformers "
      "dequantized, save it, and use that folder."
    )
  return value


def _unpack(
  words: Shaped[np.ndarray, "rows columns"], bits: int
) -> Int32[np.ndarray, "rows fields"]:
  """The fields of 32-bit words, lowest bits first, along the last axis."""
  shifts = np.arange(0, 32, bits, dtype=np.uint32)
  fields = words.view(np.uint32)[..., None] >> shifts
  fields = (fields & np.uint32((1 << bits) - 1)).astype(np.int32)
  return fields.reshape(len(words), -1)


def _gptq(
  bits: int, offset: int, codes: Array, zeros: Array, scales: Array, order: Any
) -> Float32[np.ndarray, "I O"]:
  """(q - z - offset) * s of the group of each input. arXiv:2210.17323.

  Codes are packed along the input, zeros along the output; the first version
  of the format stores zeros less one.
  """
  q = _unpack(np.ascontiguousarray(codes.T), bits).T  # [in, out]
  z = _unpack(zeros, bits) + offset  # [groups, out]
  s = scales.astype(np.float32)
  size = len(q) // len(s)
  group = np.arange(len(q)) // size if order is None else order
  return (q - z[group, : q.shape[1]]).astype(np.float32) * s[group]


# The order of the eight fields of a word.
_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)


def _awq(
  codes: Array, zeros: Array, scales: Array
) -> Float32[np.ndarray, "I O"]:
  """(q - z) * s; all packed along the output. arXiv:2306.00978."""

  def fields(x: np.ndarray) -> np.ndarray:
    return _unpack(x, 4).reshape(len(x), -1, 8)[..., _AWQ].reshape(len(x), -1)

  q, z, s = fields(codes), fields(zeros), scales.astype(np.float32)
  group = np.arange(len(q)) // (len(q) // len(s))
  return (q - z[group]).astype(np.float32) * s[group]


def _packed(
  bits: int,
  columns: int,
  codes: Array,
  scales: Array,
  zeros: Any,
  order: Any,
) -> Float32[np.ndarray, "O I"]:
  """(q - z) * s of compressed-tensors; q and z are stored plus 2^(bits-1)."""
  rows, half = len(codes), 1 << (bits - 1)
  q = (_unpack(codes, bits)[:, :columns] - half).astype(np.float32)
  s = scales.astype(np.float32).reshape(rows, -1)
  group = np.arange(columns) // (columns // s.shape[1])
  if order is not None and (order >= 0).all():  # -1: in order.
    group = order
  if zeros is not None:
    if zeros.dtype == np.int32:  # Packed along the output.
      zeros = _unpack(np.ascontiguousarray(zeros.T), bits).T[:rows] - half
    q -= zeros.astype(np.float32).reshape(rows, -1)[:, group]
  return q * s[:, group]


def _scaled(
  block: Any, by: float, codes: Array, scales: Array, zeros: Any
) -> Float32[np.ndarray, "O I"]:
  """Codes times their scale: one, one per row, per group or per block."""
  w = codes.astype(np.float32)

  def over(x: np.ndarray) -> np.ndarray:
    x = np.atleast_1d(x.astype(np.float32))
    if x.size == 1:
      return x.reshape(1, 1)
    x = x.reshape(len(x), -1)
    # The last block of an axis may be cut.
    fit = [-(-n // m) for n, m in zip(w.shape, x.shape, strict=True)]
    rows, columns = block or fit
    x = np.repeat(np.repeat(x, rows, 0), columns, 1)
    return x[: w.shape[0], : w.shape[1]]

  w = w if zeros is None else w - over(zeros)
  return w * (over(scales) * np.float32(by))


def _scaled_rows(
  block: Any, codes: Tensor, scales: Tensor
) -> tuple[int, list[int]]:
  """The unit of codes with scales, and its rows of the parts."""
  total, count = codes.shape[0], (*scales.shape, 1)[0]
  if math.prod(scales.shape) <= 1:
    return 1, [1, 0, 0]
  unit = block[0] if block else -(-total // count)
  return unit, [unit, 1, 1]


def _bitsandbytes_rows(says: Json, *, nested: bool) -> tuple[int, list[int]]:
  """The same of codes along the flattened weight."""
  columns, block = math.prod(says["shape"][1:]), says["blocksize"]
  group = says["nested_blocksize"] if nested else 1
  size = math.lcm(columns, 2 * block * group)
  blocks = size // block
  return size // columns, [size // 2, blocks, 0, blocks // group, 0]


def _bitsandbytes(
  says: Json, codes: Array, absmax: Array, table: Array, outer: Any, wide: Any
) -> Num[np.ndarray, "..."]:
  """table[q] * absmax of its block, along the flattened weight.

  Two codes to a byte, the high one first. In "double quantization" absmax is
  itself a code, wide[absmax] * outer of some of them, plus an offset.
  arXiv:2305.14314.
  """
  byte = codes.reshape(-1)
  q = np.stack((byte >> 4, byte & 15), axis=-1).reshape(-1)
  largest, shape = absmax.reshape(-1), says["shape"][1:]
  if outer is not None:
    scale = np.repeat(outer, says["nested_blocksize"])[: len(largest)]
    largest = wide[largest] * scale + says["nested_offset"]
  scale = np.repeat(largest.astype(np.float32), says["blocksize"])[: len(q)]
  return (table.astype(np.float32)[q] * scale).reshape(-1, *shape)


# e2m1: a sign, two bits of exponent, one of mantissa.
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_E2M1 = np.concatenate((_E2M1, -_E2M1))


def _mxfp4(blocks: Array, scales: Array) -> Float32[np.ndarray, "E I O"]:
  """e2m1 * 2^(scale - 127), 32 to a scale; the low half of a byte is first.

  Stored [E, out, in / 32, 16]; the weight is [E, in, out]. OCP Microscaling
  Formats, version 1.0.
  """
  q = np.stack((blocks & 15, blocks >> 4), axis=-1)
  q = q.reshape(*blocks.shape[:-1], -1)
  w = np.ldexp(_E2M1[q], scales.astype(np.int32)[..., None] - 127)
  return np.swapaxes(w.reshape(*w.shape[:2], -1), 1, 2)
