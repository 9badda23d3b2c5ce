"""Rows chosen under a budget: brute force on small sets, reasons, filters."""

import itertools
import json

import numpy as np
import pytest

import tiny
from sft_jax.commands import score
from sft_jax.data.selection import RowScore
from sft_jax.evals import row_selection


def radius(vectors, rows):
  gap = np.linalg.norm(vectors[:, None] - vectors[list(rows)][None], axis=2)
  return gap.min(axis=1).max()


def test_farthest_first_is_within_twice_the_best_of_all_subsets():
  for seed in range(5):
    vectors = np.random.default_rng(seed).normal(size=(11, 3))
    taken, distance = row_selection.farthest_first(vectors, np.ones(11), 4)
    best = min(
      radius(vectors, rows) for rows in itertools.combinations(range(11), 4)
    )
    assert len(set(taken.tolist())) == 4
    assert distance.max() == pytest.approx(radius(vectors, taken))
    assert distance.max() <= 2 * best
  # Every turn takes the farthest, by all distances at once.
  for turn in range(1, 4):
    gap = np.linalg.norm(
      vectors[:, None] - vectors[taken[:turn]][None], axis=2
    ).min(axis=1)
    assert gap[taken[turn]] == pytest.approx(gap.max())


def scored(number, ifd=lambda i: 0.5):
  return [
    RowScore(f"r.jsonl:{i}", i, (1.0, ifd(i), 2.0, 5)) for i in range(number)
  ]


def test_copies_and_misleading_rows_are_left_and_every_row_says_why():
  scores = scored(8, lambda i: 1.3 if i == 3 else 0.1 * i)
  scores[5] = scores[5]._replace(content=scores[1].content)
  vectors = np.random.default_rng(0).normal(size=(8, 3))
  found = row_selection.choose(scores, vectors, 0.5)
  assert found[3].reason == "left: the prompt misleads, ifd 1.30"
  assert found[5].reason == "left: a copy of r.jsonl:1"
  kept = [i for i, one in enumerate(found) if one.rank < 1]
  assert len(kept) == 4
  assert all(found[i].reason.startswith("kept: turn") for i in kept)
  assert sorted(found[i].rank for i in kept) == [0.125, 0.25, 0.375, 0.5]
  assert min(found).reason.endswith("ifd 0.70")  # The hardest comes first.
  rest = set(range(8)) - {*kept, 3, 5}
  assert all("from a row that is kept" in found[i].reason for i in rest)


def test_diversity_and_difficulty_count():
  """Three clusters: one of each is kept, and of equals the harder one."""
  centers = np.eye(3).repeat(10, axis=0)
  noise = np.random.default_rng(0).normal(size=centers.shape, scale=1e-4)
  found = row_selection.choose(
    scored(30, lambda i: 0.9 if i % 10 == 7 else 0.2), centers + noise, 0.1
  )
  kept = [i for i, one in enumerate(found) if one.rank < 1]
  assert kept == [7, 17, 27]


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
  assert kinds["refusal"] == kinds["several turns"] == kinds["raw text"] == 1
  assert kinds["tool call"] == kinds["system prompt"] == 0
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
