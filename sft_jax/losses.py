"""Masked next-token cross-entropy, as sums, without a batch's logits.

Axes: B batch, T position, D model, V vocabulary (legend:
`models/transformer.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from sft_jax.batch import AnyArray


class LossSums(NamedTuple):
  """Sums over the trained tokens of a batch; dividing is the caller's.

  Attributes:
    nats: sum of w * nll, in nats.
    weight: sum of w, the one denominator of every mean.
    correct: sum of w over tokens whose most likely prediction is right.
  """

  nats: Float32[Array, ""]
  weight: Float32[Array, ""]
  correct: Float32[Array, ""]


def linear_cross_entropy(
  hidden: Float[AnyArray, "B T D"],
  head: Float[AnyArray, "V D"],
  targets: Int32[AnyArray, "B T"],
  weights: Float32[AnyArray, "B T"],
  *,
  chunk_tokens: int = 1024,
) -> LossSums:
  """Cross-entropy of `hidden @ head.T` against `targets`, weighted, summed.

      nll = logsumexp(z) - z[target],  z = hidden @ head.T  (float32)

  The head runs over slices of T holding about `chunk_tokens` tokens of the
  batch, so only one slice's logits exist at a time. Each slice's gradient,
  `w * (softmax(z) - onehot)`, is formed in the forward pass while its logits
  are at hand, so that the backward pass only scales (the idea of Liger
  Kernel, arXiv 2410.10989). Slices run along T because B is what a mesh
  divides: a slice never moves tokens between devices.

  Only `nats` carries a gradient.

  Args:
    hidden: the model's last hidden states, any float dtype.
    head: the unembedding.
    targets: ids in [0, V), also where the weight is 0.
    weights: weight of each prediction; 0 where nothing is trained.
    chunk_tokens: tokens per slice; changes memory, not results.

  Returns:
    LossSums over all B * T predictions.
  """
  num_rows, length, _ = hidden.shape
  width = max(1, min(length, chunk_tokens // num_rows))
  nats, correct = _sums(hidden, head, targets, weights, width)
  return LossSums(nats, weights.sum(), correct)


def _slices(x: Array, width: int) -> Array:
  """[B, T, ...] -> [T / width, B, width, ...], T padded with zeros."""
  pad = -x.shape[1] % width
  x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
  x = x.reshape(x.shape[0], -1, width, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def _slice_logits(hidden, head, targets, weights):
  """Logits of one slice and its (nats, correct, log-sum-exp)."""
  z = jnp.einsum(
    "btd,vd->btv", hidden, head, preferred_element_type=jnp.float32
  )
  log_z = jax.nn.logsumexp(z, axis=-1)
  z_target = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
  nats = (weights * (log_z - z_target)).sum()
  # Ties count as right: a maximum is cheaper than an argmax.
  correct = (weights * (z_target >= z.max(axis=-1))).sum()
  return z, log_z, nats, correct


def _sums_only(hidden, head, targets, weights, width):
  def body(sums, xs):
    _, _, nats, correct = _slice_logits(xs[0], head, *xs[1:])
    return (sums[0] + nats, sums[1] + correct), None

  xs = tuple(_slices(x, width) for x in (hidden, targets, weights))
  zero = jnp.zeros((), jnp.float32)
  return jax.lax.scan(body, (zero, zero), xs)[0]


def _sums_with_gradients(hidden, head, targets, weights, width):
  def body(carry, xs):
    nats_sum, correct_sum, d_head = carry
    h, y, w = xs
    z, log_z, nats, correct = _slice_logits(h, head, y, w)
    # d nats / d z = w * (softmax(z) - onehot(target)), in the compute dtype:
    # the two products below are as large as the forward's.
    d_z = w[..., None] * (
      jnp.exp(z - log_z[..., None]) - jax.nn.one_hot(y, z.shape[-1])
    )
    d_z = d_z.astype(h.dtype)
    d_h = jnp.einsum("btv,vd->btd", d_z, head).astype(h.dtype)
    d_head += jnp.einsum(
      "btv,btd->vd", d_z, h, preferred_element_type=jnp.float32
    )
    return (nats_sum + nats, correct_sum + correct, d_head), d_h

  xs = tuple(_slices(x, width) for x in (hidden, targets, weights))
  zero = jnp.zeros((), jnp.float32)
  carry = (zero, zero, jnp.zeros(head.shape, jnp.float32))
  (nats, correct, d_head), d_h = jax.lax.scan(body, carry, xs)
  d_h = jnp.moveaxis(d_h, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
  d_hidden = d_h[:, : hidden.shape[1]]
  return (nats, correct), (d_hidden, d_head.astype(head.dtype))


def _scale_gradients(width, gradients, cotangents):
  d_nats, _ = cotangents
  d_hidden, d_head = gradients
  scale = lambda g: (g.astype(jnp.float32) * d_nats).astype(g.dtype)
  return scale(d_hidden), scale(d_head), None, None


_sums = jax.custom_vjp(_sums_only, nondiff_argnums=(4,))
_sums.defvjp(_sums_with_gradients, _scale_gradients)
