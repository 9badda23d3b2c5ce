"""Perplexity, from sums."""

import math

import pytest

from sft_jax.evals import forgetting


def test_a_uniform_guess_among_v_has_perplexity_v():
  found = forgetting.perplexity(lambda: (10 * math.log(64), 10))
  assert found.value == pytest.approx(64)


def test_perplexity_is_of_sums_not_a_mean_of_batches():
  parts = [(math.log(2), 1), (3 * math.log(8), 3)]
  nats, tokens = (sum(side) for side in zip(*parts, strict=True))
  found = forgetting.perplexity(lambda: (nats, tokens))
  assert found.value == pytest.approx(2 ** (10 / 4))


@pytest.mark.parametrize("sums", [(1.0, 0), (math.nan, 3), (math.inf, 3)])
def test_no_figure_from_nothing(sums):
  with pytest.raises(ValueError, match="expected a finite sum"):
    forgetting.perplexity(lambda: sums)
