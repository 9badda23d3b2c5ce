"""Attention: one function, segment-aware, behind which backends stand.

Who sees whom: a query sees a key of the same segment at the same or an
earlier position. Segment 0 is padding: a segment like another, which no
document sees and whose outputs nobody reads.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

BACKENDS = ("auto", "xla")

# Finite, so that a query that may see nothing (a padding row over a full
# cache) gives a finite output and finite gradients rather than NaN.
_HIDDEN = -1e30


def check_backend(backend: str) -> None:
  """Raises ValueError unless the backend is one of BACKENDS."""
  if backend not in BACKENDS:
    raise ValueError(
      f"attention: backend {backend!r} is not available; expected one of "
      f"{BACKENDS}. Set model.attention to one of them."
    )


def mask_bias(
  q_positions: Int[Array, "B T"],
  kv_positions: Int[Array, "B S"],
  q_segment_ids: Int[Array, "B T"],
  kv_segment_ids: Int[Array, "B S"],
) -> Float32[Array, "B 1 1 T S"]:
  """What is added to the scores: 0 where a query may attend, else -1e30.

  It does not depend on the layer: compute it once and share it.
  """
  same = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
  causal = q_positions[:, :, None] >= kv_positions[:, None, :]
  bias = jnp.where(same & causal, 0.0, _HIDDEN).astype(jnp.float32)
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
  backend: str = "auto",
  bias: Float32[Array, "B 1 1 T S"] | None = None,
  in_order: bool = False,
) -> Float[Array, "B T N H"]:
  """softmax(q k' / sqrt(H)) v over the keys each query may see.

  Query head n reads key/value head n // (N / K). Scores and softmax are
  float32; products take and give the dtype of their inputs.

  Args:
    q: queries; N is a multiple of K.
    k: keys.
    v: values.
    q_positions: index of each query in its document.
    kv_positions: index of each key in its document.
    q_segment_ids: document of each query; 0 is padding.
    kv_segment_ids: document of each key; 0 is padding.
    backend: one of BACKENDS.
    bias: `mask_bias` of the four arrays above, if it is at hand.
    in_order: queries and keys are the same slots (T = S) and documents lie
      in them in order, so no query sees a later slot and the work above the
      diagonal is skipped. False for a cache.

  Raises:
    ValueError: an unknown backend.
  """
  check_backend(backend)
  if bias is None:
    bias = mask_bias(q_positions, kv_positions, q_segment_ids, kv_segment_ids)
  T = q.shape[1]
  # Each block of queries reads the keys up to its own end. On CPU at T = 256
  # one block takes 49 ms, 2 take 37, 4 take 35 and compile longer.
  blocks = min(4, max(1, T // 128)) if in_order else 1
  size = -(-T // blocks)
  with jax.named_scope("attention"):
    parts = []
    for start in range(0, T, size):
      end = start + size
      seen = end if in_order else k.shape[1]
      parts.append(
        _xla(
          q[:, start:end],
          k[:, :seen],
          v[:, :seen],
          bias[..., start:end, :seen],
        )
      )
    return jnp.concatenate(parts, axis=1)


def _xla(q: Array, k: Array, v: Array, bias: Array) -> Array:
  """The reference, in the operand order that XLA multiplies without copies.

  The small q, k, v are transposed so that the large [T, S] arrays never are,
  and the sum divides the small output, not the large weights.
  """
  B, T, N, H = q.shape
  K = k.shape[2]
  q = (q * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  k = k.transpose(0, 2, 1, 3)
  v = v.transpose(0, 2, 1, 3)
  scores = jnp.einsum(
    "bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32
  )
  scores = scores + bias
  top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  weights = jnp.exp(scores - top)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  out = jnp.einsum(
    "bkgts,bksh->bkgth",
    weights.astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  )
  out = (out / total).astype(v.dtype)
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
