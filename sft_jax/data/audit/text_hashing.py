"""Texts as 64-bit hashes of their words, many texts at a time.

Two texts with the same words say the same: case, spacing and punctuation are
not words, signs of arithmetic are. Scripts without spaces are read letter by
letter. Nothing loops over words in Python.

    'What is 2 + 2?'     what | is | 2 | + | 2
    'two   twos'         two | twos
"""

import functools
import itertools
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8, UInt64

_SEPARATOR, _IN_WORD, _ALONE = 0, 1, 2
# Signs that change what is asked ('5 + 3', '5 - 3'), among the ASCII ones.
_SIGNS = "+-*/=<>%^"
_FACTOR, _ALL = 0x9E3779B97F4A7C15, (1 << 64) - 1
_BATCH = 1 << 20  # words hashed together
# First and last code point of scripts written without spaces: Thai to
# Myanmar, Khmer, kana to CJK ideographs, and their compatibility forms.
_UNSPACED = ((0x0E00, 0x109F), (0x1780, 0x17FF), (0x3040, 0x9FFF),
             (0xF900, 0xFAFF))  # fmt: skip


class Words(NamedTuple):
  """Hashes of the words of many texts, back to back."""

  hashes: UInt64[np.ndarray, " words"]  # One per word.
  # Text i is `hashes[starts[i]:starts[i + 1]]`.
  starts: Int64[np.ndarray, " texts+1"]

  @property
  def counts(self) -> Int64[np.ndarray, " texts"]:
    return np.diff(self.starts)

  def of(self, text: int) -> UInt64[np.ndarray, " words"]:
    return self.hashes[self.starts[text] : self.starts[text + 1]]


def split(texts: Sequence[str]) -> Words:
  normal = functools.partial(unicodedata.normalize, "NFKC")
  plain = [x.lower() if x.isascii() else normal(x).casefold() for x in texts]
  starts = _starts([len(text) + 1 for text in plain])
  data = "\n".join([*plain, ""]).encode("utf-32-le", "surrogatepass")
  points = np.frombuffer(data, np.uint32)
  kinds = _kinds()[np.minimum(points, 0xFFFF)]
  before = np.zeros_like(kinds)
  before[1:] = kinds[:-1]
  begins = (kinds == _ALONE) | ((kinds == _IN_WORD) & (before != _IN_WORD))
  first = np.flatnonzero(begins)
  inside = np.flatnonzero(kinds != _SEPARATOR)
  word = np.cumsum(begins)[inside] - 1
  offset = (inside - first[word]).astype(np.uint64)
  letters = mix((offset << np.uint64(32)) + points[inside])
  begin = np.searchsorted(inside, first)
  hashes = np.add.reduceat(letters, begin) if len(begin) else letters
  return Words(mix(hashes), np.searchsorted(first, starts))


def _starts(counts: Sequence[int] | np.ndarray) -> Int64[np.ndarray, " edges"]:
  """[3, 5] -> [0, 3, 8]."""
  return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def take(words: Words, texts: Int64[np.ndarray, " some"]) -> Words:
  """The words of some of the texts, in the order asked for."""
  counts = words.counts[texts]
  starts = _starts(counts)
  shift = np.repeat(words.starts[texts] - starts[:-1], counts)
  return Words(words.hashes[shift + np.arange(len(shift))], starts)


def join(parts: Sequence[Words]) -> Words:
  """Text i is text i of the first part, of the second, and so on."""
  owner = [np.repeat(np.arange(len(p.counts)), p.counts) for p in parts]
  order = np.argsort(np.concatenate(owner), kind="stable")
  hashes = np.concatenate([part.hashes for part in parts])[order]
  return Words(hashes, np.sum([part.starts for part in parts], axis=0))


def sets(words: Words) -> Words:
  """Each text's different words, in ascending order of their hashes."""
  owner = np.repeat(np.arange(len(words.counts)), words.counts)
  order = np.lexsort((words.hashes, owner))
  hashes, owner = words.hashes[order], owner[order]
  new = np.ones(len(hashes), bool)
  new[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
  counts = np.bincount(owner[new], minlength=len(words.starts) - 1)
  return Words(hashes[new], _starts(counts))


def batches(sizes: Int64[np.ndarray, " items"], limit: int) -> list[slice]:
  """Cuts items into runs of about `limit` in total, at least one in each."""
  total = np.cumsum(sizes)
  most = total[-1] if len(total) else 0
  cuts = np.searchsorted(total, np.arange(limit, most + limit, limit))
  edges = np.unique(np.concatenate([[0], cuts, [len(sizes)]]))
  return [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def shingles(words: Words, n: int) -> Words:
  """Every run of n words of each text, as a hash; a shorter text as one run:
  [a b c d] by 3 is [abc bcd], [a b] is [ab]."""
  counts, place = words.counts, _place(words)
  size = np.repeat(counts, counts)
  begins = (place + n <= size) | (place == 0)
  at, length = np.flatnonzero(begins), np.minimum(size[begins], n)
  hashes = np.zeros(len(at), np.uint64)
  for i in range(n):
    here = i < length
    hashes[here] = mix(hashes[here] * np.uint64(3) + words.hashes[at[here] + i])
  return Words(hashes, np.searchsorted(at, words.starts))


def runs(words: Words, n: int) -> Words:
  """Every run of n words of each text, as a hash; shorter texts have none."""
  counts = np.maximum(words.counts - n + 1, 0)
  starts = _starts(counts)
  inside = np.repeat(words.starts[:-1] - starts[:-1], counts)
  found = windows(words.hashes, n)
  return Words(found[inside + np.arange(len(inside))], starts)


def windows(
  hashes: UInt64[np.ndarray, " words"], n: int
) -> UInt64[np.ndarray, " windows"]:
  """Every n neighbors as a hash, whatever texts they belong to.

  A polynomial in an odd number, modulo 2**64: runs of 13 are put together
  from those of 8, 4 and 1, as 13 = 8 + 4 + 1.
  """
  total = max(len(hashes) - n + 1, 0)
  power, size, done = hashes, 1, 0
  found, factor = np.zeros(total, np.uint64), _FACTOR
  while done < n:
    if n & size:
      found *= np.uint64(factor)
      found += power[done : done + total]
      done += size
    if done < n:
      power = power[:-size] * np.uint64(factor) + power[size:]
      factor = (factor * factor) & _ALL
      size *= 2
  return found


def whole(words: Words) -> UInt64[np.ndarray, " texts"]:
  """A hash of each text: equal for texts with the same words in order."""
  found = [np.empty(0, np.uint64)]
  for some in batches(words.counts, _BATCH):
    here = take(words, np.arange(some.start, some.stop))
    # Words may be mixed token ids: a place must not look like any of them, or
    # it and the token of its number would cancel.
    place = _place(here).astype(np.uint64) + np.uint64(1 << 40)
    sums = np.zeros(len(place) + 1, np.uint64)  # Modulo 2**64.
    np.cumsum(mix(here.hashes ^ mix(place)), out=sums[1:])
    found.append(np.diff(sums[here.starts]))
  return np.concatenate(found)


def edge(words: Words, n: int, end: bool) -> UInt64[np.ndarray, " texts"]:
  """A hash of each text's first or last n words; 0 of a text with no more."""
  begin = words.starts[1:] - n if end else words.starts[:-1]
  found = np.zeros(len(begin), np.uint64)
  long = words.counts > n
  at = begin[long]
  for i in range(n):
    found[long] = mix(found[long] * np.uint64(3) + words.hashes[at + i])
  return found


def mix(values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
  """SplitMix64's finalizer (Steele et al. 2014): spreads bits over 64."""
  values = values ^ (values >> np.uint64(30))
  values *= np.uint64(0xBF58476D1CE4E5B9)
  values ^= values >> np.uint64(27)
  values *= np.uint64(0x94D049BB133111EB)
  values ^= values >> np.uint64(31)
  return values


def slot(
  hashes: UInt64[np.ndarray, " n"], bits: int
) -> Int64[np.ndarray, " n"]:
  """Places in a table of 2**bits, by the hashes' first bits."""
  return (hashes >> np.uint64(64 - bits)).astype(np.int64)


def _place(words: Words) -> Int64[np.ndarray, " words"]:
  """Position of each word in its text, from 0."""
  first = np.repeat(words.starts[:-1], words.counts)
  return np.arange(len(words.hashes)) - first


@functools.cache
def _kinds() -> UInt8[np.ndarray, " points"]:
  """What each code point below 65,536 is; those above are words alone."""
  made = np.zeros(1 << 16, np.uint8)
  for point in range(1 << 16):
    character = chr(point)
    category = unicodedata.category(character)
    if category[0] in "LNM" or character == "_":
      made[point] = _IN_WORD
    elif category in ("Sm", "Sc", "So") or character in _SIGNS:
      made[point] = _ALONE
  for low, high in _UNSPACED:
    made[low : high + 1][made[low : high + 1] > 0] = _ALONE
  made[-1] = _ALONE
  return made
