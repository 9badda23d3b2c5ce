"""Overlap of training rows with rows that are meant to measure them.

A held-out row overlaps when its prompt is a training row's, word for word, or
when much of it is in training rows, in runs of 13 words or tokens (Brown
et al. 2020, appendix C). As there, a run that many training rows have is the
template's and not the row's, and does not count.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, UInt64

from sft_jax.data.audit import text_hashing as words_lib
from sft_jax.data.audit import token_checks
from sft_jax.data.audit.text_hashing import Words
from sft_jax.data.store.store import Store

RUN = 13
# A run in more training rows than this is boilerplate.
COMMON = 10
# Of a row's runs; see docs/audit.md for what related and unrelated data have.
SHARE = 0.5
_FILTER_BITS = 24


class Rows(NamedTuple):
  """A batch of rows: their prompts, and all of their text."""

  prompts: Words
  texts: Words


class Overlap(NamedTuple):
  """What of each held-out row stands in training rows."""

  same_prompt: Bool[np.ndarray, " rows"]  # Its prompt is a training row's.
  # Of its runs of 13, those that a few training rows have; 0 for a row that is
  # shorter.
  share: Float64[np.ndarray, " rows"]

  @property
  def found(self) -> Bool[np.ndarray, " rows"]:
    return self.same_prompt | (self.share >= SHARE)


def find_overlap(train: Iterable[Rows], held_out: Iterable[Rows]) -> Overlap:
  """Compares held-out rows with training rows; reads each once.

  The runs of the held-out rows are kept in memory (8 bytes each), those of the
  training rows looked up by the batch. A row without a prompt is its text.
  """
  none = np.empty(0, np.uint64)
  prompts, runs, counts = [none], [none], [np.empty(0, np.int64)]
  for batch in held_out:
    prompts.append(_key(batch))
    made = words_lib.runs(batch.texts, RUN)
    runs.append(made.hashes)
    counts.append(made.counts)
  prompt, count = np.concatenate(prompts), np.concatenate(counts)
  known, which = np.unique(np.concatenate(runs), return_inverse=True)
  asked = np.unique(prompt)
  asked_again = np.zeros(len(asked), bool)
  seen = np.zeros(len(known), np.int64)
  # Most training runs are nowhere in held-out rows: a table says so fast.
  table = np.zeros(1 << _FILTER_BITS, bool)
  table[words_lib.slot(known, _FILTER_BITS)] = True
  for batch in train:
    asked_again[_find(asked, _key(batch))] = True
    hashes = words_lib.windows(batch.texts.hashes, RUN)
    at = np.flatnonzero(table[words_lib.slot(hashes, _FILTER_BITS)])
    starts = batch.texts.starts
    ends = starts[np.searchsorted(starts, at, "right")]
    np.add.at(seen, _find(known, hashes[at[at + RUN <= ends]]), 1)
  rare = (seen > 0) & (seen <= COMMON)
  owner = np.repeat(np.arange(len(count)), count)
  shared = np.bincount(owner[rare[which]], minlength=len(count))
  again = asked_again[np.searchsorted(asked, prompt)]
  return Overlap(again, shared / np.maximum(count, 1))


def of_store(store: Store) -> Iterator[Rows]:
  """Tokens in the place of words: a prompt is all that is not trained."""
  for documents in token_checks.batches(store):
    hashes = words_lib.mix(documents.tokens.astype(np.uint64))
    raw, starts = store.index["text"][documents.rows], documents.starts
    asked = (documents.weights == 0) & ~np.repeat(raw, np.diff(starts))
    counted = np.concatenate([[0], np.cumsum(asked)])
    prompts = Words(hashes[asked], counted[starts])
    yield Rows(prompts, Words(hashes, starts))


def _key(batch: Rows) -> UInt64[np.ndarray, " rows"]:
  """What two rows have in common when one gives the other away."""
  keys = words_lib.whole(batch.prompts)
  bare = np.flatnonzero(batch.prompts.counts == 0)
  keys[bare] = words_lib.whole(words_lib.take(batch.texts, bare))
  return keys


def _find(
  known: UInt64[np.ndarray, " known"], hashes: UInt64[np.ndarray, " n"]
) -> np.ndarray:
  """Positions in `known`, ascending, of those hashes that are there."""
  if not len(known):
    return np.empty(0, np.int64)
  at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
  return at[known[at] == hashes]
