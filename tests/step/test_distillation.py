"""Divergences from a teacher: float64 definitions, chunks, kept tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_jax.data.store import teacher as kept
from sft_jax.step.distillation import Divergence, TopK
from sft_jax.step.loss import Objective, linear_cross_entropy

B, T, D, V = 2, 7, 6, 23
KINDS = [
  Divergence(),
  Divergence("forward", temperature=2.5),
  Divergence("reverse", temperature=0.7),
  Divergence("jsd", 0.3, 1.7),
]
IDS = [f"{x.kind}-{x.temperature}" for x in KINDS]


def definition(kind, y, z):
  """In the dtype of its arguments, by the textbook."""
  t = kind.temperature
  log_q, log_p = (jax.nn.log_softmax(x / t) for x in (y, z))
  q, p = jnp.exp(log_q), jnp.exp(log_p)
  kl = lambda a, b: (a * (jnp.log(a) - jnp.log(b))).sum(axis=-1)
  m = kind.mix * q + (1 - kind.mix) * p
  value = {
    "forward": lambda: kl(q, p),
    "reverse": lambda: kl(p, q),
    "jsd": lambda: kind.mix * kl(q, m) + (1 - kind.mix) * kl(p, m),
  }[kind.kind]()
  return t * t * value


@pytest.fixture(scope="module")
def arrays():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  weights = rng.choice([0, 0.5, 1], (B, T)).astype(np.float32)
  targets = rng.integers(0, V, (B, T)).astype(np.int32)
  return draw(B, T, D), draw(V, D), draw(B, T, 4), draw(V, 4), targets, weights


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_chunks_are_the_definition_in_float64(arrays, kind):
  """Values, and gradients to 1e-6 of float64, with cross-entropy beside."""
  hidden, head, theirs, their_head, targets, weights = arrays
  objective = Objective(kl=0.7, ce=0.4, divergence=kind)

  def chunked(hidden, head):
    return linear_cross_entropy(
      *(hidden, head, targets, weights),
      base=(jnp.asarray(theirs), jnp.asarray(their_head)),
      objective=objective,
      chunk_tokens=3,
    ).objective

  def whole(hidden, head):
    z, y = hidden @ head.T, np.float64(theirs) @ np.float64(their_head).T
    log_p = jax.nn.log_softmax(z)
    nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return (weights * (0.4 * nll + 0.7 * definition(kind, y, z))).sum()

  got = jax.value_and_grad(chunked, (0, 1))(
    jnp.asarray(hidden), jnp.asarray(head)
  )
  with jax.enable_x64(True):
    want = jax.value_and_grad(whole, (0, 1))(
      jnp.asarray(np.float64(hidden)), jnp.asarray(np.float64(head))
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, atol=2e-6 * float(np.abs(b).max()), rtol=2e-6
    ),
    got,
    want,
  )


def _log_softmax(z):
  z = np.float64(z)
  top = z.max(-1, keepdims=True)
  return z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))


def test_kept_tokens_are_the_whole_as_they_grow(arrays):
  hidden, head, theirs, their_head, targets, weights = arrays
  y = jax.nn.log_softmax(theirs @ their_head.T)

  def at(top):
    logps, ids = jax.lax.top_k(y, top)
    return jax.value_and_grad(
      lambda h: (
        linear_cross_entropy(
          *(h, jnp.asarray(head), targets, weights),
          objective=TopK(0.7, 0.4),
          extras={"teacher_ids": ids, "teacher_logps": logps},
          chunk_tokens=3,
        ).objective
      )
    )(jnp.asarray(hidden))

  whole = jax.value_and_grad(
    lambda h: (
      linear_cross_entropy(
        *(h, jnp.asarray(head), targets, weights),
        base=(jnp.asarray(theirs), jnp.asarray(their_head)),
        objective=Objective(kl=0.7, ce=0.4),
      ).objective
    )
  )(jnp.asarray(hidden))
  values = [float(at(top)[0]) for top in (2, 6, 14, V)]
  # By hand at 2: the others are one event of either model.
  q, p = (np.exp(np.float64(x)) for x in (y, _log_softmax(hidden @ head.T)))
  order = np.argsort(-q, axis=-1)[..., :2]
  two = [np.take_along_axis(x, order, -1) for x in (q, p)]
  events = [np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in two]
  kl = (events[0] * np.log(events[0] / events[1])).sum(-1)
  nll = -np.log(np.take_along_axis(p, targets[..., None], -1)[..., 0])
  by_hand = (weights * (0.7 * kl + 0.4 * nll)).sum()
  np.testing.assert_allclose(values[0], by_hand, rtol=1e-4)
  assert values == sorted(values)
  assert values[0] < float(whole[0]) - 1e-3  # What the tail hides.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    at(V),
    whole,
  )


@given(st.integers(1, 70), st.integers(2, 300_000), st.integers(0, 9))
def test_ids_come_back_from_their_bits(top, vocab_size, seed):
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, vocab_size, (3, top)).astype(np.int32)
  bits = max(1, (vocab_size - 1).bit_length())
  while (top * bits + 7) // 8 * 8 // top != bits:
    bits += 1
  np.testing.assert_array_equal(kept.unpack(kept.pack(ids, bits), top), ids)


def test_a_folder_is_what_was_written_and_small(tmp_path):
  rng = np.random.default_rng(0)
  found = [
    (start, rng.integers(0, 150_000, (n, 64)).astype(np.int32),
     -rng.random((n, 64)))
    for start, n in ((0, 3), (40, 1), (90, 5))
  ]  # fmt: skip
  about = {"rows": "abc", "top": 64, "dtype": "<f2"}
  kept.write(tmp_path / "t", found, vocab_size=150_000, about=about)
  opened = kept.open_kept(tmp_path / "t", "abc")
  for start, ids, logps in found:
    got = opened.of(start, "row 1")
    np.testing.assert_array_equal(got[0], ids)
    np.testing.assert_allclose(got[1], logps, atol=1e-3)
  assert opened.ids.shape[1] + 2 * 64 < 300
  with pytest.raises(ValueError, match="row 7: got no prediction"):
    opened.of(41, "row 7")
  with pytest.raises(ValueError, match="of other rows"):
    kept.open_kept(tmp_path / "t", "abd")
  data = bytearray((tmp_path / "t" / "logps.bin").read_bytes())
  data[9] ^= 1
  (tmp_path / "t" / "logps.bin").write_bytes(data)
  with pytest.raises(ValueError, match="damaged"):
    kept.open_kept(tmp_path / "t", "abc")
