"""The walk over groups equals a product per group, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.models.grouped import grouped_matmul, permute


def draw(rng, *shape):
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@jax.jit
def both_ways(x, kernel, sizes, dy):
  y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, kernel)
  return y, *pull(dy)


@given(st.lists(st.integers(0, 40), min_size=3, max_size=3), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_values_and_gradients_equal_a_product_per_group(cuts, seed):
  rows, groups = 40, 4
  sizes = np.diff([0, *sorted(cuts), rows])
  rng = np.random.default_rng(seed)
  x, kernel = draw(rng, rows, 3), draw(rng, groups, 3, 5)
  dy = draw(rng, rows, 5)
  y, dx, dw = map(np.asarray, both_ways(x, kernel, sizes, dy))
  x, kernel, dy = map(np.asarray, (x, kernel, dy))
  group = np.repeat(np.arange(groups), sizes)
  for i, g in enumerate(group):
    np.testing.assert_allclose(y[i], x[i] @ kernel[g], atol=1e-5)
    np.testing.assert_allclose(dx[i], kernel[g] @ dy[i], atol=1e-5)
  for g in range(groups):
    want = x[group == g].T @ dy[group == g]
    np.testing.assert_allclose(dw[g], want, atol=1e-4)


def test_a_row_does_not_depend_on_the_other_rows():
  """Bit for bit, wherever in its group and in its block a row lies."""
  rng = np.random.default_rng(0)
  x, kernel = draw(rng, 48, 16), draw(rng, 2, 16, 8)
  sizes = jnp.array([21, 27])
  whole = grouped_matmul(x, kernel, sizes)
  changed = np.array([0, 3, 20, 22, 47])
  other = grouped_matmul(x.at[changed].set(1e30), kernel, sizes)
  same = np.setdiff1d(np.arange(48), changed)
  np.testing.assert_array_equal(whole[same], other[same])


def test_no_gradient_of_a_frozen_kernel_is_formed():
  """The second loop of the backward pass is left out, not thrown away."""
  x, kernel = jnp.ones((64, 8)), jnp.ones((4, 8, 8))
  sizes = jnp.full(4, 16)

  def loops(argnums):
    fn = jax.grad(lambda *a: jnp.sum(grouped_matmul(*a) ** 2), argnums)
    text = jax.jit(fn).lower(x, kernel, sizes).compile().as_text()
    return text.count(" while(")

  assert loops((0,)) == loops((0, 1)) - 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_kept(dtype):
  x, kernel = jnp.ones((6, 4), dtype), jnp.ones((2, 4, 3), dtype)
  fn = lambda x, w: grouped_matmul(x, w, jnp.array([2, 4]))
  y, pull = jax.vjp(fn, x, kernel)
  assert y.dtype == dtype
  assert {g.dtype for g in pull(y)} == {jnp.dtype(dtype)}


def test_permute_and_its_gradient():
  rng = np.random.default_rng(0)
  x, order = draw(rng, 6, 2), jnp.asarray(rng.permutation(6))
  inverse = jnp.argsort(order)
  y, pull = jax.vjp(lambda x: permute(x, order, inverse), x)
  np.testing.assert_array_equal(y, x[order])
  np.testing.assert_array_equal(pull(y)[0], x)
