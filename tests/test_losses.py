"""The chunked loss against float64 NumPy, and its invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.losses import linear_cross_entropy

B, T, D, V = 3, 10, 8, 17


@pytest.fixture
def case():
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(B, T, D)).astype(np.float32) * 2
  head = rng.normal(size=(V, D)).astype(np.float32)
  targets = rng.integers(0, V, (B, T)).astype(np.int32)
  weights = rng.choice([0, 0.5, 1, 2], size=(B, T)).astype(np.float32)
  return tuple(map(jnp.asarray, (hidden, head, targets, weights)))


def reference(hidden, head, targets, weights):
  """(nats, correct, d hidden, d head) in float64, all logits at once."""
  h, e, w = (np.asarray(x, np.float64) for x in (hidden, head, weights))
  y = np.asarray(targets)
  z = h @ e.T
  z_max = z.max(-1, keepdims=True)
  log_z = np.log(np.exp(z - z_max).sum(-1, keepdims=True)) + z_max
  nll = log_z[..., 0] - np.take_along_axis(z, y[..., None], -1)[..., 0]
  d_z = w[..., None] * (np.exp(z - log_z) - np.eye(V)[y])
  return (
    (w * nll).sum(),
    (w * (z.argmax(-1) == y)).sum(),
    d_z @ e,
    np.einsum("btv,btd->vd", d_z, h),
  )


@pytest.mark.parametrize("chunk_tokens", [1, 9, 1000])
def test_equals_the_dense_float64_reference(case, chunk_tokens):
  nats, correct, d_hidden, d_head = reference(*case)

  def loss(hidden, head):
    sums = linear_cross_entropy(
      hidden, head, *case[2:], chunk_tokens=chunk_tokens
    )
    return 3 * sums.nats, sums  # The cotangent must scale.

  (_, sums), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(*case[:2])
  np.testing.assert_allclose(sums.nats, nats, rtol=1e-6)
  np.testing.assert_allclose(sums.weight, case[3].sum(), rtol=1e-7)
  np.testing.assert_allclose(sums.correct, correct, rtol=1e-7)
  for got, want in zip(grads, (d_hidden, d_head), strict=True):
    np.testing.assert_allclose(got, 3 * want, atol=2e-6 * np.abs(want).max())


def test_without_gradients_gives_the_same_sums(case):
  value = linear_cross_entropy(*case, chunk_tokens=9)
  under_grad = jax.grad(
    lambda h: linear_cross_entropy(h, *case[1:], chunk_tokens=9).nats
  )
  assert np.isfinite(under_grad(case[0])).all()
  np.testing.assert_allclose(value.nats, reference(*case)[0], rtol=1e-6)


def test_untrained_slots_do_not_matter(case):
  """Whatever stands at weight 0, even an infinite logit, changes nothing."""
  hidden, head, targets, weights = case
  poison = jnp.where(weights[..., None] == 0, 1e3, hidden)
  other = jnp.where(weights == 0, 0, targets)
  a = jax.value_and_grad(
    lambda e: linear_cross_entropy(*(case[:1]), e, *case[2:]).nats
  )(head)
  b = jax.value_and_grad(
    lambda e: linear_cross_entropy(poison, e, other, weights).nats
  )(head)
  np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
  np.testing.assert_allclose(a[1], b[1], atol=1e-5)


def test_predicting_the_target_costs_nothing_copying_costs_much():
  """Guards the shift: logits on the target, then on the input token."""
  targets = jnp.arange(1, 9, dtype=jnp.int32)[None] % V
  ones = jnp.ones((1, 8), jnp.float32)
  head = 50 * jnp.eye(V)
  right = linear_cross_entropy(jnp.eye(V)[targets], head, targets, ones)
  copied = linear_cross_entropy(jnp.eye(V)[targets - 1], head, targets, ones)
  assert right.nats < 1e-3
  assert right.correct == 8
  assert copied.nats > 100
  assert copied.correct == 0


def test_bfloat16_sums_stay_near_float32(case):
  low = [x.astype(jnp.bfloat16) for x in case[:2]]
  sums = linear_cross_entropy(*low, *case[2:])
  assert sums.nats.dtype == jnp.float32
  np.testing.assert_allclose(
    sums.nats, reference(*low, *case[2:])[0], rtol=1e-3
  )
