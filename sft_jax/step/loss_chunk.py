"""What the logits of one chunk of tokens say: sums, and their gradient.

W tokens of the chunk, V vocabulary; w a token's weight, y its target.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sft_jax.step.objective import Objective


class Logits(NamedTuple):
  """A chunk's logits [W, V] and what its tokens make of them [W]."""

  z: Array
  softmax: Array
  log_z: Array
  nll: Array
  correct: Array


class Known(NamedTuple):
  """The base's probabilities [W, V], and what is left of them [4, W].

  The rows of the table are those of `losses.BaseSums`.
  """

  softmax: Array
  table: Array

  @property
  def kl(self) -> Array:
    return self.table[0]


def logits(h: Array, head: Array, y: Array, softcap) -> Logits:
  """Of hidden states [W, D] under a head [V, D], in float32."""
  z = jnp.einsum("wd,vd->wv", h, head, preferred_element_type=jnp.float32)
  if softcap is not None:
    z = softcap * jnp.tanh(z / softcap)
  top = z.max(axis=-1)
  # One exponential of each logit, for the sum and for the gradient.
  softmax = jnp.exp(z - top[:, None])
  total = softmax.sum(axis=-1)
  softmax = softmax / total[:, None]
  log_z = top + jnp.log(total)
  z_target = jnp.take_along_axis(z, y[:, None], axis=-1)[:, 0]
  # Ties count as right: a maximum is cheaper than an argmax.
  correct = (z_target >= top).astype(jnp.float32)
  return Logits(z, softmax, log_z, log_z - z_target, correct)


def table(found: Logits, w: Array, groups: Array, num_groups: int) -> Array:
  """[4, 1 + groups]: nats, weight, correct, entropy; of all, of each group."""
  entropy = found.log_z - (found.softmax * found.z).sum(axis=-1)
  values = w * jnp.stack([found.nll, jnp.ones_like(w), found.correct, entropy])
  member = jax.nn.one_hot(groups, num_groups).sum(axis=1)
  member = jnp.concatenate([jnp.ones((len(w), 1)), member], axis=1)
  return jnp.matmul(values, member, precision="highest")


def compare(base: Logits, tuned: Logits) -> Known:
  """KL(base || tuned) of each token, and whether its best token is the same.

  sum_v p(v) (log p(v) - log q(v)),  p the base's and q the tuned softmax
  """
  gap = (base.z - base.log_z[:, None]) - (tuned.z - tuned.log_z[:, None])
  kl = (base.softmax * gap).sum(axis=-1)
  best = base.z.argmax(axis=-1)[:, None]
  kept = jnp.take_along_axis(tuned.z, best, axis=-1)[:, 0] >= tuned.z.max(-1)
  both = base.correct * tuned.correct
  return Known(
    base.softmax,
    jnp.stack([kl, kept.astype(jnp.float32), base.correct, both]),
  )


def gradient(
  found: Logits,
  y: Array,
  w: Array,
  objective: Objective,
  softcap,
  known: Known | None,
) -> Array:
  """d (sum of w * objective) / d z, [W, V] float32, z before the soft cap."""
  size = found.z.shape[-1]
  a, b, s = (
    (w * slope)[:, None]
    for slope in objective.slopes(found.log_z, found.nll, size)
  )
  d_z = a * found.softmax - b * jax.nn.one_hot(y, size)
  if objective.label_smoothing:
    d_z -= s
  if objective.kl and known is not None:
    d_z += objective.kl * w[:, None] * (found.softmax - known.softmax)
  if softcap is not None:
    d_z *= 1 - jnp.square(found.z / softcap)
  return d_z
