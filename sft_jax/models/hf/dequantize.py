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
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Num, Shaped

from sft_jax.models.hf.safetensors_files import Tensor

Json = Mapping[str, Any]
_METHODS = {
  *("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4"),
  *("bitsandbytes", "gptq", "awq"),
}
# Scales of activations and of caches, which say nothing of weights.
_ACTIVATIONS = ("input_scale", "activation_scale", "k_scale", "v_scale")
_ACTIVATIONS += ("output_scale", "weight_format", "input_zero_point")


class Decoded(NamedTuple):
  """A weight made of several tensors; stands in for a `Tensor`.

  Attributes:
    path: the file of its codes.
    name: the weight.
    shape: of the weight, [out, in] as in files that are not quantized.
    decode: gives all of it, float32.
  """

  path: Path
  name: str
  shape: tuple[int, ...]
  decode: Callable[[], np.ndarray]
  dtype: np.dtype = np.dtype(np.float32)

  @property
  def num_bytes(self) -> int:
    return int(np.prod(self.shape)) * 4

  def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    return self.decode()[start:stop]


def check_method(config: Json, where: Path) -> str:
  """The name of the format; '' without one. Raises ValueError: unknown."""
  found = config.get("quantization_config")
  if found is None:
    return ""
  method = found.get("quant_method") if isinstance(found, Mapping) else found
  if method is None and isinstance(found, Mapping):
    bits = found.get("load_in_4bit") or found.get("load_in_8bit")
    method = "bitsandbytes" if bits else None
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

  Args:
    tensors: by name, as in the files.
    config: its `quantization_config`.

  Raises:
    ValueError: a part of a weight is missing, or a variant is not supported;
      the tensor is named.
  """
  left: dict[str, Tensor] = dict(tensors)
  made: dict[str, Tensor | Decoded] = {}

  def take(name: str, suffix: str) -> Tensor:
    found = left.pop(name + suffix, None)
    if found is None:
      raise ValueError(
        f"{next(iter(tensors.values())).path.parent}: no tensor "
        f"{name + suffix}; expected it beside the other parts of {name}. "
        "Download the checkpoint again."
      )
    return found

  def may(name: str, suffix: str) -> Tensor | None:
    return left.pop(name + suffix, None)

  for name in tensors:
    if name not in left:
      continue
    base, _, leaf = name.rpartition(".")
    weight, tensor = f"{base}.weight", tensors[name]
    decode: Callable[[], np.ndarray] | None = None
    shape = tensor.shape
    if leaf == "qweight":
      parts = [take(base, s) for s in (".qweight", ".qzeros", ".scales")]
      order = may(base, ".g_idx")
      kind = config.get("quant_method")
      bits = _choice(config.get("bits", 4), (2, 4, 8), "bits", name)
      _choice(config.get("version", "gemm"), ("gemm", "GEMM"), "version", name)
      if kind == "awq":
        _choice(bits, (4,), "bits", name)
        decode = partial(_awq, *parts)
        shape = (parts[2].shape[1], parts[0].shape[0])
      else:
        offset = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
        decode = partial(_gptq, *parts, order, bits, offset)
        shape = (parts[2].shape[1], parts[0].shape[0] * 32 // bits)
    elif leaf == "weight_packed":
      parts = [take(base, s) for s in (".weight_packed", ".weight_scale")]
      zeros, order = may(base, ".weight_zero_point"), may(base, ".weight_g_idx")
      shape = tuple(int(n) for n in take(base, ".weight_shape").read())
      if order is not None and (order.read() < 0).all():
        order = None
      bits = parts[0].shape[1] * 32 // max(shape[1], 1)
      bits = _choice(bits, (2, 4, 8), "num_bits", name)
      decode = partial(_packed, *parts, zeros, order, bits, shape)
    elif leaf.endswith("_blocks"):
      weight = name.removesuffix("_blocks")
      parts = [take(weight, "_blocks"), take(weight, "_scales")]
      decode = partial(_mxfp4, *parts)
      E, rows, blocks, _ = shape
      shape = (E, blocks * 32, rows)
    elif leaf == "weight" and tensor.dtype == np.uint8:
      at = [f"{name}.quant_state.bitsandbytes__{k}" for k in ("nf4", "fp4")]
      state = next((left.pop(k) for k in at if k in left), None)
      if state is None:
        raise ValueError(
          f"{tensor.path}: no tensor {at[0]}; expected it beside {name}. "
          "Save the model with bitsandbytes 0.41 or later."
        )
      says = json.loads(state.read().tobytes())
      codes = [take(name, s) for s in ("", ".absmax", ".quant_map")]
      nested = may(name, ".nested_absmax"), may(name, ".nested_quant_map")
      decode = partial(_bitsandbytes, *codes, *nested, says)
      shape = tuple(says["shape"])
    elif leaf == "weight" and tensor.dtype.itemsize == 1:
      codes = take(base, ".weight")
      rows = may(base, ".SCB")
      scale = rows or next(
        (
          left.pop(f"{base}.{s}")
          for s in ("weight_scale_inv", "weight_scale")
          if f"{base}.{s}" in left
        ),
        None,
      )
      if scale is None:
        scale = take(base, ".weight_scale")
      zero, block = (
        may(base, ".weight_zero_point"),
        config.get("weight_block_size"),
      )
      by = 1 / 127 if rows is not None else 1.0
      decode = partial(_scaled, codes, scale, zero, block, by)
    if decode is not None:
      made[weight] = Decoded(tensor.path, weight, tuple(shape), decode)
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
  codes: Tensor,
  zeros: Tensor,
  scales: Tensor,
  order: Tensor | None,
  bits: int,
  offset: int,
) -> Float32[np.ndarray, "O I"]:
  """(q - z - offset) * s of the group of each input. arXiv:2210.17323.

  Codes are packed along the input, zeros along the output; the first version
  of the format stores zeros less one.
  """
  q = _unpack(np.ascontiguousarray(codes.read().T), bits)  # [out, in]
  z = _unpack(zeros.read(), bits).T + offset  # [out, groups]
  s = scales.read().astype(np.float32).T
  if order is None:
    group = np.arange(q.shape[1]) // (q.shape[1] // s.shape[1])
  else:
    group = order.read()
  return (q - z[: len(q), group]).astype(np.float32) * s[:, group]


# The order of the eight fields of a word.
_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)


def _awq(
  codes: Tensor, zeros: Tensor, scales: Tensor
) -> Float32[np.ndarray, "O I"]:
  """(q - z) * s; all packed along the output. arXiv:2306.00978."""

  def fields(x: np.ndarray) -> np.ndarray:
    return _unpack(x, 4).reshape(len(x), -1, 8)[..., _AWQ].reshape(len(x), -1)

  q, z = fields(codes.read()), fields(zeros.read())
  s = scales.read().astype(np.float32)
  size = len(q) // len(s)
  q = (q - np.repeat(z, size, 0)).astype(np.float32)
  return np.ascontiguousarray((q * np.repeat(s, size, 0)).T)


def _packed(
  codes: Tensor,
  scales: Tensor,
  zeros: Tensor | None,
  order: Tensor | None,
  bits: int,
  shape: tuple[int, ...],
) -> Float32[np.ndarray, "O I"]:
  """(q - z) * s of compressed-tensors; q and z are stored plus 2^(bits-1)."""
  rows, columns = shape
  half = 1 << (bits - 1)
  q = (_unpack(codes.read(), bits)[:, :columns] - half).astype(np.float32)
  s = scales.read().astype(np.float32).reshape(rows, -1)
  if order is None:
    group = np.arange(columns) // (columns // s.shape[1])
  else:
    group = order.read()
  if zeros is not None:
    z = zeros.read()
    if z.dtype == np.int32:  # Packed along the output.
      z = _unpack(np.ascontiguousarray(z.T), bits).T[:rows] - half
    q -= z.astype(np.float32).reshape(rows, -1)[:, group]
  return q * s[:, group]


def _scaled(
  codes: Tensor,
  scales: Tensor,
  zeros: Tensor | None,
  block: list[int] | None,
  by: float,
) -> Float32[np.ndarray, "O I"]:
  """Codes times their scale: one, one per row, per group or per block."""
  w = codes.read().astype(np.float32)
  s = np.atleast_1d(scales.read().astype(np.float32)) * np.float32(by)

  def over(x: np.ndarray) -> np.ndarray:
    if x.size == 1:
      return x.reshape(1, 1)
    x = x.reshape(len(x), -1)
    # The last block of an axis may be cut.
    rows, columns = block or [
      -(-n // m) for n, m in zip(w.shape, x.shape, strict=True)
    ]
    x = np.repeat(np.repeat(x, rows, 0), columns, 1)
    return x[: w.shape[0], : w.shape[1]]

  if zeros is not None:
    w = w - over(zeros.read().astype(np.float32))
  return w * over(s)


def _bitsandbytes(
  codes: Tensor,
  absmax: Tensor,
  table: Tensor,
  outer: Tensor | None,
  outer_table: Tensor | None,
  says: Json,
) -> Num[np.ndarray, "..."]:
  """table[q] * absmax of its block, along the flattened weight.

  Two codes to a byte, the high one first. In "double quantization" absmax is
  itself table[code] * absmax of 256 of them, plus an offset. arXiv:2305.14314.
  """
  byte = codes.read().reshape(-1)
  q = np.stack((byte >> 4, byte & 15), axis=-1).reshape(-1)
  shape = tuple(says["shape"])
  q = q[: int(np.prod(shape))]
  largest = absmax.read().reshape(-1)
  if outer is not None and outer_table is not None:
    size = says["nested_blocksize"]
    wide = np.repeat(outer.read(), size)[: len(largest)]
    largest = outer_table.read()[largest] * wide + says["nested_offset"]
  scale = np.repeat(largest.astype(np.float32), says["blocksize"])[: len(q)]
  return (table.read().astype(np.float32)[q] * scale).reshape(shape)


# e2m1: a sign, two bits of exponent, one of mantissa.
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_E2M1 = np.concatenate((_E2M1, -_E2M1))


def _mxfp4(blocks: Tensor, scales: Tensor) -> Float32[np.ndarray, "E I O"]:
  """e2m1 * 2^(scale - 127), 32 to a scale; the low half of a byte is first.

  Stored [E, out, in / 32, 16]; the weight is [E, in, out]. OCP Microscaling
  Formats, version 1.0.
  """
  byte = blocks.read()
  q = np.stack((byte & 15, byte >> 4), axis=-1)
  q = q.reshape(*byte.shape[:-1], -1)
  power = scales.read().astype(np.int32)[..., None] - 127
  w = np.ldexp(_E2M1[q], power)
  return np.swapaxes(w.reshape(*w.shape[:2], -1), 1, 2)
