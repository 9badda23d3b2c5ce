"""Attention against a plain loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.models.attention import attention


def by_hand(q, k, v, q_pos, kv_pos, q_seg, kv_seg):
  """One query at a time."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.full(q.shape, np.nan)
  B, T, N, H = q.shape
  for b, t, n in np.ndindex(B, T, N):
    seen = (kv_seg[b] == q_seg[b, t]) & (kv_pos[b] <= q_pos[b, t])
    kv = n // (N // k.shape[2])
    scores = k[b, seen, kv] @ q[b, t, n] / np.sqrt(H)
    weights = np.exp(scores - scores.max())
    out[b, t, n] = weights / weights.sum() @ v[b, seen, kv]
  return out


def draw(B=2, T=12, S=12, N=4, K=2, H=6, seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
  return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def lay_out(lengths, T):
  """Segments and positions of documents laid in order, then padding."""
  segments, positions = np.zeros(T, np.int32), np.zeros(T, np.int32)
  start = 0
  for i, n in enumerate(lengths):
    segments[start : start + n] = i + 1
    positions[start : start + n] = np.arange(n)
    start += n
  return positions, segments


@given(st.lists(st.integers(1, 5), max_size=4), st.sampled_from([1, 2, 4]))
@settings(max_examples=15, deadline=None)
def test_packed_rows_equal_the_plain_loop(lengths, num_kv_heads):
  while sum(lengths) > 12:
    lengths.pop()
  q, k, v = draw(B=1, K=num_kv_heads)
  positions, segments = (x[None] for x in lay_out(lengths, 12))
  who = {
    "q_positions": jnp.asarray(positions),
    "kv_positions": jnp.asarray(positions),
    "q_segment_ids": jnp.asarray(segments),
    "kv_segment_ids": jnp.asarray(segments),
  }
  got = attention(q, k, v, **who)
  want = by_hand(q, k, v, positions, positions, segments, segments)
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("T", [256, 300, 600])
def test_skipping_blocks_above_the_diagonal_changes_nothing(T):
  """2, 2 and 4 blocks of queries; 300 does not divide evenly by 128."""
  q, k, v = draw(B=1, T=T, S=T, N=2, K=1, H=4)
  positions, segments = lay_out([100, 57, T - 170], T)
  who = {
    "q_positions": jnp.asarray(positions)[None],
    "kv_positions": jnp.asarray(positions)[None],
    "q_segment_ids": jnp.asarray(segments)[None],
    "kv_segment_ids": jnp.asarray(segments)[None],
  }

  def loss(q, k, v, in_order):
    out = attention(q, k, v, **who, in_order=in_order)
    kept = who["q_segment_ids"][..., None, None] > 0
    return jnp.sum(jnp.sin(jnp.where(kept, out, 0)))

  step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
  want, got = step(q, k, v, False), step(q, k, v, True)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  for x, y in zip(got[1], want[1], strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_query_that_sees_nothing_is_finite_with_finite_gradients():
  q, k, v = draw(B=1, T=1, S=3)

  def loss(q, k, v):
    out = attention(
      q * 100,
      k,
      v,
      q_positions=jnp.array([[-1]]),
      kv_positions=jnp.array([[0, 1, 2]]),
      q_segment_ids=jnp.array([[0]]),
      kv_segment_ids=jnp.array([[1, 1, 1]]),
    )
    return jnp.sum(out**2)

  value, gradient = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
  assert np.isfinite(value)
  assert all(np.all(np.isfinite(g)) for g in gradient)


def test_large_scores_do_not_overflow():
  q, k, v = draw(B=1)
  positions, segments = (jnp.asarray(x)[None] for x in lay_out([12], 12))
  out = attention(
    q * 1e4,
    k * 1e4,
    v,
    q_positions=positions,
    kv_positions=positions,
    q_segment_ids=segments,
    kv_segment_ids=segments,
  )
  assert np.all(np.isfinite(out))


def test_bfloat16_in_and_out_with_float32_between():
  q, k, v = draw(B=1)
  positions, segments = (jnp.asarray(x)[None] for x in lay_out([12], 12))
  who = {
    "q_positions": positions,
    "kv_positions": positions,
    "q_segment_ids": segments,
    "kv_segment_ids": segments,
  }
  want = attention(q, k, v, **who)
  got = attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), **who)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(np.float32), want, atol=0.05)


@pytest.mark.parametrize("backend", ["cudnn", "splash", ""])
def test_backends_that_do_not_exist_are_refused_by_name(backend):
  q, k, v = draw(B=1, T=1, S=1)
  one = jnp.ones((1, 1), jnp.int32)
  with pytest.raises(ValueError, match=f"backend '{backend}'"):
    attention(
      q,
      k,
      v,
      q_positions=one,
      kv_positions=one,
      q_segment_ids=one,
      kv_segment_ids=one,
      backend=backend,
    )
