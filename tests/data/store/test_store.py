"""Held-out rows are apart and accounted for; differences have names."""

import dataclasses

import numpy as np
import pytest

from fake_store import random_store


def test_split_keeps_equal_rows_together_and_counts_all():
  store = random_store(
    100, longest=9, source=[0] * 60 + [1] * 40, weights=(2.0, 1.0)
  )
  # Two rows of each content; the second example of row 98 is example 99.
  store.index["content"] = np.arange(100) % 50
  store.index["row"][99] = 98
  store.index["content"][[98, 99, 48, 49]] = 48
  store.stats.source("1.jsonl").rows_in -= 1
  store.stats.source("1.jsonl").rows_trained -= 1
  store.stats.check()

  train, held = store.split(0.2, seed=1)
  assert len(train.index) + len(held.index) == 100
  contents = [set(part.index["content"].tolist()) for part in (train, held)]
  assert not contents[0] & contents[1]
  assert len(contents[1]) == round(0.2 * 49)
  for part in (train, held):
    part.stats.check()
  assert train.stats.total("rows_in") == 99
  assert train.stats.total("rows_held_out") == held.stats.total("rows_in")
  tokens = sum(
    part.stats.total(kind)
    for part in (train, held)
    for kind in ("tokens_prompt", "tokens_trained")
  )
  assert tokens == store.lengths.sum()
  assert train.copies == (2.0, 1.0)
  assert held.copies == (1.0, 1.0)
  prints = {store.fingerprint, train.fingerprint, held.fingerprint}
  assert len(prints) == 3
  first = held.index["start"][0]
  assert held.example(0).tokens[0] == store.tokens[first]


def test_split_is_seeded():
  store = random_store(100, longest=9)
  held = [store.split(0.1, seed=seed)[1] for seed in (0, 0, 1)]
  rows = [part.index["row"].tolist() for part in held]
  assert rows[0] == rows[1] != rows[2]


@pytest.mark.parametrize("fraction", [0.0, 1.0, 0.96])
def test_split_leaves_rows_on_both_sides(fraction):
  with pytest.raises(ValueError, match="rows on both sides"):
    random_store(10, longest=9).split(fraction, seed=0)


def test_store_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    random_store(2, longest=4).fingerprint = "mine"
