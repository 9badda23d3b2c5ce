"""Pipeline: a store of examples as an endless or counted stream of batches.

Epoch after epoch, the rows are packed again and the packs follow end to end:

    epoch 0: p p p p p | epoch 1: p p p p p | ...     p = one pack = one row
    step 0   step 1    step 2     step 3              of a batch (here of 3)

so step k is packs `k * batch_size` onward, whatever came before: nothing is
dropped at an epoch's end, and one integer resumes the stream (Law 4). Every
process computes the same plan and renders its own rows.
"""

import dataclasses
import functools
import hashlib
import json
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int64

from sft_jax.common.batch import Batch
from sft_jax.data import packing as packer
from sft_jax.data.encoding.encode import Example
from sft_jax.data.store.stats import DatasetStats, EpochStats, Mixed
from sft_jax.data.store.store import Store

# Part of the fingerprint; a test pins the order of a small stream. Raise it
# when that order changes, so that an old run is not resumed on other data.
ORDER_VERSION = 1

# Steps of a stream without end: more than can be trained, less than the
# number of packs that overflows a 64-bit index.
_ENDLESS = 1 << 40

_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


class Consumed(NamedTuple):
  """What a number of steps took of the data."""

  epochs: float  # 1.5 is halfway through the second pass.
  rows: int  # Documents, as often as they were seen.


class Stream:
  """Batches as a pure function of (store, arguments, step).

  A source seen 2.5 times per epoch gives every row twice, and a random half
  of its rows, drawn again each epoch, once more.

  Attributes:
    num_steps: the last one filled up with empty rows; None has no end.
    fingerprint: of `fingerprint_inputs`; the same give the same batches.
    stats: the store's stats with the slots of the first epoch.
  """

  def __init__(
    self,
    store: Store,
    *,
    seq_len: int,
    batch_size: int,
    seed: int = 0,
    packing: bool = True,
    epochs: int | None = None,
    normalize: str = "token",
    pairs: bool = False,
  ):
    """Plans the first epoch; reads lengths, not tokens.

    Args:
      seq_len, batch_size: T, slots of a row, and B, rows of a global batch.
      packing: False gives every document a row of its own.
      epochs: passes over the data; None never ends.
      normalize: 'token' leaves weights as encoded; 'example' divides each
        document's by their sum, so that long answers count no more.
      pairs: see `packing.pack_row`.

    Raises ValueError: an empty store, a row longer than `seq_len`, or arguments
    out of range.
    """
    if not len(store.lengths):
      raise ValueError(
        "data: got no rows, expected at least one. Read the stats for why."
      )
    if batch_size < 1 or (epochs is not None and epochs < 1):
      raise ValueError(
        f"stream: got batch_size {batch_size} and epochs {epochs}, expected "
        "1 or more of each. For a stream without end set epochs to None."
      )
    if normalize not in ("token", "example"):
      raise ValueError(
        f"loss.normalize: got {normalize!r}, expected 'token' or 'example'. "
        "Set it to one of these."
      )
    self.store, self.seq_len, self.batch_size = store, seq_len, batch_size
    self._seed, self._packing, self._normalize = seed, packing, normalize
    self._pairs = pairs
    self._lock = threading.RLock()
    self._plan = functools.lru_cache(maxsize=2)(self._make_plan)
    self._patterns = functools.lru_cache(maxsize=1)(self._find_patterns)
    numbers = np.bincount(store.source, minlength=len(store.sources))
    # Rows that an epoch takes of each source: whole copies, and some more.
    self._taken = []
    for one, copies, number in zip(
      store.sources, store.copies, numbers.tolist(), strict=True
    ):
      if number and copies * number < 0.5:
        raise ValueError(
          f"data source {one.label}: got {copies:.3g} times its {number} rows "
          "in an epoch, expected one row or more. Raise its repeat or share, "
          "or leave it out."
        )
      self._taken.append(
        divmod(round(copies * number), number) if number else (0, 0)
      )
    self._rows_per_epoch = len(self._ids(0))
    # With whole copies all epochs have the same rows, in other packs.
    self._whole = not any(more for _, more in self._taken)
    scales = np.array([float(source.loss_weight) for source in store.sources])
    self._scales = scales[store.source]
    if store.weights is not None:
      self._scales *= store.weights
    self._packs_of_first = int(self._patterns(0).packs.sum())
    self._first_packs = [0]  # of each epoch, counted from the run's start
    self.stats = self._account()
    self._num_packs = None if epochs is None else self._first_pack(epochs)
    self.num_steps = None
    if self._num_packs is not None:
      self.num_steps = -(-self._num_packs // batch_size)
    self.fingerprint_inputs = {
      "order of rows": ORDER_VERSION,
      "examples": store.fingerprint,
      "seed": seed,
      "batch_size": batch_size,
      "data.seq_len": seq_len,
      "data.packing": packing,
      "loss.normalize": normalize,
      **store.fingerprint_inputs,
      **({"teacher": store.teacher.fingerprint} if store.teacher else {}),
    }
    for number, source in enumerate(store.sources, 1):
      mixed = {"repeat": float(source.repeat), "share": source.share}
      mixed["loss_weight"] = float(source.loss_weight)
      before = store.fingerprint_inputs.get(f"source {number}", {})
      self.fingerprint_inputs[f"source {number}"] = before | mixed
    text = json.dumps(self.fingerprint_inputs, sort_keys=True)
    self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

  @property
  def fill(self) -> float:
    """Share of the first epoch's slots that hold a token."""
    assert self.stats.epoch
    return self.stats.epoch.fill

  @property
  def steps_per_epoch(self) -> float:
    """Length of the first epoch; others differ with fractional repeats."""
    return self._first_pack(1) / self.batch_size

  def batches(
    self,
    start_step: int = 0,
    rows: Sequence[int] | Int64[np.ndarray, " rows"] | None = None,
  ) -> Iterator[Batch]:
    """These rows of every batch from `start_step` on, as NumPy arrays.

    `rows` are numbers of rows of the global batch, those that this process's
    devices hold; None: all. They are read ahead on background threads, and what
    is not asked for is not read.
    """
    wanted = np.arange(self.batch_size) if rows is None else np.asarray(rows)
    if not len(wanted) or not np.isin(wanted, range(self.batch_size)).all():
      raise ValueError(
        f"batches: got rows {wanted.tolist()}, expected some of the "
        f"{self.batch_size} rows of a batch. Ask for rows from 0 on."
      )
    block = len(wanted)
    steps = _ENDLESS if self.num_steps is None else self.num_steps

    def row(i: int) -> Batch:
      step, row = divmod(i, block)
      ids = self._pack(step * self.batch_size + int(wanted[row]))
      return self.row(ids, [self.store.example(int(k)) for k in ids])

    dataset = grain.MapDataset.range(steps * block).map(row)
    dataset = dataset.batch(block, batch_fn=packer.stack_rows)[start_step:]
    return iter(dataset.to_iter_dataset(_READ))

  def row(
    self, ids: Int64[np.ndarray, " documents"], examples: Sequence[Example]
  ) -> Batch:
    """The examples of these ids, or what stands in their places, as a row."""
    teacher = self.store.teacher
    return packer.pack_row(
      examples,
      self.seq_len,
      normalize=self._normalize,
      scales=self._scales[ids].tolist(),
      sources=self.store.source[ids].tolist(),
      pairs=self._pairs,
      teachers=[self.store.taught(int(k)) for k in ids] if teacher else (),
      top=teacher.top if teacher else 0,
    )

  def rows_of(self, step: int) -> list[list[int]]:
    """Ids of examples in each row of a step's batch; see `store.place`."""
    first = step * self.batch_size
    return [self._pack(first + i).tolist() for i in range(self.batch_size)]

  def consumed(self, steps: int) -> Consumed:
    """What the first so many steps take; as the stream, a pure function."""
    packs = steps * self.batch_size
    if self._num_packs is not None:
      packs = min(packs, self._num_packs)
    with self._lock:
      epoch, index = self._locate(packs)
      rows, part = epoch * self._rows_per_epoch, 0.0
      if index:  # Of an epoch that has not begun there is no plan yet.
        plan = self._plan(epoch)
        rows += int(plan.starts[index])
        part = index / plan.num_packs
    return Consumed(epoch + part, rows)

  def _pack(self, number: int) -> Int64[np.ndarray, " documents"]:
    """Row ids of a pack, counted from the start of the run; none past it."""
    if self._num_packs is not None and number >= self._num_packs:
      return np.empty(0, np.int64)
    with self._lock:  # read by several threads, planned by one
      epoch, index = self._locate(number)
      plan = self._plan(epoch)
    return plan.pack(index)

  def _first_pack(self, epoch: int) -> int:
    """Number of packs in the epochs before this one."""
    if self._whole:
      return epoch * self._packs_of_first
    firsts = self._first_packs
    while len(firsts) <= epoch:
      packs = self._patterns(len(firsts) - 1).packs
      firsts.append(firsts[-1] + int(packs.sum()))
    return firsts[epoch]

  def _locate(self, number: int) -> tuple[int, int]:
    """The epoch of a pack, and its number within it."""
    if self._whole:
      return divmod(number, self._first_pack(1))
    while self._first_packs[-1] <= number:
      self._first_pack(len(self._first_packs))
    epoch = bisect_right(self._first_packs, number) - 1
    return epoch, number - self._first_packs[epoch]

  def _ids(self, epoch: int) -> Int64[np.ndarray, " rows"]:
    """Row ids of an epoch, by source: whole copies, then a random share."""
    rng = np.random.default_rng((self._seed, epoch, 0))
    parts = []
    for source, (copies, more) in enumerate(self._taken):
      rows = np.flatnonzero(self.store.source == source)
      parts.append(np.tile(rows, copies))
      if more:
        parts.append(rng.permutation(rows)[:more])
    return np.concatenate(parts)

  def _find_patterns(self, epoch: int) -> packer.Patterns:
    lengths, packing = self.store.lengths[self._ids(epoch)], self._packing
    return packer.find_patterns(lengths, self.seq_len, packing=packing)

  def _make_plan(self, epoch: int) -> packer.Plan:
    ids = self._ids(epoch)
    patterns = self._patterns(0 if self._whole else epoch)
    seed = (self._seed, epoch, 1)
    plan = packer.assign_rows(self.store.lengths[ids], patterns, seed=seed)
    return plan._replace(rows=ids[plan.rows])

  def _account(self) -> DatasetStats:
    ids, store, packs = self._ids(0), self.store, self._first_pack(1)
    # Sums in float64 are exact up to 2**53 tokens.
    sums = lambda x: np.bincount(store.source[ids], x[ids], len(store.sources))
    tokens_of, trained_of = sums(store.lengths), sums(store.trained)
    tokens, trained = int(tokens_of.sum()), int(trained_of.sum())
    mixture = {
      source.label: Mixed(
        copies=store.copies[i],
        loss_weight=float(source.loss_weight),
        tokens=int(tokens_of[i]),
        share=float(tokens_of[i]) / tokens,
        trained_share=float(trained_of[i]) / trained,
      )
      for i, source in enumerate(store.sources)
    }
    slots = packs * self.seq_len
    counts = (tokens - trained, trained, slots - tokens)
    epoch = EpochStats(packs, slots, *counts, mixture=mixture)
    return dataclasses.replace(store.stats, epoch=epoch)
