"""Multi-head latent attention: keys and values of all heads from one vector.

A token's keys and values come from a latent vector c [C] of its own, but for
the rotated part of a key, r [P], which all heads share (DeepSeek-V2,
arXiv:2405.04434, section 2.1):

    c, r = kv_norm(down(x)[:C]), rotate(down(x)[C:])
    k_n = (c U_n, r)        q_n = (q_n', rotate(q_n''))        v_n = c V_n

A cache holds (c, r) alone: C + P numbers per token and layer, not 2 N H.
Decoding never makes the keys: U_n goes to the query's side, V_n to the output's
(2.1.2),

    q_n k_n' = (q_n' U_n', q_n'') (c, r)'      sum_s w_s v_n = (sum_s w_s c) V_n

which is attention of N query heads over one key head of width C + P, whose
values are its own first C numbers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from sft_jax.models import kv_cache, rope
from sft_jax.models.attention import parallel
from sft_jax.models.attention.attention import attention
from sft_jax.models.config import ModelConfig
from sft_jax.models.lora import quantize
from sft_jax.models.lora.lora import LoraConfig
from sft_jax.models.lora.merge import ADAPTER, fold


class LatentAttention(nn.Module):
  """`block.Attention` of models with a `kv_rank`; see above."""

  config: ModelConfig
  linear: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]
  backend: str
  mesh: Mesh | None
  lora: LoraConfig | None

  @nn.compact
  def __call__(self, x, context, kv, layer):
    c = self.config
    (B, T, _), N = x.shape, c.num_heads
    C, P, V = c.kv_rank, c.rope_dim, c.v_dim
    if c.q_rank:
      x_q = self.linear(c.q_rank, c.qkv_bias, name="q_down")(x)
      x_q = self.norm(name="q_down_norm")(x_q)
      q = self.linear(N * c.head_dim, name="q_up")(x_q)
    else:
      q = self.linear(N * c.head_dim, name="q")(x)
    q = q.reshape(B, T, N, c.head_dim)
    down = self.linear(C + P, c.qkv_bias, name="kv_down")(x)
    latent = self.norm(name="kv_norm")(down[..., :C])
    shared = context.shared
    rotate = partial(rope.apply, pairs=c.rope_pairs)
    plain, turned = q[..., :-P], rotate(q[..., -P:], shared.q_rotation)
    key = rotate(down[..., None, C:], shared.k_rotation)
    up = self.linear(N * (c.head_dim - P + V), name="kv_up")
    by = c.layers[0].rope
    scale = c.head_dim**-0.5 * (by.score_scale if by else 1.0)
    if kv is not None:
      path = "/".join((*self.path, "kv_up"))
      kernel = _whole(path, self.variables["params"]["kv_up"], self.lora)
      kernel = kernel.astype(x.dtype).reshape(C, N, -1)
      absorbed = jnp.einsum("btnh,cnh->btnc", plain, kernel[..., :-V])
      q = jnp.concatenate((absorbed, turned), axis=-1)
      held = jnp.concatenate((latent[:, :, None], key), axis=-1)
      at = (layer, "attn")
      kv = kv_cache.write(kv, held, None, *at, context.ids["q_positions"])
      y = kv_cache.attend(q, kv, *at, shared.mask, scale=scale, values=C)
      y = jnp.einsum("btnc,cnv->btnv", y, kernel[..., -V:])
    else:
      both = up(latent).reshape(B, T, N, -1)
      key = jnp.broadcast_to(key, (B, T, N, P))
      k = jnp.concatenate((both[..., :-V], key), axis=-1)
      q, v = jnp.concatenate((plain, turned), axis=-1), both[..., -V:]
      # Backends have one width for both, which more zeros do not change.
      width = max(c.head_dim, V)
      wide = lambda x: jnp.pad(x, (*[(0, 0)] * 3, (0, width - x.shape[-1])))
      y = parallel.attention(
        *(attention, self.mesh, wide(q), wide(k), wide(v)),
        **context.ids,
        backend=self.backend,
        mask=shared.mask,
        in_order=True,
        scale=scale,
      )[..., :V]
    y = y.reshape(B, T, N * V)
    return self.linear(c.d_model, c.o_bias, c.out_std, name="o")(y), kv


def _whole(path: str, leaves: Any, lora: LoraConfig | None) -> jax.Array:
  """The kernel that a module multiplies by, adapters and codes in it."""
  flat = {f"{path}/{name}": x for name, x in leaves.items()}
  codes = f"{path}/kernel_codes"
  packed = codes in flat
  kernel = quantize.unpack(flat, codes)[1] if packed else leaves["kernel"]
  if "lora_a" not in leaves or lora is None:
    return kernel
  adapter = {name: leaves.get(f"lora_{name}") for name in ADAPTER}
  return fold(kernel, adapter, lora.scale(path), jnp.float32)[0]
