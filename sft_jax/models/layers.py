"""The parts every block is made of, beside Linear: norms and Embed.

Parameters are kept in `param_dtype` and cast to `dtype` where they are used.
Of a norm the backward pass keeps the input alone and computes the rest again:
what is made on the way is as large as the input and takes longer to write and
to read than to compute.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from sft_jax.models.config import ModelConfig
from sft_jax.models.lora import quantize

Dtype = Any


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * (offset + scale), in float32.

  The mean is over the last axis. With an offset of 1 (Gemma) the scale is what
  the factor differs from 1 by.
  """

  eps: float
  offset: float = 0.0
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    init = nn.initializers.constant(1 - self.offset)
    scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
    return jax.checkpoint(self._normalise)(x, scale)

  def _normalise(self, x: Array, scale: Array) -> Array:
    x = x.astype(jnp.float32)
    factor = scale.astype(jnp.float32) + self.offset
    return (x * _inverse_root(x, self.eps) * factor).astype(self.dtype)


class LayerNorm(nn.Module):
  """(x - mean) / sqrt(variance + eps) * scale + bias, in float32."""

  eps: float
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    scale = self.param("scale", ones, (x.shape[-1],), self.param_dtype)
    bias = self.param("bias", zeros, (x.shape[-1],), self.param_dtype)
    return jax.checkpoint(self._normalise)(x, scale, bias)

  def _normalise(self, x: Array, scale: Array, bias: Array) -> Array:
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    y = x * _inverse_root(x, self.eps) * scale.astype(jnp.float32)
    return (y + bias.astype(jnp.float32)).astype(self.dtype)


def _inverse_root(x: Array, eps: float) -> Array:
  """1 / sqrt(mean(x^2) + eps), over the last axis, which stays."""
  mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return jax.lax.rsqrt(mean + eps)


Norm = RMSNorm | LayerNorm


def norm_of(config: ModelConfig, **dtypes: Dtype) -> partial[Norm]:
  """The norm of a model's residual stream; call it with a module's name."""
  if config.norm == "layer":
    return partial(LayerNorm, config.norm_eps, **dtypes)
  return partial(RMSNorm, config.norm_eps, config.norm_offset, **dtypes)


class Embed(nn.Module):
  """A table [V, D] of token vectors.

  An id outside the vocabulary gives NaN, which is seen; the clamping of plain
  indexing would give another token's vector, which is not.
  """

  vocab_size: int
  features: int
  init_std: float = 0.02
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    # jnp.take counts negative ids from the end; send them outside instead.
    tokens = jnp.where(tokens < 0, self.vocab_size, tokens)
    rows = lambda leaf: jnp.take(leaf, tokens, axis=0, mode="fill")
    if self.has_variable("params", "embedding_codes"):
      leaves = self.variables["params"]
      codes, scale = leaves["embedding_codes"], leaves["embedding_scale"]
      # Codes are whole numbers and fill with one; the scale fills with NaN.
      return quantize.decode(rows(codes), rows(scale), self.dtype, axis=-1)
    table = self.param(
      "embedding",
      nn.initializers.normal(self.init_std),
      (self.vocab_size, self.features),
      self.param_dtype,
    )
    return rows(table).astype(self.dtype)


def table(leaves: dict[str, Any], dtype: Dtype) -> Float[Array, "V D"]:
  """The whole table of an `Embed`, decoded to `dtype` if it is quantised."""
  if "embedding_codes" in leaves:
    codes, scale = leaves["embedding_codes"], leaves["embedding_scale"]
    return quantize.decode(codes, scale, dtype, axis=-1)
  return leaves["embedding"]
