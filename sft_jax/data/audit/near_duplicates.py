"""Near duplicates among many texts: MinHash finds them, Jaccard verifies.

A text is the set of its shingles (runs of n words). Two sets of similarity
J = |A & B| / |A | B| have the same minimum under a random hash with
probability J (Broder 1997). With b bands of r minima each, a pair becomes a
candidate when one band agrees, with probability 1 - (1 - J^r)^b:

    J         0.3     0.5     0.7     0.8     0.9
    found     0.01    0.27    0.92    0.998   1 - 1e-7      b = 20, r = 6

Candidates are compared set with set, so no pair is reported that is not one.
Band keys are on disk; one band at a time is in memory.
"""

import tempfile
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt64

from sft_jax.data.audit import text_hashing as words_lib
from sft_jax.data.audit.text_hashing import Words

BANDS, ROWS = 20, 6
# Of a bucket, each text is compared with this many after it. What one band
# misses in a large bucket, the others find.
_NEIGHBOURS = 4
_WORDS = 1 << 16  # hashed together: they fit a core's cache
_PAIRS = 1 << 21  # words of pairs compared together
_SEED = 0x5F7A
# Boilerplate is in more rows than both of these.
_COMMON_ROWS, _COMMON_SHARE = 50, 0.02
_TABLE_BITS = 22


class Pairs(NamedTuple):
  # Text numbers, first < second.
  first: Int64[np.ndarray, " pairs"]
  second: Int64[np.ndarray, " pairs"]
  similarity: Float64[np.ndarray, " pairs"]  # Jaccard of their shingles.
  # Of every text, the smallest number of the texts that it is linked to by
  # pairs; its own where there is none.
  group: Int64[np.ndarray, " texts"]


class _Shingles(NamedTuple):
  """The shingles of texts, made when asked for."""

  words: Words
  n: int
  ignored: Bool[np.ndarray, " slots"] | None
  among: Bool[np.ndarray, " texts"] | None

  def runs(self, texts: Int64[np.ndarray, " some"]) -> Words:
    """Those of some texts, repeated where they are; none if not among them."""
    made = words_lib.shingles(words_lib.take(self.words, texts), self.n)
    kept = np.ones(len(made.hashes), bool)
    if self.ignored is not None:
      kept &= ~self.ignored[words_lib.slot(made.hashes, _TABLE_BITS)]
    if self.among is not None:
      kept &= np.repeat(self.among[texts], made.counts)
    counted = np.concatenate([[0], np.cumsum(kept)])
    return Words(made.hashes[kept], counted[made.starts])


def boilerplate(
  words: Words, *, n: int, among: Bool[np.ndarray, " texts"] | None = None
) -> Bool[np.ndarray, " slots"]:
  """Runs of n words that stand in so many texts that they tell none apart.

  A table by the hashes' first bits, as `find_near_duplicates` ignores: tool
  descriptions or instructions shared by many rows do not count.
  """
  sets = _Shingles(words, n, None, among)
  seen = np.zeros(1 << _TABLE_BITS, np.int64)
  for some in words_lib.batches(words.counts, _PAIRS):
    runs = sets.runs(np.arange(some.start, some.stop))
    # A text counts once for a run that it repeats.
    owner = np.repeat(np.arange(len(runs.counts)), runs.counts)
    slots = words_lib.slot(runs.hashes, _TABLE_BITS)
    once = np.unique((owner << _TABLE_BITS) | slots)
    seen += np.bincount(once & (len(seen) - 1), minlength=len(seen))
  total = len(words.counts) if among is None else among.sum()
  return seen > max(_COMMON_ROWS, _COMMON_SHARE * total)


def find_near_duplicates(
  words: Words,
  *,
  n: int,
  threshold: float,
  ignored: Bool[np.ndarray, " slots"] | None = None,
  among: Bool[np.ndarray, " texts"] | None = None,
) -> Pairs:
  """Pairs of texts whose shingles have a Jaccard of at least `threshold`.

  Texts that others link already are not compared again: not every pair is
  listed, but `group` joins them all. A text without words, or of nothing but
  `ignored` ones (see `boilerplate`), has no pair. `among` are the texts to look
  at. `n` words are a shingle, and `threshold` is above 0 and at most 1. A word
  changed in the middle of m words leaves a Jaccard of (m - 2n + 1) / (m + 1).
  """
  sets = _Shingles(words, n, ignored, among)
  group = np.arange(len(words.counts))
  found = [(group[:0], group[:0], np.empty(0))]
  with tempfile.TemporaryFile() as file:
    for keys in _band_keys(sets, file):
      for a, b in _candidates(keys):
        similarity = np.zeros(len(a))
        sizes = words.counts[a] + words.counts[b]
        for some in words_lib.batches(sizes, _PAIRS):
          # Others of this bucket may have linked them by now.
          open_ = np.flatnonzero(group[a[some]] != group[b[some]]) + some.start
          similarity[open_] = _jaccard(sets, a[open_], b[open_])
          near = open_[similarity[open_] >= threshold]
          _link(group, a[near], b[near])
          found.append((a[near], b[near], similarity[near]))
  first, second, similarity = map(np.concatenate, zip(*found, strict=True))
  return Pairs(first, second, similarity, group)


def _jaccard(
  sets: _Shingles,
  first: Int64[np.ndarray, " pairs"],
  second: Int64[np.ndarray, " pairs"],
) -> Float64[np.ndarray, " pairs"]:
  """Jaccard of pairs of texts; of two without shingles, 0."""
  texts, place = np.unique(np.concatenate([first, second]), return_inverse=True)
  some = words_lib.sets(sets.runs(texts))
  left = words_lib.take(some, place[: len(first)])
  right = words_lib.take(some, place[len(first) :])
  pairs = np.arange(len(first))
  owner = [np.repeat(pairs, side.counts) for side in (left, right)]
  owner = np.concatenate(owner)
  hashes = np.concatenate([left.hashes, right.hashes])
  order = np.lexsort((hashes, owner))
  hashes, owner = hashes[order], owner[order]
  # A set holds each hash once: twice means both sets hold it.
  twice = (hashes[1:] == hashes[:-1]) & (owner[1:] == owner[:-1])
  shared = np.bincount(owner[1:][twice], minlength=len(pairs))
  return shared / np.maximum(left.counts + right.counts - shared, 1)


def _band_keys(
  sets: _Shingles, file: IO[bytes]
) -> Iterator[UInt64[np.ndarray, " texts"]]:
  """For each band, a key of each text; 0 for a text without shingles."""
  counts = sets.words.counts
  total = len(counts)
  if not total:
    return
  rng = np.random.default_rng(_SEED)
  flips, factors = rng.integers(0, 1 << 64, (2, BANDS, ROWS), np.uint64)
  file.truncate(BANDS * total * 8)
  keys = np.memmap(file, np.uint64, shape=(BANDS, total))
  for some in words_lib.batches(counts, _WORDS):
    runs = sets.runs(np.arange(some.start, some.stop))
    filled = np.flatnonzero(runs.counts)
    if not len(filled):
      continue
    begin = runs.starts[:-1][filled]
    for band in range(BANDS):
      key = np.zeros(len(filled), np.uint64)
      for flip, factor in zip(flips[band], factors[band], strict=True):
        # The shingle is well mixed: an odd factor is a new order.
        hashes = (runs.hashes ^ flip) * (factor | np.uint64(1))
        key = words_lib.mix(key + np.minimum.reduceat(hashes, begin))
      keys[band, filled + some.start] = key
  yield from keys


def _candidates(
  keys: UInt64[np.ndarray, " texts"],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Pairs (first, second) of texts with the same key, if they have one."""
  order = np.argsort(keys, kind="stable")
  order = order[keys[order] > 0]
  keys = keys[order]
  for apart in range(1, _NEIGHBOURS + 1):
    same = np.flatnonzero(keys[apart:] == keys[:-apart])
    yield order[same], order[same + apart]


def _link(
  group: Int64[np.ndarray, " texts"],
  first: Int64[np.ndarray, " pairs"],
  second: Int64[np.ndarray, " pairs"],
) -> None:
  """Joins the groups of each pair; a group is named by its smallest text."""
  while (group[first] != group[second]).any():
    low = np.minimum(group[first], group[second])
    np.minimum.at(group, group[first], low)
    np.minimum.at(group, group[second], low)
    while ((above := group[group]) != group).any():
      group[:] = above
