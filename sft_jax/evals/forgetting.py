"""Forgetting: perplexity on text the model is not trained on."""

import math
from collections.abc import Callable
from typing import NamedTuple


class Perplexity(NamedTuple):
  """How well a text is predicted.

  Attributes:
    nats: sum of the negative log-likelihoods of all predicted tokens.
    tokens: how many were predicted.
  """

  nats: float
  tokens: float

  @property
  def value(self) -> float:
    """exp(nats / tokens): a uniform guess among V tokens has perplexity V."""
    return math.exp(self.nats / self.tokens)


def perplexity(evaluate: Callable[[], tuple[float, float]]) -> Perplexity:
  """Perplexity from an evaluation that returns (sum of nats, tokens).

  Raises:
    ValueError: no token was predicted, or the nats are no number.
  """
  nats, tokens = (float(part) for part in evaluate())
  if not tokens > 0 or not math.isfinite(nats):
    raise ValueError(
      f"perplexity: got {nats} nats over {tokens} tokens; expected a finite "
      "sum over at least one token. Check the general text and the model."
    )
  return Perplexity(nats, tokens)
