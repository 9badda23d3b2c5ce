"""Rounding by chance: unbiased, between neighbours, the same on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.common import sharding
from sft_jax.step import rounding


def test_it_is_right_on_average():
  """The mean of n draws is within 5 standard errors of each value."""
  rng = np.random.default_rng(0)
  x = (rng.normal(size=64) * 10.0 ** rng.integers(-6, 6, 64)).astype(np.float32)
  n = 4000
  draws = rounding.stochastic(
    jax.random.key(0), jnp.broadcast_to(jnp.asarray(x), (n, 64))
  )
  draws = np.asarray(draws, np.float64)
  low, high = draws.min(0), draws.max(0)
  step = high - low
  share = np.abs(x - low) / np.where(step > 0, step, 1)
  error = step * np.sqrt(share * (1 - share) / n)
  assert (np.abs(draws.mean(0) - x) <= 5 * error + 1e-12).all()
  # Nearest rounding is off by far more, of most of them.
  nearest = np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)
  assert (np.abs(nearest - x) > 5 * error).mean() > 0.5


def test_draws_are_the_two_neighbours():
  x = np.full(1000, 1.001, np.float32)
  draws = rounding.stochastic(jax.random.key(1), jnp.asarray(x))
  assert set(np.asarray(draws, np.float32).tolist()) == {1.0, 1.0078125}


def test_what_is_a_bfloat16_or_not_finite_stays():
  x = np.array([0, -0.0, 1, -2.5, 2.0**-120, np.inf, -np.inf, np.nan])
  x = x.astype(np.float32)
  for seed in range(20):
    draws = rounding.stochastic(jax.random.key(seed), jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(draws, np.float32), x)


def test_draws_are_of_seed_step_tree_and_leaf_and_of_no_mesh():
  x = np.full((8, 64), 1.003, np.float32)
  like = {"a": jnp.zeros(x.shape, jnp.bfloat16), "b": jnp.zeros(x.shape)}
  like["c"] = like["a"]

  @functools.partial(jax.jit, static_argnames="what")
  def draw(x, step=2, what=3):
    return rounding.round_tree(dict.fromkeys("abc", x), like, 1, step, what)

  first = draw(x)
  assert first["b"].dtype == jnp.float32
  np.testing.assert_array_equal(first["b"], x)
  assert (first["a"] != first["c"]).any()
  for other in (draw(x, step=3), draw(x, what=0)):
    assert (other["a"] != first["a"]).any()
  spread = jax.device_put(x, sharding.rows(sharding.make_mesh(2, 4, 1)))
  jax.tree.map(np.testing.assert_array_equal, draw(spread), first)


def test_nearest_draws_nothing_and_unknown_names_are_refused():
  assert rounding.seed_of("nearest", 7) is None
  assert rounding.seed_of("stochastic", 7) != rounding.seed_of("stochastic", 8)
  with pytest.raises(ValueError, match=r"optim\.rounding: got 'up'"):
    rounding.seed_of("up", 0)
