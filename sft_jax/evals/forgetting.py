"""Forgetting: perplexity on general text, before and after."""

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


class Forgetting(NamedTuple):
  """Perplexity of the same text before and after training."""

  before: Perplexity
  after: Perplexity

  @property
  def growth(self) -> float:
    """Relative growth: 0.1 is 10 % more perplexed than before."""
    return self.after.value / self.before.value - 1


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


def forgetting(before: Perplexity, after: Perplexity) -> Forgetting:
  """Pairs two measurements of one text.

  Raises:
    ValueError: they are over different numbers of tokens.
  """
  if before.tokens != after.tokens:
    raise ValueError(
      f"forgetting: got {before.tokens:g} and {after.tokens:g} tokens; "
      "expected the same text both times. Evaluate one set twice."
    )
  return Forgetting(before, after)
