"""What rows cover, by brute force."""

from types import SimpleNamespace
from unittest import mock

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.store.store import Store
from sft_jax.data.tokenizers.tokenizer import Tokenizer
from sft_jax.evals import coverage


def unit(rng, *shape):
  vectors = rng.normal(size=shape)
  return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@settings(max_examples=25, deadline=None)
@given(
  seed=st.integers(0, 2**32 - 1),
  rows=st.integers(2, 40),
  asked=st.integers(0, 30),
  block=st.integers(1, 41),
)
def test_far_is_beyond_what_rows_usually_are_apart(seed, rows, asked, block):
  rng = np.random.default_rng(seed)
  vectors, others = unit(rng, rows, 5), unit(rng, asked, 5)
  kept = rng.random(rows) < 0.3
  kept[0] = True
  usual, coverage._BLOCK = coverage._BLOCK, block
  try:
    found = coverage.make(vectors, kept, others)
  finally:
    coverage._BLOCK = usual
  gaps = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
  np.fill_diagonal(gaps, np.inf)
  near = np.quantile(gaps.min(axis=1), 0.95)
  np.testing.assert_allclose(found["near"], near, rtol=1e-5)
  gap = np.linalg.norm(others[:, None] - vectors[kept][None], axis=-1)
  gap = gap.min(axis=1, initial=np.inf)
  sure = np.flatnonzero(np.abs(gap - near) > 1e-5)
  far = set(found["far"])
  assert far & set(sure) == {i for i in sure if gap[i] > near}
  assert (np.diff(gap[found["far"]]) < 1e-5).all()
  numbers = {name: len(points) for name, points in found["points"].items()}
  assert numbers == {
    "left": (~kept).sum(),
    "kept": kept.sum(),
    "held out": asked - len(far),
    "far": len(far),
  }
  # The two directions hold the largest share of the variance there is.
  points = [*found["points"]["left"], *found["points"]["kept"]]
  values = np.linalg.eigvalsh(np.cov(vectors.T))
  np.testing.assert_allclose(
    np.var(points, axis=0, ddof=1), values[:-3:-1], rtol=1e-2, atol=1e-3
  )


def test_of_many_rows_some_are_drawn(monkeypatch):
  monkeypatch.setattr(coverage, "_DRAWN", 7)
  rng = np.random.default_rng(0)
  vectors = unit(rng, 30, 4)
  found = coverage.make(vectors, np.arange(30) < 10, vectors[:3])
  numbers = [len(points) for points in found["points"].values()]
  assert numbers == [7, 7, 3, 0]
  assert found["far"] == []


def test_kinds_are_of_rows_and_look_alikes_are_by_the_nearest():
  """Row 0 refuses; 1 asks alike, 2 and 3 do not; 4 is near none."""
  words = ["I cannot do that.", "It is blue.", "error: no such tool"]
  role = {name: i for i, name in enumerate(TOKEN_ROLES)}

  def example(*parts):
    roles, tokens = zip(*parts, strict=True)
    return SimpleNamespace(
      roles=np.array([role[x] for x in roles]), tokens=np.array(tokens)
    )

  asks = ("user", 1), ("answer", 1)
  called = ("user", 1), ("tool_call", 1), ("tool", 2), ("answer", 1)
  given = [
    *((0, example(("user", 1), ("answer", 0))), (1, example(*asks))),
    *((2, example(*called)), (3, example(*asks)), (4, example(*asks))),
    # One row that was split into two examples, of three turns each.
    *((5, example(*asks * 3)), (5, example(*asks * 3))),
    *((row, example(*asks)) for row in range(6, 46)),
  ]
  store = mock.Mock(
    spec=Store,
    index=np.array([(row,) for row, _ in given], [("row", int)]),
    example=lambda i: given[i][1],
  )
  tokenizer = mock.Mock(spec=Tokenizer)
  tokenizer.decode = lambda ids: " ".join(words[i] for i in ids)
  angles = np.array([0, 0.1, 0.4, 0.45, -1, 3, *np.linspace(1.5, 2, 40)])
  prompts = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  vectors = np.concatenate([prompts[::-1], prompts], axis=1) / np.sqrt(2)
  nats = np.ones(46)
  nats[[3, 4, 43, 44, 45]] = 9
  kept = np.arange(46) % 2 == 0
  found = coverage.kinds(store, tokenizer, 7, vectors, nats, kept)
  assert found == {
    "system prompt": [0, 0],
    "several turns": [1, 0],
    "reasoning": [0, 0],
    "tool call": [1, 1],
    "tool error": [1, 1],
    "refusal": [1, 1],
    "long": [1, 0],
    "raw text": [0, 0],
    "look-alike": [1, 0],
    "hard": [5, 2],
  }
