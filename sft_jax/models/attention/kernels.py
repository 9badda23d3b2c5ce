"""Kernels of others: splash (TPU), JAX's own for GPUs, and tokamax's.

They compute scores block by block and never keep them. Blocks above the
diagonal are skipped; those of other documents are computed and masked. Rows are
padded to whole blocks of 128 slots.
"""

import importlib
from functools import lru_cache
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from sft_jax.models.remat import ATTENTION

_LANES = 128

Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B T K H"]
Starts = Int[Array, "B T"]
Sinks = Float[Array, " N"] | None


def splash_attention(
  q: Queries,
  k: Keys,
  v: Keys,
  starts: Starts,
  sinks: Sinks = None,
  *,
  scale: float,
  softcap: float | None = None,
  window: int | None = None,
  interpret: bool = False,
) -> Queries:
  """softmax(q k' scale) v over keys of the same document up to a query's own.

  As `attention.attention`, with `starts` the first slot of each query's
  document, which tells documents apart; `interpret`: without a TPU, for tests.
  """
  _, T, N, _ = q.shape
  pad = -T % _LANES

  def lay_out(x: Array) -> Array:
    """[B, T, heads, H] -> [B, heads, T, H], padded."""
    x = x.transpose(0, 2, 1, 3)
    return jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0)))

  # The slots added make a document of their own.
  ids = jnp.pad(starts, ((0, 0), (0, pad)), constant_values=T)
  # The kernel's arrays are made here, whatever is being traced around.
  with jax.ensure_compile_time_eval():
    kernel = _kernel(T + pad, N, window, softcap, interpret)

  def one(q: Array, k: Array, v: Array, ids: Array) -> Array:
    # Asked for no residuals, it returns the output alone.
    return cast(Array, kernel(q, k, v, splash.SegmentIds(ids, ids), sinks))

  out = jax.vmap(one)(lay_out(q * scale), lay_out(k), lay_out(v), ids)
  return out.transpose(0, 2, 1, 3)[:, :T]


@lru_cache
def _kernel(length: int, num_heads: int, window, softcap, interpret: bool):
  shape = (length, length)
  mask = splash.CausalMask(shape)
  if window is not None:
    mask = splash.LocalMask(shape, (window - 1, 0), 0)
  # 512 is what TPU trainers use for queries and keys alike; a block must
  # divide the row.
  block: Any = max(b for b in (128, 256, 384, 512) if length % b == 0)
  sizes = splash.BlockSizes(*[block] * 8)
  return splash.make_splash_mha(
    splash.MultiHeadMask([mask] * num_heads),
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=softcap,
    residual_checkpoint_name="attention_out",
    interpret=interpret,
  )


def triton_attention(
  q: Queries,
  k: Keys,
  v: Keys,
  starts: Starts,
  sinks: Sinks = None,
  *,
  scale: float,
  softcap: float | None = None,
  window: int | None = None,
  interpret: bool = False,
) -> Queries:
  """The same, by the kernel for GPUs that JAX brings; heads of K repeated.
  Raises ValueError: what it has not: sinks, a softcap, a window."""
  _refuse("triton", sinks=sinks, softcap=softcap, window=window)
  T = q.shape[1]
  pad = [(0, 0), (0, -T % _LANES)]
  ids = jnp.pad(starts, pad, constant_values=T)
  heads = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, heads, axis=2) for x in (k, v))
  q, k, v = (jnp.pad(x, [*pad, (0, 0), (0, 0)]) for x in (q, k, v))
  # By name: without Triton's part of JAX it is not to be imported.
  mha = importlib.import_module("jax.experimental.pallas.ops.gpu.attention").mha
  out = mha(q, k, v, ids, sm_scale=scale, causal=True, interpret=interpret)
  return checkpoint_name(out[:, :T], ATTENTION[0])


def _refuse(backend: str, **given: object) -> None:
  for name, value in given.items():
    if value is not None:
      raise ValueError(
        f"attention: backend {backend!r} got a model with {name}, expected one "
        "without: its kernel has none. Set model.attention to 'blocks'."
      )


def tokamax_attention(
  q: Queries,
  k: Keys,
  v: Keys,
  starts: Starts,
  sinks: Sinks = None,
  *,
  scale: float,
  softcap: float | None = None,
  operator: str = "gpu",
) -> Queries:
  """softmax(q k' scale) v over the keys in slots [starts[b, t], t].

  As `splash_attention`, with q in bfloat16 and `starts` at most a query's own
  slot. `operator` 'reference' is tokamax's own without a kernel, for tests.

  Raises ValueError: sinks.
  """
  _refuse("tokamax", sinks=sinks)
  # Not of the default install, hence imported by name where it is used.
  base = importlib.import_module("tokamax._src.ops.attention.base")
  if operator == "gpu":
    gpu = importlib.import_module("tokamax.ops.gpu")
    attention = gpu.PallasMosaicFlashAttention()
  else:
    attention = base.DotProductAttention()
  mask = base.Mask(k_start=starts[:, None], is_causal=True)
  return attention(
    q, k, v, mask=mask, logits_scale=scale, logits_soft_cap=softcap
  )
