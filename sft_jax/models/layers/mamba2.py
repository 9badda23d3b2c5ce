"""Mamba-2: a linear recurrence whose step lengths depend on the token.

    h_t = exp(-exp(A) d_t) h_{t-1} + d_t B_t x_t'    y_t = C_t' h_t + D x_t

with d_t = softplus(dt_t + bias) per head (Dao and Gu 2024, arXiv:2405.21060).
x, B and C go through a short convolution and silu; y is gated by silu(z), then
normed and projected. B and C are those of a group of heads.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from sft_jax.models.layers.recurrence import GatedNorm, recur
from sft_jax.models.layers.short_conv import Mixer


class Mamba2(Mixer):
  """The mixer of Granite 4.0, Bamba and Nemotron-H.

  K = `mixer_groups` of N = `mixer_heads`.
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
