"""What mixes tokens in the place of attention.

K = `mixer_groups` heads of q and k, N = `mixer_heads` of v, of widths H and P.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from sft_jax.models.config import ModelConfig
from sft_jax.models.layers.linear import Dtype
from sft_jax.models.layers.recurrence import GatedNorm, recur
from sft_jax.models.layers.short_conv import ShortConv


class Mixer(nn.Module):
  config: ModelConfig
  linear: Callable[..., Any]  # Makes a projection: (features, use_bias, name=).
  mesh: Any  # Rows may be divided over its devices.
  dtype: Dtype
  param_dtype: Dtype

  def convolve(self, x: Float[Array, "B T C"], context, kv, slot):
    c = self.config
    pd = self.param_dtype
    conv = ShortConv(c.conv_width, c.conv_bias, self.mesh, pd, name="conv")
    return conv(x, context, kv, slot)


class GatedConv(Mixer):
  """out(c * conv(b * x)) with b, c, x = in(input): the mixer of LFM2."""

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], context, kv, slot):
    c = self.config
    wide = self.linear(3 * c.d_model, c.mixer_bias, name="in")(x)
    before, after, x = jnp.split(wide, 3, axis=-1)
    y, kv = self.convolve(before * x, context, kv, slot)
    out = self.linear(c.d_model, c.mixer_bias, c.out_std, name="out")
    return out(after * y), kv


class DeltaNet(Mixer):
  """Gated delta net (Yang et al. 2024, arXiv:2412.06464): Qwen3-Next, Qwen3.5,
  OLMo Hybrid.

  Queries, keys and values go through a short convolution and silu; queries and
  keys are made of length 1. What `recurrence` gives is normed, gated by silu(z)
  and projected, with, per head of v,

      g = -exp(A) softplus(a + dt)    beta = sigmoid(b)
  """

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], context, kv, slot):
    c = self.config
    B, T, _ = x.shape
    K, N, H, P = c.mixer_groups, c.mixer_heads, c.mixer_state, c.mixer_width
    heads = (B, T, K, N // K)
    if c.mixer_by_head:
      wide = self.linear(2 * (K * H + N * P), name="qkvz")(x)
      wide = wide.reshape(B, T, K, -1)
      *qkv, z = jnp.split(wide, np.cumsum([H, H, N // K * P]), axis=-1)
      qkv = jnp.concatenate([y.reshape(B, T, -1) for y in qkv], axis=-1)
      ba = self.linear(2 * N, name="ba")(x).reshape(B, T, K, -1)
      b, a = jnp.split(ba, 2, axis=-1)
    else:
      widths = {"q": K * H, "k": K * H, "v": N * P}
      if not c.mixer_apart:
        widths = {"qkv": sum(widths.values())}
      qkv = [self.linear(width, name=name)(x) for name, width in widths.items()]
      qkv = jnp.concatenate(qkv, axis=-1)
      z = self.linear(N * P, name="z")(x)
      b = self.linear(N, name="b")(x).reshape(heads)
      a = self.linear(N, name="a")(x).reshape(heads)
    qkv, kv = self.convolve(qkv, context, kv, slot)
    # exp(A) from 1 to 16, as most of the published models start.
    steps = lambda *_: jnp.log(jnp.linspace(1, 16, N)).astype(self.param_dtype)
    log_rate = self.param("A_log", steps)
    dt = self.param("dt_bias", nn.initializers.ones, (N,), self.param_dtype)

    def inputs(qkv, a, b, log_rate, dt):
      """In float32, as near ones in a decay tell long memories apart."""
      qkv = nn.silu(qkv.astype(jnp.float32)).astype(self.dtype)
      q, k, v = jnp.split(qkv, np.cumsum([K * H, K * H]), axis=-1)
      q, k = (_unit(y.reshape(B, T, K, H)) for y in (q, k))
      a, b, log_rate, dt = (y.astype(jnp.float32) for y in (a, b, log_rate, dt))
      log_rate, dt = (y.reshape(heads[2:]) for y in (log_rate, dt))
      g = -jnp.exp(log_rate) * nn.softplus(a + dt)
      beta = c.mixer_beta * nn.sigmoid(b)
      v = v.reshape(*heads, P).astype(jnp.float32) * beta[..., None]
      return q * H**-0.5, k, v, g, beta

    q, k, v, g, beta = jax.checkpoint(inputs)(qkv, a, b, log_rate, dt)
    y, kv = recur(q, k, v, g, beta, context, kv, slot, self.mesh)
    own = (self.dtype, self.param_dtype)
    eps = c.mixer_norm_eps or c.norm_eps
    norm = GatedNorm(eps, (P,), False, *own, name="norm")
    y = norm(y, z.reshape(y.shape)).reshape(B, T, N * P)
    return self.linear(c.d_model, init_std=c.out_std, name="out")(y), kv


def _unit(x: Float[Array, "... H"]) -> Float[Array, "... H"]:
  """Vectors of length 1, in float32."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


class Mamba2(Mixer):
  """Mamba-2 (Dao and Gu 2024, arXiv:2405.21060): Granite 4, Bamba, Nemotron-H.

      h_t = exp(-exp(A) d_t) h_{t-1} + d_t B_t x_t'    y_t = C_t' h_t + D x_t

  with d_t = softplus(dt_t + bias) per head. x, B and C, those of a group of
  heads, go through a short convolution and silu; y is gated by silu(z), then
  normed and projected.
  """

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], context, kv, slot):
    c = self.config
    B, T, _ = x.shape
    K, N, H, P = c.mixer_groups, c.mixer_heads, c.mixer_state, c.mixer_width
    heads = (B, T, K, N // K)
    widths = (N * P, c.conv_channels, N)
    wide = self.linear(sum(widths), c.mixer_bias, name="in")(x)
    z, xbc, dt = jnp.split(wide, np.cumsum(widths[:2]), axis=-1)
    xbc, kv = self.convolve(xbc, context, kv, slot)
    steps = lambda *_: jnp.log(jnp.arange(1.0, N + 1)).astype(self.param_dtype)
    log_rate, ones = self.param("A_log", steps), nn.initializers.ones
    bias = self.param("dt_bias", ones, (N,), self.param_dtype)
    skip = self.param("D", ones, (N,), self.param_dtype)

    def inputs(xbc, dt, log_rate, bias):
      xbc = nn.silu(xbc.astype(jnp.float32)).astype(self.dtype)
      x, k, q = jnp.split(xbc, np.cumsum([N * P, K * H]), axis=-1)
      q, k = (y.reshape(B, T, K, H) for y in (q, k))
      dt = nn.softplus(dt.astype(jnp.float32) + bias.astype(jnp.float32))
      dt = jnp.maximum(dt, c.mixer_least_step)
      g = -jnp.exp(log_rate.astype(jnp.float32)) * dt
      dt, g = dt.reshape(heads), g.reshape(heads)
      return q, k, x.reshape(*heads, P).astype(jnp.float32), g, dt

    q, k, x, g, dt = jax.checkpoint(inputs)(xbc, dt, log_rate, bias)
    y, kv = recur(
      q, k, x * dt[..., None], g, None, context, kv, slot, self.mesh
    )
    y = y + skip.astype(jnp.float32).reshape(*heads[2:], 1) * x
    own = (self.dtype, self.param_dtype)
    groups = (K, N // K * P)
    norm = GatedNorm(c.norm_eps, groups, True, *own, name="norm")
    shape = (B, T, *groups)
    y = norm(y.reshape(shape), z.reshape(shape)).reshape(B, T, N * P)
    out = self.linear(c.d_model, c.mixer_bias, c.out_std, name="out")
    return out(y), kv
