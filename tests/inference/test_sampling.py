"""The choice of a token: shares by hand, and a sort as the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.inference import sampling
from sft_jax.inference.sampling import Rule


def draw(weights, rule, n=4000):
  """Counts of n draws from log(weights)."""
  keys = jax.random.split(jax.random.key(0), n)
  rows = jnp.broadcast_to(jnp.log(jnp.asarray(weights)), (n, len(weights)))
  tokens = jax.jit(sampling.choose, static_argnums=2)(keys, rows, rule)
  return np.bincount(np.asarray(tokens), minlength=len(weights))


@pytest.mark.parametrize(
  ("rule", "shares"),
  [
    (Rule(1.0), [0.4, 0.3, 0.2, 0.1]),
    # Shares are squared, then normalised.
    (Rule(0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    (Rule(1.0, top_k=2), [4 / 7, 3 / 7, 0, 0]),
    (Rule(1.0, top_k=9), [0.4, 0.3, 0.2, 0.1]),
    # 0.4 + 0.3 is short of 0.75, so the third comes along.
    (Rule(1.0, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
    (Rule(1.0, top_p=0.01), [1, 0, 0, 0]),
    # After top-k the shares are 4/7, 3/7: p = 0.5 keeps one, 0.6 two.
    (Rule(1.0, top_k=2, top_p=0.5), [1, 0, 0, 0]),
    (Rule(1.0, top_k=2, top_p=0.6), [4 / 7, 3 / 7, 0, 0]),
    # A third of 0.4 is more than 0.1; of what top-k keeps, half loses none.
    (Rule(1.0, min_p=0.33), [4 / 9, 3 / 9, 2 / 9, 0]),
    (Rule(1.0, top_k=2, min_p=0.5), [4 / 7, 3 / 7, 0, 0]),
    (Rule(1.0, min_p=1.0), [1, 0, 0, 0]),
    # Colder shares are further apart: 0.3 is now less than 0.6 of 0.4.
    (Rule(0.5, min_p=0.6), [1, 0, 0, 0]),
    (Rule(1.0, top_k=3, top_p=0.8, min_p=0.4), [4 / 9, 3 / 9, 2 / 9, 0]),
    (Rule(1e-30), [1, 0, 0, 0]),
    (Rule(1.0, vocab_size=3), [4 / 9, 3 / 9, 2 / 9, 0]),
    (Rule(0.0), [1, 0, 0, 0]),
  ],
)
def test_distribution(rule, shares):
  """Chi-square of the draws; nothing outside the support, ever."""
  n = 4000
  weights = np.array([0.4, 0.3, 0.2, 0.1], np.float32)
  counts = draw(weights, rule, n)
  shares = np.array(shares)
  assert counts[shares == 0].sum() == 0
  want = n * shares[shares > 0]
  chi2 = np.sum((counts[shares > 0] - want) ** 2 / want)
  assert chi2 < 16.27  # The 99.9th percentile at three degrees of freedom.


def test_order_of_tokens_does_not_matter():
  """Truncation is by rank, wherever the tokens stand in the vocabulary."""
  x = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
  kept = jnp.isfinite(sampling.truncate(x, 0, 0.6))
  assert kept.tolist() == [False, True, False, True]
  kept = jnp.isfinite(sampling.truncate(x, 3, 1.0))
  assert kept.tolist() == [False, True, True, True]


def by_sorting(logits, top_k, top_p, min_p):
  """Which tokens are kept, for each, by the definition, in double precision."""
  x = np.asarray(logits, np.float64)
  if top_k:
    x = np.where(x < np.sort(x)[::-1][min(top_k, x.size) - 1], -np.inf, x)
  share = np.exp(x - x.max())
  share /= share.sum()
  before = np.array([share[x > one].sum() for one in x])
  kept = np.isfinite(x) & (share >= min_p * share.max())
  return kept & ((before < top_p) | (top_p >= 1))


@settings(max_examples=40, deadline=None)
@given(
  st.integers(0, 2**31),
  st.sampled_from([0, 1, 3, 50]),
  st.sampled_from([0.01, 0.5, 0.93, 1.0]),
  st.sampled_from([0.0, 0.07]),
)
def test_the_search_keeps_what_a_sort_keeps(seed, top_k, top_p, min_p):
  rng = np.random.default_rng(seed)
  # Some ties, some of both signs, some far apart.
  x = np.round(rng.normal(size=24) * rng.choice([0.5, 5]), 1)
  x = x.astype(np.float32)
  kept = np.isfinite(sampling.truncate(jnp.asarray(x), top_k, top_p, min_p))
  assert kept.tolist() == by_sorting(x, top_k, top_p, min_p).tolist()


def test_draws_of_a_large_vocabulary_have_its_shares():
  """Blocks of tokens are an inner matter: chi-square over 300 tokens."""
  n, V = 30_000, 300
  logits = jax.random.normal(jax.random.key(1), (V,))
  keys = jax.random.split(jax.random.key(0), n)
  rows = jnp.broadcast_to(logits, (n, V))
  tokens = jax.jit(sampling.choose, static_argnums=2)(keys, rows, Rule(1.0))
  counts = np.bincount(np.asarray(tokens), minlength=V)
  want = n * np.asarray(jax.nn.softmax(logits))
  chi2 = np.sum((counts - want) ** 2 / want)
  assert chi2 < 378  # The 99.9th percentile at 299 degrees of freedom.
