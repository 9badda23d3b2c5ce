"""A frozen base in few bits: int8 or nf4 codes and a scale per block.

A quantized array `kernel` [..., in, out] is kept as two leaves in its place:

    kernel_codes  int8 [..., in, out], or nf4 two to a byte: uint8 [..., in/2,
                  out], the even rows in the low half
    kernel_scale  bfloat16 [..., in / block, out]

    kernel[i, o] ~= value(code[i, o]) * scale[i // block, o]

Blocks run along the axis that the product sums over, 64 long or as long as
divides it. Absmax int8 is the format of LLM.int8() cut into blocks; nf4 and its
16 values are those of QLoRA (Dettmers et al. 2023, arXiv 2305.14314).
Embeddings [V, D] are int8 under both codecs, blocks along D: an error in a row
is not averaged out by a product, and bfloat16 would outweigh the nf4 kernels.
"""

import functools
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from sft_jax.common import trees
from sft_jax.common.trees import Tree

CODECS = ("int8", "nf4")
BLOCK = 64


@functools.cache
def nf4_values() -> np.ndarray:
  """The 16 values of nf4 in [-1, 1], ascending, float32; 0 is one of them.

  Quantiles of the standard normal at 8 places above zero and 7 below, scaled
  to end at +-1 (QLoRA, appendix E). The last quantile is the mean of 1 - 1/30
  and 1 - 1/32, whose quantile is finite.
  """
  last = 0.9677083
  quantile = NormalDist().inv_cdf
  above = [quantile(p) for p in np.linspace(last, 0.5, 9)[:-1]]
  below = [-quantile(p) for p in np.linspace(last, 0.5, 8)[:-1]]
  values = np.array(sorted([*above, 0.0, *below]))
  return (values / values.max()).astype(np.float32)


def encode(
  x: Float[Array, "..."], codec: str, *, axis: int = -2
) -> tuple[Integer[Array, "..."], Float[Array, "..."]]:
  """(codes, scales) of an array, blocks running along `axis`.

  Each block is divided by its largest magnitude and rounded to the nearest
  value. The scale is rounded to bfloat16 first, so that the codes make up for
  it.

  Raises ValueError: an unknown codec; nf4 of an axis of odd length.
  """
  if codec not in CODECS:
    raise ValueError(
      f"model.quantize: got {codec!r}, expected one of {CODECS}, or ''."
    )
  axis, size = axis % x.ndim, x.shape[axis]
  block = math.gcd(size, BLOCK)
  if codec == "nf4" and block % 2:
    raise ValueError(
      f"quantize: nf4 of an axis of {size}; expected an even length, as two "
      "codes share a byte. Use int8."
    )
  x = x.astype(jnp.float32)
  split = (*x.shape[:axis], size // block, block, *x.shape[axis + 1 :])
  blocks = x.reshape(split)
  scale = jnp.max(jnp.abs(blocks), axis=axis + 1).astype(jnp.bfloat16)
  divisor = jnp.where(scale == 0, 1, scale).astype(jnp.float32)
  unit = (blocks / jnp.expand_dims(divisor, axis + 1)).reshape(x.shape)
  if codec == "int8":
    codes = jnp.clip(jnp.round(unit * 127), -127, 127).astype(jnp.int8)
    return codes, scale
  values = nf4_values()
  codes = jnp.searchsorted((values[1:] + values[:-1]) / 2, unit)
  pairs = (*x.shape[:axis], size // 2, 2, *x.shape[axis + 1 :])
  codes = codes.astype(jnp.uint8).reshape(pairs)
  low, high = (jnp.take(codes, i, axis=axis + 1) for i in (0, 1))
  return low | (high << 4), scale


def decode(
  codes: Integer[Array, "..."],
  scale: Float[Array, "..."],
  dtype: jnp.dtype | type = jnp.float32,
  *,
  axis: int = -2,
) -> Float[Array, "..."]:
  axis %= codes.ndim
  if codes.dtype == jnp.uint8:
    halves = jnp.stack((codes & 15, codes >> 4), axis + 1)
    shape = list(codes.shape)
    shape[axis] *= 2
    values = jnp.asarray(nf4_values())[halves.reshape(shape)]
  else:
    values = codes.astype(jnp.float32) * (1 / 127)
  block = values.shape[axis] // scale.shape[axis]
  scale = jnp.repeat(scale.astype(jnp.float32), block, axis=axis)
  return (values * scale).astype(dtype)


# -- Trees ------------------------------------------------------------------


def _axis(path: str) -> int:
  return -1 if path.endswith("/embedding") else -2


def pack(path: str, x: jax.Array, codec: str) -> dict[str, jax.Array]:
  """The leaves that stand in for one: codes and scale, or itself. Kernels take
  the codec, embeddings int8; norms, biases and adapters stay, and routers,
  where near ties decide which experts a token sees."""
  if not path.endswith(("/kernel", "/embedding")) or "/router/" in path:
    return {path: x}
  codec = "int8" if path.endswith("/embedding") else codec
  one = functools.partial(encode, codec=codec, axis=_axis(path))
  # A stack layer by layer: the float32 copies are those of one layer.
  codes, scale = jax.lax.map(one, x) if x.ndim > 2 else one(x)
  return {f"{path}_codes": codes, f"{path}_scale": scale}


def pack_tree(
  params: Tree, codec: str, *, keep: Callable[[str], bool] = lambda path: False
) -> Tree:
  """The tree with its kernels and embeddings quantized, except `keep`'s."""
  flat: dict[str, jax.Array] = {}
  for path, x in trees.flatten(params).items():
    flat |= {path: x} if keep(path) else pack(path, x, codec)
  return trees.unflatten(dict(sorted(flat.items())))


def unpack(
  flat: dict[str, jax.Array], path: str, dtype: jnp.dtype | type = jnp.float32
) -> tuple[str, jax.Array]:
  """The (path, array) that the leaf `path`, ending '_codes', stands for."""
  whole = path.removesuffix("_codes")
  scale = flat[f"{whole}_scale"]
  return whole, decode(flat[path], scale, dtype, axis=_axis(whole))


def num_scalars(path: str, leaf: Any) -> int:
  """Parameters that a leaf stands for: two to a byte of nf4, none to a scale.

  >>> num_scalars('q/kernel_codes', np.zeros((4, 2), np.uint8))
  16
  """
  if path.endswith(("kernel_scale", "embedding_scale")):
    return 0
  return int(np.prod(leaf.shape)) * (2 if leaf.dtype == jnp.uint8 else 1)
