"""Gated delta net: a linear recurrence that overwrites what a key held.

Queries, keys and values go through a short convolution and silu; queries and
keys are then made of length 1. See `recurrence` for what follows, with

    g = -exp(A) softplus(a + dt)    beta = sigmoid(b)    per value head

(Yang et al. 2024, arXiv:2412.06464). What comes out is normed, gated by
silu(z) and projected.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from sft_jax.models.layers.recurrence import GatedNorm, recur
from sft_jax.models.layers.short_conv import Mixer


class DeltaNet(Mixer):
  """The mixer of Qwen3-Next, Qwen3.5 and OLMo Hybrid.

  K = `mixer_groups` heads of q and k and N = `mixer_heads` of v.
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
