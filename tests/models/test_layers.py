"""RMSNorm, RoPE and Embed against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.models import layers
from sft_jax.models.config import Rope

LLAMA3 = Rope(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)


def test_rms_norm_is_its_formula_even_for_bfloat16_input():
  x = np.random.default_rng(0).standard_normal((2, 3, 8)) * 50
  scale = np.linspace(0.5, 2, 8)
  x = jnp.asarray(x, jnp.bfloat16)
  norm = layers.RMSNorm(eps=1e-5)
  got = norm.apply({"params": {"scale": jnp.asarray(scale)}}, x)
  x = np.asarray(x, np.float64)
  want = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_angles_stay_true_at_far_positions():
  """bfloat16 or integer-rounded positions would be wrong by radians."""
  positions = jnp.array([[0, 1, 4095, 8191]])
  cos, sin = layers.rope_cos_sin(positions, Rope(10_000.0), 16)
  exact = np.asarray(positions)[0, :, None] * 10_000.0 ** (-np.arange(8) / 8)
  np.testing.assert_allclose(cos[0, :, 0], np.cos(exact), atol=1e-3)
  np.testing.assert_allclose(sin[0, :, 0], np.sin(exact), atol=1e-3)


def test_llama3_keeps_short_waves_and_stretches_long_ones():
  plain = layers.rope_frequencies(Rope(500_000.0), 128)
  got = layers.rope_frequencies(LLAMA3, 128)
  wave = 2 * np.pi / plain
  short, long = wave < 8192 / 4, wave > 8192 / 1
  np.testing.assert_array_equal(got[short], plain[short])
  np.testing.assert_allclose(got[long], plain[long] / 8, rtol=1e-6)
  between = ~short & ~long
  assert between.any()
  assert np.all((got < plain)[between] & (got > plain / 8)[between])


def test_linear_divides_every_frequency():
  plain = layers.rope_frequencies(Rope(100.0), 16)
  linear = layers.rope_frequencies(Rope(100.0, "linear", 4.0), 16)
  np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
@settings(max_examples=20, deadline=None)
def test_scores_depend_on_the_distance_alone(first, distance, shift):
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

  def score(q_position, k_position):
    rotated = [
      layers.apply_rope(
        x, *layers.rope_cos_sin(jnp.array([[at]]), Rope(100.0), 16)
      )
      for x, at in ((q, q_position), (k, k_position))
    ]
    return jnp.sum(rotated[0] * rotated[1])

  near = score(first + distance, first)
  far = score(first + distance + shift, first + shift)
  np.testing.assert_allclose(near, far, atol=1e-3)


def test_position_zero_does_not_rotate():
  x = jax.random.normal(jax.random.key(0), (1, 1, 2, 8))
  cos_sin = layers.rope_cos_sin(jnp.zeros((1, 1), jnp.int32), Rope(100.0), 8)
  np.testing.assert_array_equal(layers.apply_rope(x, *cos_sin), x)


def test_embed_looks_rows_up_and_an_outside_id_is_nan():
  table = np.arange(12, dtype=np.float32).reshape(4, 3)
  embed = layers.Embed(4, 3)
  got = embed.apply(
    {"params": {"embedding": table}}, jnp.array([[2, 0, 4, -1]])
  )
  np.testing.assert_array_equal(got[0, :2], table[[2, 0]])
  assert np.all(np.isnan(got[0, 2:]))


def test_embedding_gradients_add_up_over_repeats():
  embed = layers.Embed(4, 2)

  def total(table):
    tokens = jnp.array([[1, 1, 3]])
    return jnp.sum(embed.apply({"params": {"embedding": table}}, tokens))

  gradient = jax.grad(total)(jnp.zeros((4, 2)))
  np.testing.assert_array_equal(gradient[:, 0], [0, 2, 0, 1])
