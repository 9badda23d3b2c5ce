"""Attention: one function, segment-aware, behind which backends stand.

A query sees a key of the same segment at the same or an earlier position,
within a window of positions if there is one. Segment 0 is padding, whose
outputs nobody reads. docs/attention.md compares the backends:

    xla      the reference, here: all scores at once, memory O(T S); for caches
    blocks   `blockwise`: O(T), on any device
    splash   `kernels`: O(T), TPU
    triton   `kernels`: O(T), GPU; no windows, soft caps or sinks
    tokamax  `kernels`: O(T), GPU, of the [cuda] extra
    auto     see `choose`; a run on a GPU measures first, see `fastest`
"""

import importlib.util
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int, Shaped

from sft_jax.models.attention import blockwise, kernels
from sft_jax.models.remat import ATTENTION

BACKENDS = ("auto", "xla", "blocks", "splash", "triton", "tokamax")


# `auto` gives shorter rows to the reference: on CPU `blocks` is the faster from
# here on, and splash needs whole lanes.
_SHORT = 128

# Finite, so that a query that sees nothing (padding over a full cache) has a
# finite output and finite gradients rather than NaN.
_HIDDEN = -1e30


def check_backend(backend: str, mesh: Mesh | None = None) -> None:
  where, platform = f"attention: backend {backend!r}", _platform(mesh)
  cure = "Set model.attention to 'auto'."
  if backend == "cudnn":
    raise ValueError(
      f"{where} is refused: jax.nn.dot_product_attention has no segment ids on "
      f"cuDNN, so the documents of a pack would see one another. {cure}"
    )
  if backend not in BACKENDS:
    raise ValueError(
      f"{where} is not available; expected one of {BACKENDS}. {cure}"
    )
  gpus = ("cuda", "gpu")
  needs = {"splash": ("tpu",), "triton": gpus, "tokamax": gpus}.get(backend)
  if needs and platform not in needs:
    raise ValueError(
      f"{where} got devices of platform {platform!r}; expected {needs[0]!r}. "
      f"{cure}"
    )
  if backend == "tokamax" and not importlib.util.find_spec("tokamax"):
    raise ValueError(
      f"{where}: the package tokamax is not installed. Install sft_jax[cuda], "
      "or set model.attention to 'auto'."
    )


def choose(
  backend: str, length: int, *, in_order: bool, mesh: Mesh | None = None
) -> str:
  """The backend that does the work for rows of `length` slots. 'auto' goes by
  the platform of the mesh, whose devices need not be attached (ahead-of-time
  compilation), or of JAX's default without one."""
  if not in_order:
    return "xla"
  if backend != "auto":
    return backend
  if length < _SHORT:
    return "xla"
  return "splash" if _platform(mesh) == "tpu" else "blocks"


def _platform(mesh: Mesh | None) -> str:
  if mesh is None:
    return jax.default_backend()
  return mesh.devices.flat[0].platform


def attention_mask(
  backend: str, *ids: Int[Array, "B _"], window: int | None = None
) -> Float32[Array, "B 1 1 T S"] | Int[Array, "B T"]:
  """The mask in the form that a backend (not 'auto') reads; see `mask_bias`.
  Layers of one kind share it: compute it once."""
  q_positions, kv_positions, q_segments, kv_segments = ids
  if backend == "xla":
    return mask_bias(q_positions, kv_positions, q_segments, kv_segments, window)
  # These take a window, or refuse it, by themselves.
  own = backend in ("splash", "triton")
  return first_visible(q_segments, None if own else window)


def first_visible(
  segment_ids: Int[Array, "B T"], window: int | None = None
) -> Int[Array, "B T"]:
  """The first slot that each query sees, of rows with documents in order.

  A window counts slots, the query's own among them. Padding sees itself. In
  slots 0 to 7, with a window of 2 beneath:

      [1 1 1 1 2 2 0 0] -> [0 0 0 0 4 4 6 7]
                           [0 0 1 2 4 4 6 7]
  """
  T = segment_ids.shape[1]
  own = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), segment_ids.shape)
  before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
  begins = (segment_ids != before) | (segment_ids == 0)
  starts = jax.lax.cummax(jnp.where(begins, own, 0), axis=1)
  return starts if window is None else jnp.maximum(starts, own - window + 1)


def mask_bias(
  q_positions: Int[Array, "B T"],
  kv_positions: Int[Array, "B S"],
  q_segment_ids: Int[Array, "B T"],
  kv_segment_ids: Int[Array, "B S"],
  window: int | None = None,
) -> Float32[Array, "B 1 1 T S"]:
  """What is added to the scores: 0 where a query may attend, else -1e30. A
  window counts positions, the query's own among them."""
  visible = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
  ago = q_positions[:, :, None] - kv_positions[:, None, :]
  visible &= ago >= 0
  if window is not None:
    visible &= ago < window
  bias = jnp.where(visible, 0.0, _HIDDEN).astype(jnp.float32)
  return bias[:, None, None]


def attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  *,
  q_positions: Int[Array, "B T"],
  kv_positions: Int[Array, "B S"],
  q_segment_ids: Int[Array, "B T"],
  kv_segment_ids: Int[Array, "B S"],
  window: int | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  sinks: Float[Array, " N"] | None = None,
  backend: str = "auto",
  mask: Float32[Array, "B 1 1 T S"] | Int[Array, "B T"] | None = None,
  in_order: bool = False,
  mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
  """softmax(q k' scale) v over the keys each query may see.

  Query head n reads key/value head n // (N / K). Scores and softmax are
  float32; products take and give the dtype of their inputs.

  Args:
    q_positions, kv_positions: index of each in its document.
    q_segment_ids, kv_segment_ids: document of each; 0 is padding.
    window: positions that a query sees, its own included; None: all.
    scale: of the scores; 1 / sqrt(H) by default.
    softcap: bends scores to softcap * tanh(score / softcap).
    sinks: a score per head in the softmax that brings no value.
    backend: one of BACKENDS; of rows in order, see `choose`.
    mask: `attention_mask` of the arguments above; None: made here.
    in_order: queries and keys are the same slots (T = S), in which documents
      and positions ascend. False for a cache.
    mesh: of the devices that this is for; arrays are those of one device, see
      `parallel.attention`.

  Raises ValueError: see `check_backend`.
  """
  check_backend(backend, mesh)
  backend = choose(backend, q.shape[1], in_order=in_order, mesh=mesh)
  if mask is None:
    ids = (q_positions, kv_positions, q_segment_ids, kv_segment_ids)
    mask = attention_mask(backend, *ids, window=window)
  scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
  options = {"scale": scale, "softcap": softcap}
  with jax.named_scope("attention"):
    if backend == "xla":
      return _xla(q, k, v, mask, sinks, **options, in_order=in_order)
    if backend == "blocks":
      attend = partial(blockwise.attend, block=blockwise.BLOCK)
    elif backend == "tokamax":
      attend = kernels.tokamax_attention
    else:
      attend = partial(getattr(kernels, f"{backend}_attention"), window=window)
    return attend(q, k, v, mask, sinks, **options)


def _xla(q, k, v, bias, sinks, *, scale, softcap, in_order: bool) -> Array:
  """The reference; each of a few blocks of queries reads keys up to its end.
  Forward on CPU at T = 256: one block takes 49 ms, 2 take 37, 4 take 35 and
  compile longer."""
  T = q.shape[1]
  blocks = min(4, max(1, T // 128)) if in_order else 1
  size = -(-T // blocks)
  parts = []
  for start in range(0, T, size):
    end = start + size
    reach = end if in_order else k.shape[1]
    # The small q, k, v are transposed so that the large [T, S] never are.
    keys, values = (x[:, :reach].transpose(0, 2, 1, 3) for x in (k, v))
    rows, part = q[:, start:end] * scale, bias[..., start:end, :reach]
    parts.append(weighed(rows, keys, values, part, softcap, sinks))
  # Its gradient computes the scores again; see `remat`.
  return checkpoint_name(jnp.concatenate(parts, axis=1), ATTENTION[0])


def weighed(
  q: Float[Array, "B T N H"],
  k: Shaped[Array, "B K S H"],
  v: Shaped[Array, "B K S V"],
  bias: Float32[Array, "B 1 1 T S"],
  softcap: float | None,
  sinks: Float[Array, " N"] | None,
  k_scale: Float32[Array, "B K S"] | None = None,
  v_scale: Float32[Array, "B K S"] | None = None,
) -> Float[Array, "B T N V"]:
  """softmax(q k' + bias) v; operands as XLA multiplies them without copies. The
  sum divides the small output, not the large weights. Scales are of keys and
  values in 8 bits."""
  B, T, N, H = q.shape
  K, dtype = k.shape[1], q.dtype
  q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  product = partial(jnp.einsum, preferred_element_type=jnp.float32)
  scores = product("bkgth,bksh->bkgts", q, k.astype(dtype))
  if k_scale is not None:
    scores = scores * k_scale[:, :, None, None]
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  scores = scores + bias
  top = jnp.max(scores, axis=-1, keepdims=True)
  if sinks is not None:
    sinks = sinks.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
    top = jnp.maximum(top, sinks)
  top = jax.lax.stop_gradient(top)
  weights = jnp.exp(scores - top)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  if sinks is not None:
    total = total + jnp.exp(sinks - top)
  if v_scale is not None:
    weights = weights * v_scale[:, :, None, None]
  v = v.astype(dtype)
  out = product("bkgts,bksh->bkgth", weights.astype(dtype), v)
  out = (out / total).astype(dtype)
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)
