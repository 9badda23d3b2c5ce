"""The parts every block is made of: Linear, RMSNorm, RoPE, Embed.

Parameters are kept in `param_dtype` and cast to `dtype` where they are used.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float32, Int

from sft_jax.models.config import Rope

Dtype = Any


class Linear(nn.Module):
  """y = x W + b, and the one place where LoRA lives.

  When `lora_a` [in, R] and `lora_b` [R, out] lie beside the kernel, adds
  lora_scale * (x A) B (Hu et al. 2021). The product stays in activation
  space: W + scale * A B is never formed, so neither is a gradient of its size.
  """

  features: int
  use_bias: bool = False
  init_std: float = 0.02
  lora_scale: float | None = None
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    kernel = self.param(
      "kernel",
      nn.initializers.normal(self.init_std),
      (x.shape[-1], self.features),
      self.param_dtype,
    )
    x = x.astype(self.dtype)
    y = x @ kernel.astype(self.dtype)
    # Flax ignores parameters nobody asks for; an adapter must not be one.
    if self.has_variable("params", "lora_a"):
      if self.lora_scale is None:
        raise ValueError(
          f"{'/'.join(self.path)}: the parameters hold a LoRA adapter but the "
          "model was built without one; expected lora=LoraConfig(...). Pass "
          "it to build, or fold the adapter in with lora.merge."
        )
      a = self.get_variable("params", "lora_a").astype(self.dtype)
      b = self.get_variable("params", "lora_b").astype(self.dtype)
      y = y + self.lora_scale * ((x @ a) @ b)
    if self.use_bias:
      bias = self.param(
        "bias", nn.initializers.zeros, (self.features,), self.param_dtype
      )
      y = y + bias.astype(self.dtype)
    return y


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32."""

  eps: float
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    scale = self.param(
      "scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype
    )
    x = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(
      jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps
    )
    return (x * inverse * scale.astype(jnp.float32)).astype(self.dtype)


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
    table = self.param(
      "embedding",
      nn.initializers.normal(self.init_std),
      (self.vocab_size, self.features),
      self.param_dtype,
    )
    # jnp.take counts negative ids from the end; send them outside instead.
    tokens = jnp.where(tokens < 0, self.vocab_size, tokens)
    return jnp.take(table, tokens, axis=0, mode="fill").astype(self.dtype)


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
  """Radians per position of each pair of dimensions, float32 [H / 2].

  'linear' divides every frequency by `factor`. 'llama3' divides those whose
  wave is longer than the original context / low_freq_factor, keeps those
  shorter than original / high_freq_factor, and blends between (Llama 3.1).
  """
  exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
  frequency = rope.theta**-exponent
  if rope.type == "linear":
    frequency = frequency / rope.factor
  elif rope.type == "llama3":
    turns = rope.original_max_positions * frequency / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    frequency = frequency * (keep + (1 - keep) / rope.factor)
  return frequency.astype(np.float32)


def rope_cos_sin(
  positions: Int[Array, "B T"], rope: Rope, head_dim: int
) -> tuple[Float32[Array, "B T 1 C"], Float32[Array, "B T 1 C"]]:
  """Cosine and sine of every angle, C = H / 2; float32 whatever the model."""
  angle = positions[..., None] * rope_frequencies(rope, head_dim)
  angle = angle.astype(jnp.float32)[:, :, None]
  return jnp.cos(angle), jnp.sin(angle)


def apply_rope(
  x: Float[Array, "B T X H"],
  cos: Float32[Array, "B T 1 C"],
  sin: Float32[Array, "B T 1 C"],
) -> Float[Array, "B T X H"]:
  """Rotates dimension i with i + H / 2 (the half-split layout of HF)."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    (first * cos - second * sin, second * cos + first * sin), axis=-1
  )
  return rotated.astype(x.dtype)
