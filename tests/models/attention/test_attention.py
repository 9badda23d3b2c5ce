"""Attention against a plain loop in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attention_laws as laws
from sft_jax.common import sharding
from sft_jax.models.attention import blockwise, parallel
from sft_jax.models.attention.attention import (
  attention,
  check_backend,
  choose,
  first_visible,
)


def by_hand(
  q, k, v, q_pos, kv_pos, q_seg, kv_seg, window=None, scale=None, softcap=None
):
  """One query at a time."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.full(q.shape, np.nan)
  B, T, N, H = q.shape
  for b, t, n in np.ndindex(B, T, N):
    seen = (kv_seg[b] == q_seg[b, t]) & (kv_pos[b] <= q_pos[b, t])
    if window:
      seen &= kv_pos[b] > q_pos[b, t] - window
    kv = n // (N // k.shape[2])
    scores = k[b, seen, kv] @ q[b, t, n] * (scale or H**-0.5)
    if softcap:
      scores = softcap * np.tanh(scores / softcap)
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
@settings(max_examples=8, deadline=None)
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
  got = jax.jit(attention)(q, k, v, **who)
  want = by_hand(q, k, v, positions, positions, segments, segments)
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
  "how",
  [{"window": 1}, {"window": 3}, {"scale": 2.0}, {"softcap": 0.5}],
)
def test_windows_scale_and_softcap_equal_the_plain_loop(how):
  q, k, v = draw(B=1)
  positions, segments = (x[None] for x in lay_out([7, 4], 12))
  who = {
    "q_positions": jnp.asarray(positions),
    "kv_positions": jnp.asarray(positions),
    "q_segment_ids": jnp.asarray(segments),
    "kv_segment_ids": jnp.asarray(segments),
  }
  got = attention(q, k, v, **who, **how)
  want = by_hand(q, k, v, positions, positions, segments, segments, **how)
  np.testing.assert_allclose(got[:, :11], want[:, :11], atol=1e-5)


@pytest.mark.parametrize("T", [300, 520])
def test_skipping_blocks_above_the_diagonal_changes_nothing(T):
  """2 and 4 blocks of queries; 300 is not a multiple of 128."""
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
  # A sum of 4,160 sines.
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=2e-5)
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

  value, gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)
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


@pytest.mark.parametrize(
  ("backend", "why"),
  [
    ("cudnn", "no segment ids"),
    ("splash", "platform 'cpu'; expected 'tpu'"),
    ("tokamax", "platform 'cpu'; expected 'cuda'"),
    ("", "not available; expected one of"),
  ],
)
def test_a_backend_that_cannot_do_it_is_refused_by_name(backend, why):
  with pytest.raises(ValueError, match=f"backend '{backend}'.*{why}"):
    check_backend(backend)


@dataclasses.dataclass(frozen=True)
class Device:
  """As much of another machine's device as the choice looks at."""

  platform: str


def mesh_of(platform):
  return jax.sharding.Mesh(np.array([Device(platform)]), ("data",))


def test_auto_is_chosen_by_the_length_and_the_platform_of_the_mesh():
  chosen = lambda length, **how: choose("auto", length, **how)
  assert chosen(64, in_order=True) == "xla"
  assert chosen(512, in_order=True) == "blocks"
  assert chosen(512, in_order=False) == "xla"
  assert chosen(512, in_order=True, mesh=mesh_of("tpu")) == "splash"
  assert chosen(512, in_order=True, mesh=mesh_of("gpu")) == "blocks"
  assert choose("xla", 512, in_order=True, mesh=mesh_of("tpu")) == "xla"


def test_the_first_slot_that_a_query_sees():
  segments = jnp.array([[1, 1, 1, 1, 2, 2, 0, 0], [7, 8, 8, 8, 8, 8, 8, 8]])
  want = [[0, 0, 0, 0, 4, 4, 6, 7], [0, 1, 1, 1, 1, 1, 1, 1]]
  np.testing.assert_array_equal(first_visible(segments), want)
  want = [[0, 0, 1, 2, 4, 4, 6, 7], [0, 1, 1, 2, 3, 4, 5, 6]]
  np.testing.assert_array_equal(first_visible(segments, 2), want)


def reference(q, k, v, segments, sinks, *, window, softcap):
  """As training calls it: positions restart with each document."""
  own = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
  positions = own - first_visible(segments)
  return attention(
    q,
    k,
    v,
    q_positions=positions,
    kv_positions=positions,
    q_segment_ids=segments,
    kv_segment_ids=segments,
    sinks=sinks,
    window=window,
    softcap=softcap,
    backend="xla",
    in_order=True,
  )


@pytest.mark.parametrize(
  "case",
  [
    laws.Case((9, 1, 7), 22),
    laws.Case((3, 14), 22, K=1, window=4, softcap=0.7, sinks=True),
  ],
)
@pytest.mark.parametrize(
  "law", [laws.check_values, laws.check_isolation, laws.check_packing]
)
def test_the_reference_keeps_the_laws(law, case):
  law(reference, case)


def in_blocks(mesh=None, **how):
  """One call over a few blocks and rows, as a function of q, k, v."""
  positions, segments = (
    jnp.stack([jnp.asarray(lay_out(lengths, 40)[i]) for lengths in _ROWS])
    for i in (0, 1)
  )
  return functools.partial(
    parallel.attention,
    attention,
    mesh,
    q_positions=positions,
    kv_positions=positions,
    q_segment_ids=segments,
    kv_segment_ids=segments,
    backend="blocks",
    in_order=True,
    **how,
  )


_ROWS = ([7, 30], [40], [1, 1, 20], [])


@pytest.mark.parametrize("K", [2, 3])
def test_a_mesh_changes_nothing(K, monkeypatch):
  """Rows over 4 devices and heads over 2; 3 key heads are repeated."""
  monkeypatch.setattr(blockwise, "BLOCK", 16)
  q, k, v = draw(B=4, T=40, S=40, N=2 * K, K=K)
  sinks = jnp.linspace(-1, 1, 2 * K)

  def both(mesh):
    attend = in_blocks(mesh, window=9)
    loss = lambda q, k, v, s: jnp.sum(jnp.sin(attend(q, k, v, sinks=s)))
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(q, k, v, sinks)

  want, got = both(None), both(sharding.make_mesh(2, 2, 2))
  for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_mesh", [False, True])
def test_what_is_saved_by_name_is_not_computed_again(on_mesh):
  attend = in_blocks(sharding.make_mesh(2, 2, 2) if on_mesh else None)
  q, k, v = draw(B=4, T=40, S=40)

  def loops(policy):
    body = lambda q: jnp.sin(attend(jnp.sin(q), k, v))
    loss = lambda q: jnp.sum(jax.checkpoint(body, policy=policy)(q))
    return str(jax.make_jaxpr(jax.grad(loss))(q)).count(" while[")

  policies = jax.checkpoint_policies
  names = policies.save_only_these_names("attention_out", "attention_lse")
  # One forward, one backward; and one forward more.
  assert loops(names) == 2
  assert loops(policies.nothing_saveable) == 3
