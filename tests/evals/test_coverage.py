"""What rows cover, by brute force."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

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
