"""Packing: which rows share a pack, and the arrays of a pack.

Only lengths matter to a packer, and a million rows have a few thousand. So
`fill_packs` finds *patterns* (the lengths of a pack, and how many packs look
like that) without the rows, in milliseconds; `assign_rows` gives each row a
random slot of its length, every epoch another, in a few vectorized passes.

    lengths  = [3, 5, 3, 5, 8], capacity 8
    patterns = (8) x 1, (5 3) x 2
    plan     = rows [1 2 | 4 | 3 0], starts [0, 2, 3, 5]

`pack_row` makes a row of a `Batch`: only there are targets shifted by one.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int64

from sft_jax.common.batch import Batch
from sft_jax.data.encoding.encode import Example

# How many lengths `_next_length` tries. Chosen on real rows (GSM8K, Alpaca,
# T0, GPTeacher): 16 leaves up to 0.5 % more padding, and 256 gains nothing.
_TRIED = 64
# Rows of `padded_batches` are as long as a multiple of this many slots, so
# that there are few programs to compile.
_MULTIPLE = 64


class Patterns(NamedTuple):
  """Kinds of packs: lengths[starts[p]:starts[p + 1]], packs[p] times."""

  lengths: Int64[np.ndarray, " slots"]
  starts: Int64[np.ndarray, " patterns+1"]
  packs: Int64[np.ndarray, " patterns"]


class Plan(NamedTuple):
  """Packs of row ids, each once: pack p is rows[starts[p]:starts[p + 1]]."""

  rows: Int64[np.ndarray, " rows"]
  starts: Int64[np.ndarray, " packs+1"]

  @property
  def num_packs(self) -> int:
    return len(self.starts) - 1

  def pack(self, index: int) -> Int64[np.ndarray, " documents"]:
    return self.rows[self.starts[index] : self.starts[index + 1]]


def plan(
  lengths: Int[np.ndarray, " rows"],
  capacity: int,
  *,
  seed: int | Sequence[int],
  packing: bool = True,
) -> Plan:
  """Assigns rows of 1 to `capacity` tokens to packs, each row once.

  The seed decides neighbors and the order of packs, never their number; without
  packing every row has a pack of its own.

  Raises ValueError: a row that fits no pack, by its id.
  """
  patterns = find_patterns(lengths, capacity, packing=packing)
  return assign_rows(lengths, patterns, seed=seed)


def find_patterns(
  lengths: Int[np.ndarray, " rows"], capacity: int, *, packing: bool = True
) -> Patterns:
  """Checks the lengths and decides how packs are filled; see `plan`."""
  unfit = np.flatnonzero((lengths < 1) | (lengths > capacity))
  if len(unfit):
    row = int(unfit[0])
    raise ValueError(
      f"packing row {row}: got {int(lengths[row])} tokens, expected 1 to "
      f"{capacity} ({len(unfit)} such rows). Raise data.seq_len, or let "
      "data.over_long drop or truncate long rows."
    )
  histogram = np.bincount(lengths, minlength=capacity + 1)
  if packing:
    return fill_packs(histogram, capacity)
  sizes = np.flatnonzero(histogram).astype(np.int64)  # One document per pack.
  packs = histogram[sizes].astype(np.int64)
  return Patterns(sizes, np.arange(len(sizes) + 1), packs)


def fill_packs(histogram: Int[np.ndarray, " sizes"], capacity: int) -> Patterns:
  """Fills packs one kind at a time: a long one, middling ones, a good end.

  What is long is hard to place later; but were all long ones taken first, the
  last packs would be of short ones, too much alike to add up to the capacity.
  A pattern is repeated while there are documents for it, so the cost depends
  on the number of distinct lengths.
  """
  counts = histogram.tolist()
  live = np.flatnonzero(histogram).tolist()

  def take(length: int, number: int) -> None:
    counts[length] -= number
    if not counts[length]:
      del live[bisect_left(live, length)]

  found: list[tuple[Counter[int], int]] = []
  while live:
    pattern: Counter[int] = Counter()
    free, length = capacity, live[-1]
    while length:
      take(length, 1)
      pattern[length] += 1
      free -= length
      length = _next_length(counts, live, free)
    more = min(counts[length] // k for length, k in pattern.items())
    if more:
      for length, k in pattern.items():
        take(length, more * k)
    found.append((pattern, 1 + more))
  return Patterns(
    lengths=np.array([n for p, _ in found for n in p.elements()], np.int64),
    starts=_starts([p.total() for p, _ in found]),
    packs=np.array([packs for _, packs in found], np.int64),
  )


def _next_length(counts: list[int], live: list[int], free: int) -> int:
  """The length that should come next in a pack with `free` slots; 0: none fits.

  Where there is room for any three, a middling one. Near the end, the one that
  with the best one after it leaves the least free; of equals the longest.
  (Best-fit-decreasing strands space too small for any document.)

  `counts` are documents left, by length; `live` the lengths of some, ascending.
  """
  if live and free >= 3 * live[-1]:
    return live[len(live) // 2]
  last = bisect_right(live, free) - 1
  best, choice = 0, 0
  for i in range(last, max(last - _TRIED, -1), -1):
    length = live[i]
    j = bisect_right(live, free - length) - 1
    if j == i and counts[length] < 2:
      j -= 1
    total = length + (live[j] if j >= 0 else 0)
    if total > best:
      best, choice = total, length
    # Nothing can be better: the space is full, or it is so large that even
    # the two longest fit.
    if total == free or free - length >= live[last]:
      break
  return choice


def assign_rows(
  lengths: Int[np.ndarray, " rows"],
  patterns: Patterns,
  *,
  seed: int | Sequence[int],
) -> Plan:
  """Gives each row a random slot of its length, in packs of random order."""
  rng = np.random.default_rng(seed)
  num_patterns = len(patterns.packs)
  kind = rng.permutation(np.repeat(np.arange(num_patterns), patterns.packs))
  sizes = np.diff(patterns.starts)[kind]
  starts = _starts(sizes)
  offsets = np.repeat(patterns.starts[:-1][kind] - starts[:-1], sizes)
  slots = patterns.lengths[offsets + np.arange(len(lengths))]

  # Sorted by length, shuffled rows and slots correspond one to one. NumPy sorts
  # 16-bit keys by radix, several times faster than wider ones.
  key = np.uint16 if slots.max(initial=0) < 2**16 else np.int64
  shuffled = rng.permutation(len(lengths))
  by_length = np.argsort(lengths[shuffled].astype(key), kind="stable")
  rows = np.empty(len(lengths), np.int64)
  rows[np.argsort(slots.astype(key), kind="stable")] = shuffled[by_length]
  return Plan(rows, starts)


def _starts(sizes: Sequence[int] | np.ndarray) -> Int64[np.ndarray, " n"]:
  """[3, 5] -> [0, 3, 8]."""
  starts = np.zeros(len(sizes) + 1, np.int64)
  np.cumsum(sizes, out=starts[1:])
  return starts


def pack_row(
  examples: Sequence[Example],
  seq_len: int,
  *,
  normalize: str = "token",
  scales: Sequence[float] = (),
  sources: Sequence[int] = (),
  pairs: bool = False,
  teachers: Sequence[tuple[np.ndarray, np.ndarray]] = (),
  top: int = 0,
) -> Batch:
  """The Examples of one pack as one row, B = 1; see `Batch` for the picture.

  A slot's target is the next token of its own document: a document's last slot
  predicts nothing, and none is predicted from the one before it.

  Args:
    normalize: see `pipeline.Stream`.
    scales, sources: each document's factor of weights, and source; 1 and 0.
    pairs: gives Example k the segments 2k - 1, its better side, and 2k, its
      rejected one.
    teachers: of each document, ids and log-probabilities [n, top] of its n
      trained tokens; of pairs, a reference's [2, 1] of the two sides, which go
      to a side's first slot. See `store.teacher.Kept`.
  """
  int32, uint8, float32 = np.int32, np.uint8, np.float32
  dtypes = (int32, int32, float32, int32, int32, uint8, int32)
  row = Batch(*(np.zeros((1, seq_len), dtype) for dtype in dtypes))
  if top:
    shape = (1, seq_len, top)
    row = row._replace(
      teacher_ids=np.zeros(shape, int32), teacher_logps=np.zeros(shape, float32)
    )
  assert row.roles is not None
  assert row.sources is not None
  start = 0
  for number, example in enumerate(examples, 1):
    weights = example.loss_weights
    if normalize == "example":
      weights = weights / weights.sum()
    if scales:
      weights = weights * np.float32(scales[number - 1])
    better = len(weights) - example.rejected
    for side, own in enumerate((slice(better), slice(better, None))):
      tokens = example.tokens[own]
      end = start + len(tokens)
      if start == end:
        continue
      row.tokens[0, start:end] = tokens
      row.targets[0, start : end - 1] = tokens[1:]
      row.loss_weights[0, start : end - 1] = weights[own][1:]
      segment = 2 * number - 1 + side if pairs else number
      row.segment_ids[0, start:end] = segment
      row.positions[0, start:end] = np.arange(len(tokens))
      row.roles[0, start : end - 1] = example.roles[own][1:]
      if row.teacher_ids is not None and row.teacher_logps is not None:
        ids, logps = teachers[number - 1]
        if pairs:
          row.teacher_logps[0, start] = logps[side]
        else:
          at = start - 1 + np.flatnonzero(example.loss_weights)
          row.teacher_ids[0, at], row.teacher_logps[0, at] = ids, logps
      if sources:
        row.sources[0, start:end] = sources[number - 1]
      start = end
  return row


def stack_rows(rows: Sequence[Batch]) -> Batch:
  return Batch._make(
    None if arrays[0] is None else np.concatenate(arrays)
    for arrays in zip(*rows, strict=True)
  )


def padded_batches(examples: Sequence[Example], size: int) -> list[Batch]:
  """One example a row, `size` rows a batch, the last filled up with empty ones.

  Rows are as long as the longest of their batch, in multiples of 64.
  """
  batches = []
  for at in range(0, len(examples), size):
    rows = [[one] for one in examples[at : at + size]]
    longest = max(len(one.tokens) for (one,) in rows)
    seq_len = -(-longest // _MULTIPLE) * _MULTIPLE
    rows += [[]] * (size - len(rows))
    batches.append(stack_rows([pack_row(row, seq_len) for row in rows]))
  return batches
