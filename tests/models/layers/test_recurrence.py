"""Recurrences: against a loop in float64, at every boundary and chunk size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.models.layers import recurrence

K, G, H, P, T = 2, 2, 3, 4, 22
KINDS = pytest.mark.parametrize("delta", [True, False])


def draw(seed, rows, delta, tokens=T):
  """q, k, v, g and beta of rows; keys of length 1, decays far and near."""
  rng = np.random.default_rng(seed)
  k = rng.standard_normal((rows, tokens, K, H))
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  q = rng.standard_normal((rows, tokens, K, H))
  v = rng.standard_normal((rows, tokens, K, G, P))
  g = -np.exp(rng.uniform(-6, 2, (rows, tokens, K, G)))
  beta = rng.uniform(0, 1, (rows, tokens, K, G)) if delta else None
  return q, k, v, g, beta


def loop(q, k, v, g, beta, starts):
  """The definition, in float64: (outputs, states after the rows)."""
  y, states = np.zeros(v.shape), []
  for b, k_head, group in np.ndindex(len(q), K, G):
    S = np.zeros((H, P))
    for t in range(q.shape[1]):
      key, value = k[b, t, k_head], v[b, t, k_head, group]
      S = np.zeros((H, P)) if starts[b, t] else S
      S = np.exp(g[b, t, k_head, group]) * S
      if beta is not None:
        value = value - beta[b, t, k_head, group] * (key @ S)
      S = S + np.outer(key, value)
      y[b, t, k_head, group] = q[b, t, k_head] @ S
    states.append(S)
  return y, np.reshape(states, (len(q), K, G, H, P))


def at(offsets, tokens=T):
  """Rows whose second documents start at the offsets."""
  starts = np.zeros((len(offsets), tokens), bool)
  starts[:, 0], starts[np.arange(len(offsets)), offsets] = True, True
  return starts


def narrow(parts):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), parts)


@functools.cache
def chunked(size):
  return jax.jit(functools.partial(recurrence.chunked, size=size))


@KINDS
def test_every_form_is_the_loop_wherever_a_document_starts(delta):
  """A second document at each slot of each chunk, in rows of one batch."""
  starts, parts = at(np.arange(1, T)), draw(0, T - 1, delta)
  want, states = loop(*parts, starts)
  for size in (1, 5, 8, 64):
    got, after = chunked(size)(*narrow(parts), starts)
    np.testing.assert_allclose(got, want, atol=1e-5, err_msg=f"size {size}")
    np.testing.assert_allclose(after, states, atol=1e-5)
  got, after = jax.jit(recurrence.stepped)(
    *narrow(parts), starts, jnp.zeros(states.shape)
  )
  np.testing.assert_allclose(got, want, atol=1e-5)
  np.testing.assert_allclose(after, states, atol=1e-5)


@KINDS
def test_nothing_passes_between_documents_or_backwards(delta):
  """One token of the first document changed: exact zeros after the boundary;
  one of the second: exact zeros before it."""
  offsets = np.arange(2, T)
  rows, starts = len(offsets), at(offsets)
  parts, other = draw(0, rows, delta), draw(1, rows, delta)
  slots = np.arange(T)
  for changed in (offsets - 1, np.minimum(offsets + 1, T - 1)):
    mixed = []
    for old, new in zip(parts, other, strict=True):
      if old is not None:
        here = (slots == changed[:, None]).reshape(
          rows, T, *[1] * (old.ndim - 2)
        )
        mixed.append(np.where(here, new, old))
    mixed += [] if delta else [None]
    got, _ = chunked(8)(*narrow(parts), starts)
    moved, _ = chunked(8)(*narrow(mixed), starts)
    first = changed < offsets
    # Slots that do not see the changed one.
    second = slots >= offsets[:, None]
    unseen = (slots < changed[:, None]) | (second & first[:, None])
    np.testing.assert_array_equal(got[unseen], moved[unseen])
    assert (np.abs(got - moved).max((2, 3, 4))[~unseen] > 0).mean() > 0.9


@KINDS
def test_gradients_are_those_of_single_documents(delta):
  """Of the chunked form packed, and of the other form alone."""
  parts = narrow(draw(2, 1, delta))
  cut, weights = 9, jnp.asarray(np.random.default_rng(3).normal(size=(T, P)))
  weights = weights[None, :, None, None]

  def packed(parts):
    y, _ = recurrence.chunked(*parts, jnp.asarray(at([cut])), size=8)
    return jnp.sum(jnp.sin(y) * weights)

  def alone(parts):
    total = 0.0
    for where in (slice(0, cut), slice(cut, T)):
      own = jax.tree.map(lambda x, where=where: x[:, where], parts)
      starts = np.zeros((1, own[0].shape[1]), bool)
      state = jnp.zeros((1, K, G, H, P))
      y, _ = recurrence.stepped(*own, jnp.asarray(starts), state)
      total += jnp.sum(jnp.sin(y) * weights[:, where])
    return total

  for got, want in zip(
    jax.tree.leaves(jax.jit(jax.grad(packed))(parts)),
    jax.tree.leaves(jax.jit(jax.grad(alone))(parts)),
    strict=True,
  ):
    most = np.abs(want).max()
    assert most > 1e-3
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(most, 1))


def test_the_delta_rule_is_stable_where_keys_repeat():
  """One key throughout, overwritten whole: a sum of powers would overflow."""
  q, k, v, g, _ = draw(4, 1, True, 64)
  k = np.broadcast_to(k[:, :1], k.shape)
  beta, g = np.ones(g.shape), 1e-3 * g
  parts, starts = (q, k, v, g, beta), at([40], 64)
  got, _ = chunked(64)(*narrow(parts), starts)
  np.testing.assert_allclose(got, loop(*parts, starts)[0], atol=2e-5)
