"""Words as hashes agree with a plain loop over words."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.data.audit import text_hashing

LETTERS = "abAB 2+.\n\u00e9\u65e5\U0001f600"
TEXTS = st.lists(st.text(st.sampled_from(LETTERS), max_size=12), max_size=6)


def plain(text: str) -> list[str]:
  """The words of a text of LETTERS, letter by letter."""
  found, inside = [], False
  for letter in text.lower():
    alone = letter in "+\u65e5\U0001f600"
    if letter in ".\n ":
      inside = False
    elif alone or not inside:
      found.append(letter)
      inside = not alone
    else:
      found[-1] += letter
  return found


def ids(made: text_hashing.Words) -> list[list[int]]:
  return [made.of(i).tolist() for i in range(len(made.counts))]


@given(TEXTS)
@settings(max_examples=100, deadline=None)
def test_equal_words_and_only_those_have_equal_hashes(texts):
  made = text_hashing.split(texts)
  flat = [word for text in texts for word in plain(text)]
  assert made.counts.tolist() == [len(plain(text)) for text in texts]
  names = dict(zip(flat, made.hashes.tolist(), strict=True))
  assert made.hashes.tolist() == [names[word] for word in flat]
  assert len(set(names.values())) == len(names)


@given(TEXTS, st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_runs_shingles_sets_and_wholes(texts, n):
  made = text_hashing.split(texts)
  of = ids(made)
  plain_runs = [
    [tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in of
  ]
  plain_shingles = [
    runs or ([tuple(row)] if row else [])
    for row, runs in zip(of, plain_runs, strict=True)
  ]
  for got, want in (
    (text_hashing.runs(made, n), plain_runs),
    (text_hashing.shingles(made, n), plain_shingles),
  ):
    assert got.counts.tolist() == [len(row) for row in want]
    flat = [run for row in want for run in row]
    names = dict(zip(flat, got.hashes.tolist(), strict=True))
    assert got.hashes.tolist() == [names[run] for run in flat]
    assert len(set(names.values())) == len(names)
  assert ids(text_hashing.sets(made)) == [sorted(set(row)) for row in of]
  wholes = text_hashing.whole(made).tolist()
  same = [[a == b for b in wholes] for a in wholes]
  assert same == [[a == b for b in of] for a in of]
  order = np.random.default_rng(n).integers(0, max(len(of), 1), 5 * bool(of))
  assert ids(text_hashing.take(made, order)) == [of[i] for i in order]


def test_case_spacing_and_punctuation_are_not_words_but_signs_are():
  texts = ["What is 2 + 2?", "what IS\t2+2", "What is 2 - 2?", "What is 22?"]
  made = text_hashing.whole(text_hashing.split(texts))
  assert made[0] == made[1]
  assert len(set(made.tolist())) == 3


def test_hashes_are_the_same_in_every_process():
  assert text_hashing.split(["Law"]).hashes.tolist() == [0x4A71CC15D5BFA9FC]


def test_a_token_at_the_place_of_its_number_counts():
  texts = [[7, 5], [7, 5, 2], [], [0], [1, 0], [0, 1]]
  flat = np.concatenate(texts).astype(np.uint64)
  made = text_hashing.Words(
    text_hashing.mix(flat), np.cumsum([0, *map(len, texts)])
  )
  assert len(set(text_hashing.whole(made).tolist())) == len(texts)


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_batches_cover_all_in_order(limit):
  sizes = np.array([0, 2, 5, 0, 1, 9, 0])
  got = text_hashing.batches(sizes, limit)
  assert [i for some in got for i in range(some.start, some.stop)] == list(
    range(len(sizes))
  )
  assert text_hashing.batches(sizes[:0], limit) == []
