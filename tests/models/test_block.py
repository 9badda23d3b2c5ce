"""Norms and Embed against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.models import block


def test_rms_norm_is_its_formula_even_for_bfloat16_input():
  x = np.random.default_rng(0).standard_normal((2, 3, 8)) * 50
  scale = np.linspace(0.5, 2, 8)
  x = jnp.asarray(x, jnp.bfloat16)
  norm = block.RMSNorm(eps=1e-5)
  got = norm.apply({"params": {"scale": jnp.asarray(scale)}}, x)
  x = np.asarray(x, np.float64)
  want = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_an_offset_is_added_to_the_scale():
  x, scale = jnp.arange(4.0), jnp.linspace(-0.5, 0.5, 4)
  plain = block.RMSNorm(eps=1e-5).apply({"params": {"scale": scale + 1}}, x)
  norm = block.RMSNorm(eps=1e-5, offset=1.0)
  got = norm.apply({"params": {"scale": scale}}, x)
  np.testing.assert_allclose(got, plain, rtol=1e-6)
  fresh = norm.init(jax.random.key(0), x)["params"]["scale"]
  np.testing.assert_array_equal(fresh, np.zeros(4))


def test_layer_norm_is_its_formula():
  x = np.random.default_rng(0).standard_normal((2, 8)) * 5 + 3
  params = {"scale": jnp.linspace(0.5, 2, 8), "bias": jnp.linspace(-1, 1, 8)}
  got = block.LayerNorm(eps=1e-5).apply({"params": params}, jnp.asarray(x))
  want = (x - x.mean(-1, keepdims=True)) / np.sqrt(
    x.var(-1, keepdims=True) + 1e-5
  ) * np.linspace(0.5, 2, 8) + np.linspace(-1, 1, 8)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [block.RMSNorm, block.LayerNorm])
def test_a_norm_keeps_its_input_and_parameters_alone(kind):
  norm = kind(eps=1e-5)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 8)))
  params = norm.init(jax.random.key(0), x)
  apply = lambda params, x: norm.apply(params, x).sum()
  _, pull = jax.vjp(apply, params, x)
  kept = sum(leaf.size for leaf in jax.tree.leaves(pull))
  assert kept <= x.size + sum(leaf.size for leaf in jax.tree.leaves(params))


def test_embed_looks_rows_up_and_an_outside_id_is_nan():
  table = np.arange(12, dtype=np.float32).reshape(4, 3)
  embed = block.Embed(4, 3)
  got = embed.apply(
    {"params": {"embedding": table}}, jnp.array([[2, 0, 4, -1]])
  )
  np.testing.assert_array_equal(got[0, :2], table[[2, 0]])
  assert np.all(np.isnan(got[0, 2:]))


def test_embedding_gradients_add_up_over_repeats():
  embed = block.Embed(4, 2)

  def total(table):
    tokens = jnp.array([[1, 1, 3]])
    return jnp.sum(embed.apply({"params": {"embedding": table}}, tokens))

  gradient = jax.grad(total)(jnp.zeros((4, 2)))
  np.testing.assert_array_equal(gradient[:, 0], [0, 2, 0, 1])
