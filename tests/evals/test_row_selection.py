"""Rows chosen under a budget: brute force on small sets, reasons, filters."""

import itertools
import json

import numpy as np
import pytest

import tiny
from sft_jax.commands import score
from sft_jax.data.selection import RowScore
from sft_jax.evals import row_selection


def unit(vectors):
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def gaps_of(vectors):
  return np.linalg.norm(vectors[:, None] - vectors[None], axis=2).astype("f4")


def test_distances_are_of_directions_from_the_middle():
  vectors = np.random.default_rng(0).normal(size=(9, 4)) + 9
  found = row_selection.distances(vectors)
  expected = gaps_of(unit(vectors - vectors.mean(axis=0)))
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_is_taken_is_near_the_best_of_all_subsets():
  """Each turn is the best of all by brute force, and so within 1 - 1/e."""
  for seed in range(5):
    rng = np.random.default_rng(seed)
    gaps = gaps_of(unit(rng.normal(size=(11, 3))))
    value = rng.random(11) if seed else np.ones(11)
    taken, nearest = row_selection.represent(gaps, value, 4)
    before = np.full(11, 2.0)
    for i in taken:
      gain = value * np.maximum(before - gaps, 0).sum(axis=1)
      gain[taken[: taken.tolist().index(i)]] = -1
      assert gain[i] == pytest.approx(gain.max())
      before = np.minimum(before, gaps[i])
    np.testing.assert_array_equal(nearest, gaps[taken].min(axis=0))
    assert len(set(taken.tolist())) == 4
    if not seed:
      fall = lambda rows, gaps=gaps: (2 - gaps[list(rows)].min(axis=0)).sum()
      best = max(map(fall, itertools.combinations(range(11), 4)))
      assert fall(taken) >= (1 - 1 / np.e) * best


def test_worth_is_twice_the_share_of_near_rows_with_more_nats(monkeypatch):
  monkeypatch.setattr(row_selection, "_NEIGHBORS", 5)
  rng = np.random.default_rng(0)
  gaps = gaps_of(unit(rng.normal(size=(20, 3))))
  nats = rng.integers(0, 4, size=20).astype(float)
  found = row_selection.worth(gaps, nats)
  for i in range(20):
    near = [j for j in np.argsort(gaps[i]) if j != i][:5]
    counts = [(nats[j] > nats[i]) + (nats[j] == nats[i]) / 2 for j in near]
    assert found[i] == pytest.approx(min(1, 2 * np.mean(counts)))
  assert row_selection.worth(gaps[:1, :1], nats[:1]) == [1]


def scored(number, nats=lambda i: 1.0):
  return [
    RowScore(f"r.jsonl:{i}", i, (nats(i), 0.5, 2.0, 5)) for i in range(number)
  ]


def test_where_the_audit_leaves_every_row_none_is_kept():
  vectors = np.eye(3, dtype=np.float32)
  found = row_selection.choose(scored(3), vectors, 0.5, bad=["x"] * 3)
  assert [(x.rank, x.reason) for x in found] == [(1.0, "left: x")] * 3


def test_copies_are_left_and_every_row_says_why():
  scores = scored(8, lambda i: 0.1 * i)
  scores[5] = scores[5]._replace(content=scores[1].content)
  bad = ["", "", "", "a placeholder", "", "", "", ""]
  vectors = np.random.default_rng(0).normal(size=(8, 3))
  found = row_selection.choose(scores, vectors, 0.5, bad=bad)
  assert found[3].reason == "left: a placeholder"
  assert found[5].reason == "left: a copy of r.jsonl:1"
  kept = [i for i, one in enumerate(found) if one.rank < 1]
  assert len(kept) == 4
  assert all(found[i].reason.startswith("kept: turn") for i in kept)
  assert sorted(found[i].rank for i in kept) == [0.125, 0.25, 0.375, 0.5]
  # Of six rows that are all neighbors, the last is likelier than none.
  assert found[0].reason.endswith("worth 1.00")
  assert found[6].reason.endswith("worth 0.40")
  assert found[7].reason.endswith("worth 0.00")
  rest = set(range(8)) - {*kept, 3, 5}
  assert all("from a row that is kept" in found[i].reason for i in rest)


def test_answers_to_something_else_and_outliers_come_late():
  """Three clusters, each with its own usual loss, and a wrong answer in each.

  The farthest row is an outlier, and comes after one of each. Nats alone would
  take the first cluster and leave the third.
  """
  rng = np.random.default_rng(0)
  centers = np.eye(4)[:3].repeat(20, axis=0)
  noise = rng.normal(size=centers.shape, scale=1e-2)
  far = unit(rng.normal(size=(6, 4)))
  nats = lambda i: 9.0 if i >= 60 else i // 20 + (0.9 if i % 20 == 7 else 0.0)
  found = row_selection.choose(
    scored(66, nats), np.concatenate([centers + noise, far]), 0.15
  )
  turns = sorted((one.rank, i) for i, one in enumerate(found) if one.rank < 1)
  assert sorted(i // 20 for _, i in turns[:3]) == [0, 1, 2]
  kept = {i for _, i in turns}
  assert len(kept) == 10
  assert not kept & {7, 27, 47}


def test_blocks_share_the_budget(monkeypatch):
  monkeypatch.setattr(row_selection, "_BLOCK", 7)
  vectors = np.random.default_rng(0).normal(size=(40, 4))
  one, again, other = (
    row_selection.choose(scored(40), vectors, 0.25, seed=seed)
    for seed in (0, 0, 1)
  )
  assert one == again != other
  assert sum(x.rank < 1 for x in one) == 10
  with pytest.raises(ValueError, match="keeps at least one"):
    row_selection.choose(scored(3), vectors[:3], 0.01)


def test_the_command_writes_scores_that_a_filter_reads(tmp_path):
  folder = tiny.model_folder(tmp_path / "model")
  turns = [
    *(("user", "Hurt him!"), ("assistant", "I can't help with that.")),
    *(("user", "Why?"), ("assistant", "It hurts.")),
  ]
  rows = [
    *(*tiny.ROWS, tiny.ROWS[0]),
    {**tiny.ROWS[1], "output": "I know of none that does."},
    {"instruction": "What is it?", "output": "None"},
    {"messages": [{"role": who, "content": text} for who, text in turns]},
    {"text": "Cats and dogs."},
  ]
  rows = tiny.rows_file(tmp_path / "rows.jsonl", rows)
  config = tiny.config(
    *(tmp_path, folder, rows), data__seq_len=128, data__holdout=0.25,
    mesh__data=1, mesh__fsdp=8,
  )  # fmt: skip
  lines = []
  score.score(config, lines.append, 0.25)
  assert any('data.filter=(("rank","<",1.0),)' in line for line in lines)
  text = (tmp_path / "rows.jsonl.scores.jsonl").read_text().splitlines()[1:]
  found = [json.loads(line) for line in text]
  assert len(found) == 21
  for i, reason in {
    16: "a copy of rows.jsonl:1",
    1: "answers otherwise than rows.jsonl:18",
    17: "answers otherwise than rows.jsonl:2",
    18: "a placeholder for an answer",
  }.items():
    assert found[i]["reason"] == f"left: {reason}"
    assert found[i]["rank"] == 1
  covered = json.loads(
    (tmp_path / "rows.jsonl.coverage.scores.jsonl").read_text()
  )
  points = {name: len(x) for name, x in covered["points"].items()}
  held = points["held out"] + points["far"]
  # A row and its copy are held out together.
  assert held in (5, 6)
  assert sum(points.values()) == 21
  assert covered["counts"] == {"held_out": held, "far": len(covered["far"])}
  kinds = covered["kinds"]
  there = {name: one[0] for name, one in kinds.items()}
  assert there["refusal"] == there["several turns"] == there["raw text"] == 1
  assert there["tool call"] == there["system prompt"] == 0
  assert kinds["raw text"][1] == (found[20]["rank"] < 1)
  config.data.holdout = 0.0
  config.data.train = str(tmp_path / "*.jsonl")
  config.data.filter = (("rank", "<", 1.0),)
  store = score.data.load_stores(
    config, score.data.load_tokenizer(config, folder), lines.append
  ).train
  assert len(store.index) == sum(one["rank"] < 1 for one in found) == 5
  whole = {"changed": 0, "unscored": 0}
  assert score.find_coverage(config, store, whole) == covered
  assert score.find_coverage(config, store, {**whole, "changed": 1}) is None
