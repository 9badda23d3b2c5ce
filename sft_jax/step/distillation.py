"""What a student may learn of a teacher's predictions, and its slope.

Of logits z of the student and y of the teacher, with p = softmax(z / T) and q =
softmax(y / T) (values are multiplied by the square of the temperature T, so
that slopes keep their size: Hinton et al., arXiv 1503.02531),

    forward  KL(q || p)                              slope of z: T (p - q)
    reverse  KL(p || q)                     T p (log p - log q - KL(p || q))
    jsd      b KL(q || m) + (1 - b) KL(p || m),  m = b q + (1 - b) p
                              T (1 - b) p (log p - log m - KL(p || m))

The last is the generalized divergence of GKD (arXiv 2306.13649). Forward makes
likely what the teacher holds likely; reverse makes unlikely what it does not.

A teacher that was asked before (`sft-jax teach`) left its K most likely tokens:
`TopK` compares these, and what is left over as one more event, which is at most
the whole divergence, and equal at K = V.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

KINDS = ("forward", "reverse", "jsd")


class Divergence(NamedTuple):
  """Which divergence from a teacher."""

  kind: str = "forward"  # One of KINDS.
  mix: float = 0.5  # B above, of jsd.
  temperature: float = 1.0  # T above.

  def __call__(
    self, teacher: Float[Array, "W V"], student: Float[Array, "W V"]
  ) -> tuple[Float32[Array, " W"], Float32[Array, "W V"]]:
    """Each token's value, in nats, and its slope along the student's logits."""
    t, b = self.temperature, self.mix
    log_q = jax.nn.log_softmax(teacher.astype(jnp.float32) / t)
    log_p = jax.nn.log_softmax(student.astype(jnp.float32) / t)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if self.kind == "forward":
      value = (q * (log_q - log_p)).sum(axis=-1)
      return t * t * value, t * (p - q)
    log_m, share = log_q, 1.0
    if self.kind == "jsd":
      log_m = jnp.logaddexp(log_q + jnp.log(b), log_p + jnp.log1p(-b))
      share = 1 - b
    gap = log_p - log_m
    own = (p * gap).sum(axis=-1, keepdims=True)
    value = share * own[:, 0]
    if self.kind == "jsd":
      value += b * (q * (log_q - log_m)).sum(axis=-1)
    return t * t * value, t * share * p * (gap - own)


class TopK:
  """A loss (`step.loss.Loss`): cross-entropy and a kept teacher's top K. The
  step gives `teacher_ids` and `teacher_logps` [W, K] of the tokens."""

  def __init__(self, weight: float, ce: float):
    self.weight, self.ce = weight, ce

  def __call__(
    self,
    hidden: Float[Array, "W D"],
    head: Float[Array, "V D"],
    targets: Int32[Array, " W"],
    weights: Float32[Array, " W"],
    segment_ids: Int32[Array, " W"],
    *,
    teacher_ids: Int32[Array, "W K"],
    teacher_logps: Float32[Array, "W K"],
    softcap: float | int | None,
  ) -> tuple[Array, dict[str, Array]]:
    """ce * nll + weight * KL(kept teacher || student), summed by weights."""
    z = jnp.einsum(
      "wd,vd->wv", hidden, head, preferred_element_type=jnp.float32
    )
    if softcap is not None:
      z = softcap * jnp.tanh(z / softcap)
    log_p = jax.nn.log_softmax(z)
    nll = -jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
    kept = jnp.take_along_axis(log_p, teacher_ids, axis=1)
    q = jnp.exp(teacher_logps)
    kl = (q * (teacher_logps - kept)).sum(axis=1)
    # What neither names is one event; rounding may leave it nothing.
    rest_q = jnp.clip(1 - q.sum(axis=1), 0, 1)
    rest_p = jnp.clip(1 - jnp.exp(kept).sum(axis=1), 1e-7, 1)
    kl += jax.scipy.special.rel_entr(rest_q, rest_p)
    loss = self.ce * nll + self.weight * kl
    return (weights * loss).sum(), {"teacher_kl": (weights * kl).sum()}
