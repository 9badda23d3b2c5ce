"""Forgetting: how text not trained on is predicted, and as the base did it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sft_jax.common.batch import Batch
from sft_jax.common.trees import Tree
from sft_jax.data import packing
from sft_jax.data.encoding.encode import Example
from sft_jax.step.loss import BaseSums, LossSums, linear_cross_entropy

# Of a text, beside its loss; see `base_agreement`.
FIGURES = ("kl", "top1_agreement", "base_correct", "both_correct")


class Perplexity(NamedTuple):
  nats: float  # Sum of the negative log-likelihoods of all predicted tokens.
  tokens: float  # How many were predicted.

  @property
  def value(self) -> float:
    """exp(nats / tokens): a uniform guess among V tokens has perplexity V."""
    return math.exp(self.nats / self.tokens)


def perplexity(nats: Any, tokens: Any) -> Perplexity:
  """Perplexity of a sum of nats over so many tokens.

  Raises ValueError: no token was predicted, or the nats are no number.
  """
  nats, tokens = float(nats), float(tokens)
  if not tokens > 0 or not math.isfinite(nats):
    raise ValueError(
      f"perplexity: got {nats} nats over {tokens} tokens; expected a finite "
      "sum over at least one token. Check the general text and the model."
    )
  return Perplexity(nats, tokens)


def base_agreement(base: BaseSums, weight: Any) -> dict[str, float]:
  """How far the predictions of a text of this weight are from the base's.

  Returns kl: mean KL(base || tuned) of a prediction, nats per token;
  top1_agreement: share of the tokens whose most likely one is the base's;
  base_correct: share that the base, given what is before, predicts;
  both_correct: of these, the share that the tuned model predicts, too; absent
  where the base predicts none.
  """
  found = {name: float(getattr(base, name) / weight) for name in FIGURES[:3]}
  if base.base_correct:
    found["both_correct"] = float(base.both_correct / base.base_correct)
  return found


def compare_models(
  model: Any,
  params: Tree,
  base: tuple[Any, Tree] | None,
  examples: Sequence[Example],
  *,
  batch_size: int,
) -> LossSums:
  """Sums over the trained tokens of examples, in float64.

  A model is `models.transformer.Model`, or anything with its `config`, `hidden`
  and `head`; `base` is another one and its parameters, to compare with.

  Raises ValueError: models of different vocabularies, or no examples.
  """
  if base is not None:
    of = lambda model: (model.config.vocab_size, model.config.logit_softcap)
    if (ours := of(model)) != (theirs := of(base[0])):
      raise ValueError(
        f"compare_models: got (vocabulary, soft cap) {ours} and {theirs}; "
        "expected the same of both. Compare a model with what it was made of."
      )

  def predict(
    model: Any, params: Tree, batch: Batch
  ) -> tuple[jax.Array, jax.Array]:
    row = (batch.tokens, batch.positions, batch.segment_ids)
    hidden = model.hidden(params, *row)
    return hidden, model.head(params).astype(hidden.dtype)

  @jax.jit
  def sums(params: Tree, base_params: Tree | None, batch: Batch) -> LossSums:
    other = None
    if base is not None and base_params is not None:
      other = predict(base[0], base_params, batch)
    hidden, head = predict(model, params, batch)
    wanted, softcap = batch.targets, model.config.logit_softcap
    return linear_cross_entropy(
      hidden, head, wanted, batch.loss_weights, base=other, softcap=softcap
    )

  total = None
  for batch in packing.padded_batches(examples, batch_size):
    found = jax.device_get(sums(params, base and base[1], batch))
    found = jax.tree.map(np.float64, found)
    total = found if total is None else jax.tree.map(np.add, total, found)
  if total is None:
    raise ValueError(
      "compare_models: got no examples; expected at least one. Give a text."
    )
  return total
