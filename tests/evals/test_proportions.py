"""Intervals and paired differences, against published values."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_jax.evals import proportions


@pytest.mark.parametrize(
  ("passed", "n", "low", "high"),
  [
    # Published examples: Newcombe 1998, table I (method 3), to four places.
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
  ],
)
def test_wilson_against_published_values(passed, n, low, high):
  assert proportions.wilson(passed, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500), st.data())
def test_wilson_solves_its_own_equation(n, data):
  """Each bound is a proportion just 1.96 standard errors from the observed."""
  passed = data.draw(st.integers(0, n))
  share = passed / n
  low, high = proportions.wilson(passed, n)
  assert 0 <= low <= share <= high <= 1
  for bound in (low, high):
    error = math.sqrt(bound * (1 - bound) / n)
    assert abs(share - bound) == pytest.approx(1.959963985 * error, abs=1e-6)


@pytest.mark.parametrize(
  ("gained", "lost", "p"),
  [(0, 0, 1), (5, 0, 0.0625), (10, 0, 2**-9), (3, 3, 1), (8, 2, 0.109375)],
)
def test_mcnemar_against_binomial_tails(gained, lost, p):
  assert proportions.mcnemar(gained, lost) == pytest.approx(p)
  assert proportions.mcnemar(lost, gained) == pytest.approx(p)


@given(st.integers(0, 9), st.data())
def test_mcnemar_counts_every_way_the_pairs_could_have_fallen(n, data):
  """Under no difference each changed pair is gained or lost by a fair coin."""
  gained = data.draw(st.integers(0, n))
  seen = abs(gained - (n - gained))
  ways = [abs(sum(signs)) for signs in itertools.product((1, -1), repeat=n)]
  share = sum(way >= seen for way in ways) / len(ways)
  assert proportions.mcnemar(gained, n - gained) == pytest.approx(share)
