"""Rotary embeddings against their formulas, and laws of turning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.models import rope
from sft_jax.models.rope import Rope

LLAMA3 = Rope(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)


def turn(positions, lengths=None, by=None, head_dim=16):
  at = jnp.asarray(positions)
  lengths = None if lengths is None else jnp.asarray(lengths)
  return rope.rotation(at, lengths, by or Rope(100.0), head_dim=head_dim)


def test_angles_stay_true_at_far_positions():
  """bfloat16 or integer-rounded positions would be wrong by radians."""
  positions = np.array([[0, 1, 4095, 8191]])
  cos, sin = turn(positions, by=Rope(10_000.0))
  exact = positions[0, :, None] * 10_000.0 ** (-np.arange(8) / 8)
  np.testing.assert_allclose(cos[0, :, 0], np.cos(exact), atol=1e-3)
  np.testing.assert_allclose(sin[0, :, 0], np.sin(exact), atol=1e-3)


def test_llama3_keeps_short_waves_and_stretches_long_ones():
  plain = rope.frequencies(Rope(500_000.0), 128)
  got = rope.frequencies(LLAMA3, 128)
  wave = 2 * np.pi / plain
  short, long = wave < 8192 / 4, wave > 8192 / 1
  np.testing.assert_array_equal(got[short], plain[short])
  np.testing.assert_allclose(got[long], plain[long] / 8, rtol=1e-6)
  between = ~short & ~long
  assert between.any()
  assert np.all((got < plain)[between] & (got > plain / 8)[between])


def test_linear_divides_every_frequency():
  plain = rope.frequencies(Rope(100.0), 16)
  linear = rope.frequencies(Rope(100.0, "linear", 4.0), 16)
  np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)


def test_yarn_keeps_fast_dimensions_and_divides_slow_ones():
  yarn = Rope(10_000.0, "yarn", 4.0, original_max_positions=2048)
  plain, got = rope.frequencies(Rope(10_000.0), 64), rope.frequencies(yarn, 64)
  turns = plain * 2048 / (2 * np.pi)
  np.testing.assert_allclose(got[turns > 40], plain[turns > 40], rtol=1e-6)
  np.testing.assert_allclose(
    got[turns < 0.8], plain[turns < 0.8] / 4, rtol=1e-6
  )
  assert np.all(np.diff(got / plain) <= 1e-6)


def test_longrope_and_dynamic_go_by_the_length_of_the_document():
  """Two documents in a row: the first fits the original context."""
  positions, lengths = [[0, 1, 7]], [[8, 8, 20]]
  factors = {"short_factor": (1.0, 2.0), "long_factor": (3.0, 5.0)}
  long = Rope(100.0, "longrope", original_max_positions=8, **factors)
  base = np.array([1.0, 0.1])
  cos, _ = turn(positions, lengths, long, head_dim=4)
  np.testing.assert_allclose(cos[0, 1, 0], np.cos(base / [1, 2]), rtol=1e-5)
  np.testing.assert_allclose(cos[0, 2, 0], np.cos(7 * base / [3, 5]), rtol=1e-5)
  dynamic = Rope(100.0, "dynamic", 2.0, original_max_positions=8)
  cos, _ = turn(positions, lengths, dynamic, head_dim=4)
  np.testing.assert_allclose(cos[0, 1, 0], np.cos(base), rtol=1e-5)
  theta = 100.0 * (2 * 20 / 8 - 1) ** 2
  np.testing.assert_allclose(
    cos[0, 2, 0], np.cos([7, 7 * theta**-0.5]), rtol=1e-5
  )


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
@settings(max_examples=20, deadline=None)
def test_scores_depend_on_the_distance_alone(first, distance, shift):
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

  def score(q_position, k_position):
    turned = [
      rope.apply(x, turn([[at]]))
      for x, at in ((q, q_position), (k, k_position))
    ]
    return jnp.sum(turned[0] * turned[1])

  near = score(first + distance, first)
  far = score(first + distance + shift, first + shift)
  np.testing.assert_allclose(near, far, atol=1e-3)


@pytest.mark.parametrize("by", [Rope(100.0), None])
def test_position_zero_and_no_rope_do_not_turn(by):
  x = jax.random.normal(jax.random.key(0), (1, 1, 2, 8))
  at = 0 if by else 5
  cos_sin = rope.rotation(jnp.full((1, 1), at), None, by, head_dim=8)
  np.testing.assert_array_equal(rope.apply(x, cos_sin), x)


def test_a_fraction_turns_the_first_dimensions_alone():
  x = jax.random.normal(jax.random.key(0), (1, 1, 2, 8))
  part = Rope(100.0, fraction=0.5)
  got = rope.apply(x, turn([[3]], by=part, head_dim=8))
  np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
  want = rope.apply(x[..., :4], turn([[3]], head_dim=4))
  np.testing.assert_allclose(got[..., :4], want, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("pairs", [False, True])
def test_both_forms_are_equal_to_the_bit_and_turn_gradients_back(dtype, pairs):
  """The product that a TPU takes, and the gradient, against JAX's own."""
  x, dy = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 16), dtype)
  at = turn([[0, 1, 7, 2, 90]] * 2)
  at = at[0] * 1.5, at[1] * 1.5  # As scaled ropes have it.
  by_parts = lambda x: rope._rotate_by_parts(x, *at, pairs=pairs)
  equal = np.testing.assert_array_equal
  equal(rope._rotate_by_product(x, *at, pairs=pairs), by_parts(x))
  got, ours = jax.vjp(lambda x: rope.apply(x, at, pairs=pairs), x)
  want, derived = jax.vjp(by_parts, x)
  equal(got, want)
  equal(ours(dy)[0], derived(dy)[0])


def test_queries_grow_by_blocks_of_the_original_context():
  beta = Rope(100.0, original_max_positions=4, query_beta=0.5)
  positions = jnp.array([[3, 4, 9]])
  at = rope.rotation(positions, None, beta, head_dim=2)
  grown = rope.query_rotation(at, positions, beta)
  want = 1 + 0.5 * np.log([1, 2, 3])
  np.testing.assert_allclose((grown[0] / at[0])[0, :, 0, 0], want, rtol=1e-5)
