"""Short convolution: each channel sums the last W inputs of its document.

    y[t] = w[W - 1] x[t] + w[W - 2] x[t - 1] + ... + w[0] x[t - W + 1] + b

What is before the start of a document counts as 0. While decoding, a cache
holds the last W - 1 inputs of each row.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from sft_jax.models.attention.parallel import whole_rows

Dtype = Any


def short_conv(
  x: Float[Array, "B T C"],
  taps: Float[Array, "W 1 C"],
  bias: Float[Array, " C"] | None,
  starts: Bool[Array, "B T"],
) -> Float[Array, "B T C"]:
  """The convolution of whole rows by taps w and bias b, in float32 inside.
  `starts`: the first token of each document."""
  before = jnp.zeros((len(x), len(taps) - 1, x.shape[2]), x.dtype)
  document = jnp.cumsum(starts, axis=1)
  return _windows(x, before, document, taps, bias)


def short_conv_step(
  x: Float[Array, "B T C"],
  taps: Float[Array, "W 1 C"],
  bias: Float[Array, " C"] | None,
  starts: Bool[Array, "B T"],
  valid: Bool[Array, "B T"],
  before: Float[Array, "B W-1 C"],
) -> tuple[Float[Array, "B T C"], Float[Array, "B W-1 C"]]:
  """The convolution of T more tokens per row, and the last inputs after them.

  Args:
    valid: False of padding, which may be anywhere and is passed over.
    before: the last inputs so far; a document that starts does not see them.
  """
  # Padding goes to the end, so that windows hold the tokens alone.
  order = jnp.argsort(~valid, axis=1, stable=True)
  x = jnp.take_along_axis(x, order[..., None], axis=1)
  starts = jnp.take_along_axis(starts & valid, order, axis=1)
  document = jnp.cumsum(starts, axis=1)
  y = _windows(x, before, document, taps, bias)
  y = jnp.take_along_axis(y, jnp.argsort(order, axis=1)[..., None], axis=1)
  last = jnp.sum(valid, axis=1, keepdims=True) + jnp.arange(before.shape[1])
  whole = jnp.concatenate((before.astype(x.dtype), x), axis=1)
  after = jnp.take_along_axis(whole, last[..., None], axis=1)
  document = jnp.pad(document, ((0, 0), (before.shape[1], 0)))
  document = jnp.take_along_axis(document, last, axis=1)
  own = document == jnp.max(document, axis=1, keepdims=True)
  return y, jnp.where(own[..., None], after, 0).astype(before.dtype)


@jax.checkpoint
def _windows(x, before, document, taps, bias):
  """Sums over windows that stay in a document; `before` is document 0."""
  T, W = x.shape[1], len(taps)
  x = jnp.concatenate((before.astype(x.dtype), x), axis=1)
  numbers = jnp.pad(document, ((0, 0), (W - 1, 0)))
  y = jnp.zeros(()) if bias is None else bias.astype(jnp.float32)
  for i in range(W):
    own = numbers[:, i : i + T] == document
    part = jnp.where(own[..., None], x[:, i : i + T], 0)
    y = y + taps[i, 0].astype(jnp.float32) * part.astype(jnp.float32)
  return y.astype(x.dtype)


class ShortConv(nn.Module):
  """Holds the taps of a short convolution, and its state in a cache."""

  width: int
  use_bias: bool
  mesh: Any
  param_dtype: Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "B T C"], context, kv, slot):
    W, C = self.width, x.shape[-1]

    def uniform(key, shape, dtype):
      return jax.random.uniform(key, shape, dtype, -(W**-0.5), W**-0.5)

    taps = self.param("taps", uniform, (W, 1, C), self.param_dtype)
    bias = None
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (C,), self.param_dtype)
    if kv is None:
      x = whole_rows(x, self.mesh)
      return short_conv(x, taps, bias, context.starts), None
    y, after = short_conv_step(
      x, taps, bias, context.starts, context.valid, kv["conv"][slot]
    )
    return y, kv | {"conv": kv["conv"].at[slot].set(after)}
