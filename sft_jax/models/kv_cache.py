"""The cache: its layout, writes of keys and values, attention over them.

Layers that are no attention have a state per row in it, of any length: the last
inputs of their convolution, and what their recurrence has summed up.

A layer's slots are together for each head, [L, B, K, S, H], as both products of
attention read it: with slots before heads XLA copies every layer at every step,
three times as long as the products.
"""

import math
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from sft_jax.models.attention.attention import weighed
from sft_jax.models.config import ATTENTION, ModelConfig

Cache = dict[str, jax.Array]
# A cache without its positions, which all layers share.
Slots = dict[str, jax.Array]
_KEYS_AND_VALUES = {"k", "v", "k_scale", "v_scale"}


def init(
  config: ModelConfig, batch: int, length: int, dtype, *, int8: bool = False
) -> Cache:
  """An empty cache of `length` slots per row.

  Args:
    dtype: of keys and values.
    int8: keep them in 8 bits, with a float32 scale per head and slot: the
      largest magnitude of the H numbers, over 127. Of heads of 64 the cache
      takes 0.27 of float32's room, 0.53 of bfloat16's.
  """
  c = config
  count = Counter(kind.mixer for kind in c.layers if not kind.shares)
  convs = count["conv"] + count["delta"] + count["mamba"]
  cache = {"positions": jnp.full((batch, length), -1, jnp.int32)}
  if convs:
    state = (convs, batch, c.conv_width - 1, c.conv_channels)
    cache["conv"] = jnp.zeros(state, dtype)
  if c.mixer_heads:
    K, G = c.mixer_groups, c.mixer_heads // c.mixer_groups
    state = (convs, batch, K, G, c.mixer_state, c.mixer_width)
    cache["state"] = jnp.zeros(state, jnp.float32)
  for mixer in ATTENTION if count["global_attn"] else ATTENTION[:1]:
    K, H = c.kv_shape(mixer)
    shape = (count[mixer], batch, K, length, H)
    if c.kv_rank:
      shape = (count[mixer], batch, 1, length, c.kv_rank + c.rope_dim)
    for name in ("k",) if c.kv_rank else ("k", "v"):
      name = _own(mixer, name)
      cache[name] = jnp.zeros(shape, jnp.int8 if int8 else dtype)
      if int8:
        cache[f"{name}_scale"] = jnp.zeros(shape[:4], jnp.float32)
  return cache


def _own(mixer: str, name: str) -> str:
  """What a mixer has: ('global_attn', 'k') -> 'global_k'."""
  return mixer.removesuffix("attn") + name


def slots_of(
  positions: Int[Array, "B T"], length: int
) -> tuple[Int32[Array, "B 1"], Int[Array, "B T"]]:
  """Where each token goes: its row, and its position, or past the end for -1. A
  write past the end is dropped; a negative index would count from the end."""
  rows = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]
  return rows, jnp.where(positions < 0, length, positions)


def write(
  slots: Slots,
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"] | None,
  layer: int | Int32[Array, ""],
  mixer: str,
  positions: Int[Array, "B T"],
) -> Slots:
  """The slots with a layer's new keys and values (of latent attention keys
  alone) in them. The whole cache is carried and written in place: handing each
  layer its slice would copy it once per token."""
  given = {"k": k} if v is None else {"k": k, "v": v}
  new = dict(given)
  if _own(mixer, "k_scale") in slots:
    for name, x in given.items():
      new[name], new[f"{name}_scale"] = _to_int8(x)
  own = {_own(mixer, name): x for name, x in new.items()}
  rows, at = slots_of(positions, slots[_own(mixer, "k")].shape[3])
  return slots | {
    name: slots[name].at[layer, rows, :, at].set(x, mode="drop")
    for name, x in own.items()
  }


def attend(
  q: Float[Array, "B T N H"],
  slots: Slots,
  layer: int | Int32[Array, ""],
  mixer: str,
  bias: Float32[Array, "B 1 1 T S"],
  *,
  scale: float | None = None,
  softcap: float | None = None,
  sinks: Float[Array, " N"] | None = None,
  rotate: Callable[[Array], Array] | None = None,
  values: int = 0,
) -> Float[Array, "B T N V"]:
  """`attention.attention` over the slots of a layer, to the rounding.

  `layer` is one of those with this mixer, `bias` that of `mask_bias`. `rotate`
  is for keys [B, S, K, H] that are kept unrotated. Where there are no `values`,
  so many first numbers of a key are one.
  """
  own = {
    name: slots[_own(mixer, name)][layer]
    for name in _KEYS_AND_VALUES
    if _own(mixer, name) in slots
  }
  k = own["k"]
  if rotate is not None:
    # A rotation is linear, so a scale may come after it.
    k = k.astype(q.dtype).transpose(0, 2, 1, 3)
    k = rotate(k).transpose(0, 2, 1, 3)
  scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
  v = k[..., :values] if values else own["v"]
  scales = own.get("k_scale"), own.get("k_scale" if values else "v_scale")
  with jax.named_scope("attention"):
    return weighed(q * scale, k, v, bias, softcap, sinks, *scales)


def _to_int8(x: Float[Array, "B T K H"]) -> tuple[Array, Array]:
  """Codes in -127..127 and their scales [B, T, K]."""
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1) / 127
  codes = jnp.round(x / jnp.maximum(scale, 1e-30)[..., None])
  return codes.astype(jnp.int8), scale
