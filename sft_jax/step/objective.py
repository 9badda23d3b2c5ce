"""What is minimised of each trained token: its nats, or a variation of them.

W tokens of a chunk, V vocabulary.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Objective(NamedTuple):
  """What is minimised of a token with logits z and target y.

      f * ((1 - e) nll(y) + e mean_v nll(v)) + c log_z^2 + k KL(p_0 || p),
      nll(v) = log_z - z[v],  log_z = logsumexp(z),  p = softmax(z)

  with p_0 the base model's prediction, and its gradient, f taken as a constant,

      (f + 2 c log_z) p - f (1 - e) onehot(y) - f e / V + k (p - p_0).

  By default all are off, and it is nll(y). The divergence, which alone needs
  the base's logits, is in `loss_chunk`; any other term of a token is one more
  summand in `loss` and in `slopes`.

  Attributes:
    z_loss: c; keeps log_z near 0 (PaLM, arXiv 2204.02311, section 5).
    label_smoothing: e; share of the target spread over the vocabulary
      (Szegedy et al., arXiv 1512.00567, section 7).
    dft: f is p[y] and not 1: dynamic fine-tuning, in which unlikely targets
      pull less (Wu et al., arXiv 2508.05629).
    kl: k; keeps predictions near the base's. In this direction what the base
      held likely must stay likely, which is what forgetting loses; the other
      one, KL(p || p_0), would let the model drop all but one of the base's
      answers at little cost.
  """

  z_loss: float | int = 0.0
  label_smoothing: float | int = 0.0
  dft: bool = False
  kl: float | int = 0.0

  def loss(self, z: Array, log_z: Array, nll: Array) -> Array:
    """All but the divergence, of each token; z is [W, V], the others [W]."""
    e = self.label_smoothing
    smooth = (1 - e) * nll + e * (log_z - z.mean(axis=-1)) if e else nll
    factor = jnp.exp(-nll) if self.dft else 1.0
    return factor * smooth + self.z_loss * jnp.square(log_z)

  def slopes(
    self, log_z: Array, nll: Array, size: int
  ) -> tuple[Array, Array, Array]:
    """(a, b, s) of each token: the gradient is a p - b onehot(y) - s.

    That of all but the divergence.
    """
    factor = jnp.exp(-nll) if self.dft else jnp.ones_like(nll)
    e = self.label_smoothing
    return (
      factor + 2 * self.z_loss * log_z,
      factor * (1 - e),
      factor * (e / size),
    )


NATS = Objective()
