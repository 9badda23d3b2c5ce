"""Near duplicates: recall and precision on a planted set, by a brute oracle."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from sft_jax.data.audit import near_duplicates, text_hashing

SHARED = Path(__file__).parents[4] / "shared" / "data" / "instruction"


def planted(seed: int, *, bases: int = 80, others: int = 100) -> list[str]:
  """Copies with k words replaced, dropped or added; shuffles; strangers."""
  rng = np.random.default_rng(seed)
  vocabulary = np.array([f"w{i}" for i in range(3000)])

  def text(size: int) -> list[str]:
    # Common words are common: strangers share some.
    return vocabulary[(rng.zipf(1.3, size) - 1) % 3000].tolist()

  made = []
  for _ in range(bases):
    base = text(int(rng.integers(8, 120)))
    made.append(base)
    for _ in range(2):
      copy = list(base)
      for _ in range(int(rng.integers(0, 5))):
        at = int(rng.integers(len(copy)))
        kind = rng.integers(3)
        copy[at : at + int(kind != 2)] = text(int(kind != 1))
      made.append(copy or base)
    halves = base[len(base) // 2 :] + base[: len(base) // 2]
    made += [halves, rng.permutation(base).tolist()]
  made += [text(int(rng.integers(1, 120))) for _ in range(others)]
  return [" ".join(made[i]) for i in rng.permutation(len(made))]


def runs(text: str, n: int) -> set[tuple[str, ...]]:
  of = text.split()
  return {tuple(of[i : i + n]) for i in range(max(len(of) - n + 1, 1))}


def jaccard(a: set, b: set) -> float:
  return len(a & b) / len(a | b)


@pytest.mark.parametrize("n", [2, 3])
def test_recall_and_precision_on_a_planted_set(n):
  texts = planted(seed=n)
  sets = [runs(text, n) for text in texts]
  truth = {
    (i, j): similarity
    for i, j in itertools.combinations(range(len(texts)), 2)
    if (similarity := jaccard(sets[i], sets[j])) >= 0.8
  }
  found = near_duplicates.find_near_duplicates(
    text_hashing.split(texts), n=n, threshold=0.8
  )
  # Precision is 1: every pair is compared set with set.
  for a, b, similarity in zip(*found[:3], strict=True):
    assert truth[a, b] == pytest.approx(similarity)
  together = [found.group[i] == found.group[j] for i, j in truth]
  assert len(truth) > 60
  assert np.mean(together) >= 0.99


def test_groups_join_pairs_and_nothing_else():
  found = near_duplicates.find_near_duplicates(
    text_hashing.split(planted(seed=9)), n=3, threshold=0.8
  )
  links = {(a, found.group[a]) for a in range(len(found.group))}
  assert all(found.group[first] == first for _, first in links)
  linked = set(found.first.tolist()) | set(found.second.tolist())
  sizes = np.bincount(found.group, minlength=len(found.group))
  assert linked == set(np.flatnonzero(sizes[found.group] > 1).tolist())


def test_a_large_bucket_of_copies_is_one_group():
  texts = ["one two three four five six"] * 3000 + ["", "", "seven eight"]
  found = near_duplicates.find_near_duplicates(
    text_hashing.split(texts), n=3, threshold=0.8
  )
  assert set(found.group[:3000]) == {0}
  assert found.group[3000:].tolist() == [3000, 3001, 3002]
  assert (
    len(
      near_duplicates.find_near_duplicates(
        text_hashing.split([]), n=3, threshold=0.8
      ).group
    )
    == 0
  )


def test_boilerplate_does_not_make_rows_alike():
  """Rows share a long preamble and differ in the five words that count."""
  rng = np.random.default_rng(0)
  preamble = " ".join(f"rule{i}" for i in range(60))
  ask = lambda: " ".join(f"w{i}" for i in rng.integers(0, 10_000, 5))
  texts = [f"{preamble} {ask()}" for _ in range(300)]
  texts += texts[:5]
  made = text_hashing.split(texts)
  assert (
    len(
      set(near_duplicates.find_near_duplicates(made, n=2, threshold=0.8).group)
    )
    < 10
  )
  common = near_duplicates.boilerplate(made, n=2)
  found = near_duplicates.find_near_duplicates(
    made, n=2, threshold=0.8, ignored=common
  )
  assert len(set(found.group)) == 300
  assert found.group[300:].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_near_duplicates_of_gpteacher():
  rows = json.loads((SHARED / "gpteacher_codegen.json").read_text())
  texts = ["\n".join(map(str, row.values())) for row in rows]
  found = near_duplicates.find_near_duplicates(
    text_hashing.split(texts), n=3, threshold=0.8
  )
  sizes = np.bincount(found.group, minlength=len(texts))
  assert (sizes[found.group] > 1).sum() >= 40
  for a, b in zip(found.first[:10], found.second[:10], strict=True):
    assert texts[a] != texts[b]
