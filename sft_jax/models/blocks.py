"""One layer of the decoder, and what all layers share."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from sft_jax.models.attention import attention, mask_bias
from sft_jax.models.config import ModelConfig
from sft_jax.models.layers import (
  Dtype,
  Linear,
  RMSNorm,
  apply_rope,
  rope_cos_sin,
)


class Context(NamedTuple):
  """What all layers share, computed once: angles, and who sees whom."""

  cos: jax.Array
  sin: jax.Array
  q_positions: jax.Array
  kv_positions: jax.Array
  q_segment_ids: jax.Array
  kv_segment_ids: jax.Array
  bias: jax.Array


def make_context(
  config: ModelConfig,
  q_positions: jax.Array,
  kv_positions: jax.Array,
  q_segment_ids: jax.Array,
  kv_segment_ids: jax.Array,
) -> Context:
  """Angles and mask for one call of the model, whatever its layers."""
  who = (q_positions, kv_positions, q_segment_ids, kv_segment_ids)
  cos, sin = rope_cos_sin(q_positions, config.rope, config.head_dim)
  return Context(cos, sin, *who, mask_bias(*who))


class Attention(nn.Module):
  """Projections, norms and rotation around `attention.attention`."""

  config: ModelConfig
  linear: Callable[..., Linear]
  norm: Callable[..., RMSNorm]
  backend: str

  @nn.compact
  def __call__(self, x, context: Context, kv, layer):
    c = self.config
    B, T, _ = x.shape
    N, K, H = c.num_heads, c.num_kv_heads, c.head_dim
    q = self.linear(N * H, c.qkv_bias, name="q")(x).reshape(B, T, N, H)
    k = self.linear(K * H, c.qkv_bias, name="k")(x).reshape(B, T, K, H)
    v = self.linear(K * H, c.qkv_bias, name="v")(x).reshape(B, T, K, H)
    if c.qk_norm:
      q, k = self.norm(name="q_norm")(q), self.norm(name="k_norm")(k)
    q = apply_rope(q, context.cos, context.sin)
    k = apply_rope(k, context.cos, context.sin)
    if kv is not None:
      kv = _write(kv, (k, v), layer, context.q_positions)
      k, v = kv[0][layer], kv[1][layer]
    y = attention(
      q,
      k,
      v,
      q_positions=context.q_positions,
      kv_positions=context.kv_positions,
      q_segment_ids=context.q_segment_ids,
      kv_segment_ids=context.kv_segment_ids,
      backend=self.backend,
      bias=context.bias,
      in_order=kv is None,
    )
    out_std = _output_std(c)
    y = y.reshape(B, T, N * H)
    y = self.linear(c.d_model, c.o_bias, out_std, name="o")(y)
    return y, kv


class Mlp(nn.Module):
  """down(silu(gate(x)) * up(x))."""

  config: ModelConfig
  linear: Callable[..., Linear]

  @nn.compact
  def __call__(self, x):
    c = self.config
    gate = self.linear(c.d_ff, name="gate")(x)
    up = self.linear(c.d_ff, name="up")(x)
    down = self.linear(c.d_model, False, _output_std(c), name="down")
    return down(nn.silu(gate) * up)


class Block(nn.Module):
  """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

  config: ModelConfig
  lora_scale: float | None
  backend: str
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(self, x, context: Context, kv, layer):
    c = self.config
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    norm = partial(RMSNorm, eps=c.norm_eps, **dtypes)

    def linear(features, use_bias=False, init_std=c.init_std, *, name):
      return Linear(
        features, use_bias, init_std, self.lora_scale, **dtypes, name=name
      )

    with jax.named_scope("attn"):
      attn = Attention(c, linear, norm, self.backend, name="attn")
      y, kv = attn(norm(name="attn_norm")(x), context, kv, layer)
      x = x + y
    with jax.named_scope("mlp"):
      x = x + Mlp(c, linear, name="mlp")(norm(name="mlp_norm")(x))
    return x, kv


def _output_std(config: ModelConfig) -> float:
  """Scale of the two projections of each block that add to the residual."""
  return config.init_std / (2 * config.num_layers) ** 0.5


def cache_slots(positions: jax.Array, length: int) -> jax.Array:
  """Where in a cache each token goes: its position, or past the end for -1.

  A write past the end is dropped; a negative index would count from the end.
  """
  return jnp.where(positions < 0, length, positions)


def _write(kv, new, layer, positions: jax.Array):
  """Writes a layer's new (k, v) [B, T, K, H] into the caches [L, B, S, K, H].

  The whole cache is carried and written in place: handing each layer its
  slice and collecting the results would copy it once per token.
  """
  B, S = kv[0].shape[1:3]
  rows, slots = jnp.arange(B)[:, None], cache_slots(positions, S)
  return tuple(
    old.at[layer, rows, slots].set(x, mode="drop")
    for old, x in zip(kv, new, strict=True)
  )
