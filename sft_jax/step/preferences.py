"""Preferences: a better and a worse answer to one prompt, as an objective.

A pair is in one row of the batch as two documents, segments 2k - 1 (chosen) and
2k (rejected), so packing, accumulation and sharding never part it. With p the
likelihood of a document's n trained tokens, r the difference of log p of policy
and reference, s = log sigmoid, and + and - the sides, the losses of a pair are

    dpo     -(1 - e) s(z) - e s(-z),  z = b (r+ - r-)     arXiv 2305.18290;
                                                  e > 0 is conservative DPO
    robust  (-(1 - e) s(z) + e s(-z)) / (1 - 2 e)         arXiv 2403.00409
    ipo     (r+ / n+ - r- / n- - 1 / (2 b))^2             arXiv 2310.12036
    simpo   -(1 - e) s(z) - e s(-z),
            z = b (log p+ / n+ - log p- / n-) - margin    arXiv 2405.14734
    orpo    -log p+ / n+ - b s(o+ - o-),  o the log-odds of
            the mean token, log (q / (1 - q)), q = exp(log p / n)
                                                          arXiv 2403.07691
    kto     1 - sigmoid(b (r+ - z0)),  1 - sigmoid(b (z0 - r-)),
            each side by itself                           arXiv 2402.01306

plus `sft` * -log p+ / n+. KTO's z0 is the mean log-ratio of the documents of
the micro-batch, at least 0 and a constant: the paper draws it from prompts and
answers that do not belong together, which costs a third forward pass.

The gradient needs one number per document, d loss / d log p: the second pass
over the head weighs each token's nll by it, so no more than a chunk's logits
exist.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from sft_jax.common.batch import Batch
from sft_jax.step import loss_groups
from sft_jax.step.loss import LossSums, linear_cross_entropy

LOSSES = ("dpo", "ipo", "robust", "simpo", "orpo", "kto")
WITHOUT_REFERENCE = ("simpo", "orpo")


class Preference(NamedTuple):
  """Which loss of a pair, and its numbers."""

  loss: str  # One of LOSSES.
  beta: float = 0.1  # B above; 1 / (2 b) is what IPO wants the margin to be.
  label_smoothing: float = 0.0  # e, share of pairs believed to be swapped.
  margin: float = 0.0  # Of SimPO, in rewards.
  sft: float = 0.0  # Weight of the chosen side's mean nll beside the loss.

  def losses(
    self,
    logps: Float32[Array, "N 2"],
    reference: Float32[Array, "N 2"],
    tokens: Float32[Array, "N 2"],
  ) -> Float32[Array, " N"]:
    """Of each pair, (chosen, rejected); a side of 0 tokens is not there."""
    b, e = self.beta, self.label_smoothing
    there = tokens > 0
    mean = logps / jnp.maximum(tokens, 1)
    ratio = logps - reference
    gap = lambda x: x[:, 0] - x[:, 1]
    log_sigmoid = jax.nn.log_sigmoid
    if self.loss == "kto":
      documents = jnp.maximum(there.sum(), 1)
      z0 = jnp.maximum(jnp.where(there, ratio, 0).sum() / documents, 0)
      above = b * (ratio - jax.lax.stop_gradient(z0))
      each = 1 - jax.nn.sigmoid(above * jnp.array([1.0, -1.0]))
      sides = jnp.maximum(there.sum(axis=1), 1)
      losses = jnp.where(there, each, 0).sum(axis=1) / sides
    elif self.loss == "ipo":
      margin = gap(ratio / jnp.maximum(tokens, 1))
      losses = jnp.square(margin - 1 / (2 * b))
    elif self.loss == "orpo":
      # A mean token of probability 1 has no finite odds.
      q = jnp.minimum(mean, -1e-6)
      losses = -mean[:, 0] - b * log_sigmoid(gap(q - _log1mexp(q)))
    else:
      z = b * gap(ratio)
      if self.loss == "simpo":
        z = b * gap(mean) - self.margin
      right, swapped = -(1 - e) * log_sigmoid(z), -e * log_sigmoid(-z)
      losses = right + swapped
      if self.loss == "robust":
        losses = (right - swapped) / (1 - 2 * e)
    return losses - self.sft * mean[:, 0]

  def rewards(self, logps, reference, tokens) -> Float32[Array, "N 2"]:
    """b times the log-ratio; without a reference, times the mean log p."""
    if self.loss in WITHOUT_REFERENCE:
      return self.beta * logps / jnp.maximum(tokens, 1)
    return self.beta * jnp.where(tokens > 0, logps - reference, 0)


def _log1mexp(x: Array) -> Array:
  """log(1 - exp(x)) for x < 0, without cancellation near 0."""
  near = x > -0.693
  above = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
  return jnp.where(near, above, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def chosen_only(batch: Batch) -> Batch:
  """The same batch with nothing trained of rejected sides."""
  weights = jnp.asarray(batch.loss_weights)
  chosen = jnp.asarray(batch.segment_ids) % 2 == 1
  return batch._replace(loss_weights=jnp.where(chosen, weights, 0))


def of_the_other_side(
  hidden: Float[Array, "B T D"], batch: Batch, alone: Bool[Array, "B T"]
) -> Float[Array, "B T D"]:
  """At the trained tokens of chosen sides, what stands at the others'.

  Where both sides of every pair train the same tokens, as an answer without and
  with itself in the prompt: the n-th of a row is the n-th. Tokens that are
  `alone`, of a document without another side, keep their own.
  """
  trained = (jnp.asarray(batch.loss_weights) != 0) & ~alone
  chosen = jnp.asarray(batch.segment_ids) % 2 > 0
  others = jnp.argsort(~(trained & ~chosen), axis=1, stable=True)
  number = jnp.maximum(jnp.cumsum(trained & chosen, axis=1) - 1, 0)
  at = jnp.take_along_axis(others, number, axis=1)
  at = jnp.where(alone, jnp.arange(at.shape[1]), at)
  return jnp.take_along_axis(hidden, at[..., None], axis=1)


def document_logps(
  predicted: tuple[Any, Any], batch: Batch, most: int, **choices: Any
) -> Float32[Array, "N 2"]:
  """log p of the trained tokens of every document, weights aside; constants.

  Args:
    predicted: hidden states [B, T, D] and the head.
    batch: of at most `most` pairs a row; N = B * most.
    choices: further arguments of `linear_cross_entropy`.
  """
  sums = linear_cross_entropy(
    *jax.lax.stop_gradient(predicted),
    batch.targets,
    (jnp.asarray(batch.loss_weights) != 0).astype(jnp.float32),
    loss_groups.documents(batch, 2 * most),
    num_groups=2 * most * len(batch.tokens),
    **choices,
  )
  return -sums.groups.nats.reshape(-1, 2)


def of_documents(
  values: Float32[Array, "B T"], batch: Batch, most: int
) -> Float32[Array, "N 2"]:
  """Sums of values over the documents of a batch."""
  ids = loss_groups.documents(batch, 2 * most)[..., 0]
  number = 2 * most * len(batch.tokens)
  there = ids >= 0
  return jax.ops.segment_sum(
    jnp.where(there, values, 0).ravel(),
    jnp.where(there, ids, number).ravel(),
    number + 1,
  )[:-1].reshape(-1, 2)


def objective(
  choice: Preference,
  predicted: tuple[Any, Any],
  batch: Batch,
  reference: Float32[Array, "N 2"] | None,
  measured: LossSums,
  most: int,
  **choices: Any,
) -> LossSums:
  """The loss of a batch of pairs, in place of the objective of `measured`, the
  cross-entropy of the chosen sides.

  `reference` is log p of each document, None where the loss needs none; for the
  rest see `document_logps`. A pair weighs as its trained tokens do on average.
  Returns `measured` with the objective, its denominator `count`, and the sums
  preference, reward_chosen, reward_rejected, reward_margin and reward_accuracy
  over the pairs.
  """
  weights = jnp.asarray(batch.loss_weights)
  logps = document_logps(predicted, batch, most, **choices)
  tokens = of_documents((weights != 0).astype(jnp.float32), batch, most)
  weight = of_documents(weights, batch, most).sum(axis=1)
  weight /= jnp.maximum(tokens.sum(axis=1), 1)
  sides = (tokens > 0).sum(axis=1)
  weight = jnp.where(sides >= (1 if choice.loss == "kto" else 2), weight, 0)
  against = jnp.zeros_like(logps) if reference is None else reference

  def total(logps: Array) -> Array:
    return (weight * choice.losses(logps, against, tokens)).sum()

  value, slopes = jax.value_and_grad(total)(logps)
  ids = loss_groups.documents(batch, 2 * most)[..., 0]
  slope = jnp.where(ids >= 0, slopes.ravel()[jnp.maximum(ids, 0)], 0)
  surrogate = linear_cross_entropy(
    *predicted, batch.targets, -slope * (weights != 0), **choices
  ).objective
  rewards = choice.rewards(logps, against, tokens)
  margin = rewards[:, 0] - rewards[:, 1]
  over = lambda x: (weight * x).sum()
  return measured._replace(
    objective=surrogate + jax.lax.stop_gradient(value - surrogate),
    count=weight.sum(),
    named={
      "preference": value,
      "reward_chosen": over(rewards[:, 0]),
      "reward_rejected": over(rewards[:, 1]),
      "reward_margin": over(margin),
      "reward_accuracy": over(margin > 0),
    },
  )
