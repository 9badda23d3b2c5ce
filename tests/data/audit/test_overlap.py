"""Overlap of held-out rows with training rows, by a plain look at each."""

import numpy as np
import pytest

from sft_jax.data.audit import overlap, text_hashing
from sft_jax.data.audit.overlap import COMMON, RUN


def _words(texts):
  flat = np.array([word for text in texts for word in text], np.uint64)
  return text_hashing.Words(
    text_hashing.mix(flat), np.cumsum([0, *map(len, texts)])
  )


def _batches(rows, size):
  for i in range(0, len(rows), size):
    prompts, texts = zip(*rows[i : i + size], strict=True)
    yield overlap.Rows(_words(prompts), _words(texts))


def _runs(text):
  return [tuple(text[i : i + RUN]) for i in range(len(text) - RUN + 1)]


def _plain(train, held_out):
  """(same prompt, share) of each held-out row, run by run."""
  asked = {prompt or text for prompt, text in train}
  number = {}
  for _, text in train:
    for run in _runs(text):
      number[run] = number.get(run, 0) + 1
  for prompt, text in held_out:
    runs = _runs(text)
    shared = sum(0 < number.get(run, 0) <= COMMON for run in runs)
    yield (prompt or text) in asked, shared / max(len(runs), 1)


def _rows(rng, number):
  """(prompt, text) of pieces that rows share, some of them in most rows."""
  pieces = [tuple(rng.integers(0, 50, n)) for n in (5, 14, 20, 30, 3, 13)]
  common = tuple(range(100, 120))
  made = []
  for _ in range(number):
    some = [pieces[i] for i in rng.integers(0, len(pieces), rng.integers(4))]
    text = sum(some, ()) + tuple(rng.integers(0, 50, rng.integers(20)))
    text += common * int(rng.integers(2))
    made.append((text[: rng.integers(0, 12)], text))
  return made


@pytest.mark.parametrize(("seed", "size"), [(0, 1), (1, 7), (2, 100)])
def test_prompts_and_shares(seed, size):
  rng = np.random.default_rng(seed)
  rows = _rows(rng, 60)
  train, held_out = rows[:40], rows[40:]
  found = overlap.find_overlap(_batches(train, size), _batches(held_out, 3))
  same_prompt, share = zip(*_plain(train, held_out), strict=True)
  assert found.same_prompt.tolist() == list(same_prompt)
  assert found.share.tolist() == pytest.approx(list(share))
  # The rows are such that each of these happens.
  assert 0 < sum(same_prompt) < 20
  assert 0 < sum(share) < 20
  assert found.found.tolist() == [
    same or part >= overlap.SHARE
    for same, part in zip(same_prompt, share, strict=True)
  ]


def test_of_no_rows():
  row = [((1,), (1, 2))]
  assert not overlap.find_overlap([], _batches(row, 1)).found.any()
  assert not len(overlap.find_overlap(_batches(row, 1), []).found)
