"""Attention on GPU: the flash kernels of tokamax, told where each query starts.

Causal and `k_start` together are the mask of packed documents and of windows,
at O(T) memory (tokamax 0.0.17). On Hopper the forward pass skips blocks before
`k_start`; the backward pass masks them. The public function of tokamax has no
`k_start`, so its operators are called themselves.
"""

import importlib

from jaxtyping import Array, Float, Int


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  starts: Int[Array, "B T"],
  sinks: Float[Array, " N"] | None = None,
  *,
  scale: float,
  softcap: float | None = None,
  operator: str = "gpu",
) -> Float[Array, "B T N H"]:
  """softmax(q k' scale) v over the keys in slots [starts[b, t], t].

  Args:
    q: queries, bfloat16; N is a multiple of K.
    k: keys.
    v: values.
    starts: first slot that each query sees, at most its own.
    sinks: refused, the kernels have none.
    scale: of the scores.
    softcap: see `attention.attention`.
    operator: 'gpu', or 'reference' (tokamax's own, without a kernel) for
      tests.

  Raises:
    ValueError: sinks.
  """
  if sinks is not None:
    raise ValueError(
      "attention: backend 'tokamax' got attention sinks (gpt-oss), expected a "
      "model without them: its kernels have none. Set model.attention to "
      "'blocks'."
    )
  # Not of the default install, hence imported by name where it is used.
  base = importlib.import_module("tokamax._src.ops.attention.base")
  if operator == "gpu":
    attention = importlib.import_module(
      "tokamax.ops.gpu"
    ).PallasMosaicFlashAttention()
  else:
    attention = base.DotProductAttention()
  mask = base.Mask(k_start=starts[:, None], is_causal=True)
  return attention(
    q, k, v, mask=mask, logits_scale=scale, logits_soft_cap=softcap
  )
