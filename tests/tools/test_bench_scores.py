"""Planted rows are what they say, and figures of a ranking are exact."""

import random

import numpy as np
import pytest

import bench_scores

ROWS = [
  *({"instruction": f"q{i}", "output": f"a b c d e f{i}"} for i in range(40)),
  {"messages": [{"role": "assistant", "content": "g h i j"}]},
  {"text": "raw and left alone"},
]


def test_what_is_planted():
  made, kinds = bench_scores.plant(ROWS, 0.3, random.Random(0))
  assert len(made) == len(kinds) == len(ROWS) + kinds.count("conflicting")
  assert [kinds.count(k) for k in bench_scores.KINDS] == [4, 4, 4]
  assert [r for r, k in zip(made, kinds, strict=True) if not k] == [
    row for row in ROWS if row in made
  ]
  originals = {r.get("instruction"): r.get("output") for r in ROWS}
  for row, kind in zip(made, kinds, strict=True):
    if kind and "output" in row:
      right, said = originals[row["instruction"]], row["output"]
      if kind == "truncated":
        assert said == "a b c"
      else:
        assert said != right
        assert said in {bench_scores.answer_of(other) for other in ROWS}


def test_auc_against_all_pairs():
  rng = np.random.default_rng(0)
  good, bad = rng.integers(0, 6, 50), rng.integers(2, 8, 20)
  pairs = [(b > g) + 0.5 * (b == g) for g in good for b in bad]
  assert bench_scores.auc(good, bad) == pytest.approx(np.mean(pairs))


def test_figures_of_a_perfect_and_of_a_blind_ranking():
  kinds = np.array([""] * 6 + list(bench_scores.KINDS))
  perfect = bench_scores.figures(np.arange(9.0), kinds)
  assert perfect == ["100%"] * 4 + ["1.00"] * 4
  blind = bench_scores.figures(np.zeros(9), kinds)
  assert blind[4:] == ["0.50"] * 4
