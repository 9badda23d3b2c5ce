"""Pipeline: a store of examples as an endless or counted stream of batches.

Epoch after epoch, the rows are packed anew and the packs are laid end to end:

    epoch 0: p p p p p | epoch 1: p p p p p | ...     p = one pack = one row
    step 0   step 1    step 2     step 3              of a batch (here of 3)

so step k is packs `k * batch_size` onward, whatever came before: nothing is
dropped at an epoch's end, and one integer resumes the stream (Law 4). Every
process computes the same plan and renders its own block of rows.
"""

import dataclasses
import functools
import hashlib
import json
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Int64

from sft_jax.batch import Batch
from sft_jax.data import packing as packer
from sft_jax.data.encode import Example
from sft_jax.data.ledger import EpochLedger, Ledger
from sft_jax.data.store import Store

# Part of the fingerprint; a test pins the order of a small stream. Raise it
# when that order changes, so that an old run is not resumed on other data.
ORDER_VERSION = 1

# Steps of a stream without end: more than can be trained, less than the
# number of packs that overflows a 64-bit index.
_ENDLESS = 1 << 40

_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


class Stream:
  """Batches as a pure function of (store, arguments, step).

  A source of weight w gives every row w times per epoch; a fractional part is
  a random share of its rows, drawn anew each epoch.

  Attributes:
    num_steps: steps until `epochs` are done, the last one filled up with
      empty rows of weight 0; None when `epochs` is.
    fingerprint: two streams with the same one give the same batches.
    ledger: the store's ledger with the slots of the first epoch.
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
  ):
    """Plans the first epoch; reads lengths, not tokens.

    Args:
      store: encoded rows, none longer than `seq_len`.
      seq_len: slots of a row, T.
      batch_size: rows of a global batch, B, over all processes.
      seed: decides order and neighbours.
      packing: False gives every document a row of its own.
      epochs: passes over the data; None never ends.
      normalize: 'token' leaves weights as encoded; 'example' divides each
        document's by their sum, so that long answers count no more.

    Raises:
      ValueError: an empty store, a row longer than `seq_len`, or arguments
        out of range.
    """
    if not len(store.lengths):
      raise ValueError(
        "data: got no rows, expected at least one. Read the ledger for why."
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
    self.store = store
    self.seq_len = seq_len
    self.batch_size = batch_size
    self._seed = seed
    self._packing = packing
    self._normalize = normalize
    self._lock = threading.RLock()
    self._plan = functools.lru_cache(maxsize=2)(self._make_plan)
    self._patterns = functools.lru_cache(maxsize=1)(self._find_patterns)
    # With whole weights all epochs have the same rows, dealt differently.
    self._whole = not any(weight % 1 for weight in store.weights)
    self._first_packs = [0]  # of each epoch, counted from the run's start
    self.ledger = self._account()
    self._num_packs = None if epochs is None else self._first_pack(epochs)
    self.num_steps = None
    if self._num_packs is not None:
      self.num_steps = -(-self._num_packs // batch_size)
    self.fingerprint = hashlib.sha256(
      json.dumps(
        {
          "order": ORDER_VERSION,
          "store": store.fingerprint,
          "weights": list(map(float, store.weights)),
          "seq_len": seq_len,
          "batch_size": batch_size,
          "seed": seed,
          "packing": packing,
          "normalize": normalize,
        },
        sort_keys=True,
      ).encode()
    ).hexdigest()

  @property
  def fill(self) -> float:
    """Share of the first epoch's slots that hold a token."""
    assert self.ledger.epoch
    return self.ledger.epoch.fill

  @property
  def steps_per_epoch(self) -> float:
    """Length of the first epoch; others differ with fractional weights."""
    return self._first_pack(1) / self.batch_size

  def batches(
    self, start_step: int = 0, process_index: int = 0, process_count: int = 1
  ) -> Iterator[Batch]:
    """This process's rows of every batch from `start_step` on.

    Rows are read ahead on background threads. Starting late costs nothing.

    Args:
      start_step: the first step wanted.
      process_index: this process's place among `process_count`, which share
        a global batch in contiguous blocks.
      process_count: number of processes; divides `batch_size`.

    Returns:
      Iterator of NumPy batches with B = batch_size / process_count.
    """
    if self.batch_size % process_count or process_index >= process_count:
      raise ValueError(
        f"batches of process {process_index} of {process_count}: got "
        f"batch_size {self.batch_size}, expected a multiple of the number of "
        "processes. Change batch_size."
      )
    block = self.batch_size // process_count
    steps = _ENDLESS if self.num_steps is None else self.num_steps

    def row(i: int) -> Batch:
      step, row = divmod(i, block)
      ids = self._pack(step * self.batch_size + process_index * block + row)
      return lay_out(
        [self.store.example(int(k)) for k in ids],
        self.seq_len,
        normalize=self._normalize,
      )

    dataset = grain.MapDataset.range(steps * block).map(row)
    dataset = dataset.batch(block, batch_fn=_stack)[start_step:]
    return iter(dataset.to_iter_dataset(_READ))

  def rows_of(self, step: int) -> list[list[int]]:
    """Ids of the store's examples in each row of the global batch of a step.

    `store.place(id)` says where in its file an example comes from.
    """
    first = step * self.batch_size
    return [self._pack(first + i).tolist() for i in range(self.batch_size)]

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
      return epoch * int(self._patterns(0).packs.sum())
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
    for source, weight in enumerate(self.store.weights):
      rows = np.flatnonzero(self.store.source == source)
      parts.append(np.tile(rows, int(weight)))
      if fraction := weight % 1:
        share = max(1, round(fraction * len(rows)))
        parts.append(rng.permutation(rows)[:share])
    return np.concatenate(parts)

  def _find_patterns(self, epoch: int) -> packer.Patterns:
    return packer.find_patterns(
      self.store.lengths[self._ids(epoch)],
      self.seq_len,
      packing=self._packing,
    )

  def _make_plan(self, epoch: int) -> packer.Plan:
    ids = self._ids(epoch)
    patterns = self._patterns(0 if self._whole else epoch)
    seed = (self._seed, epoch, 1)
    plan = packer.deal(self.store.lengths[ids], patterns, seed=seed)
    return plan._replace(rows=ids[plan.rows])

  def _account(self) -> Ledger:
    ids = self._ids(0)
    tokens = int(self.store.lengths[ids].sum(dtype=np.int64))
    trained = int(self.store.trained[ids].sum(dtype=np.int64))
    packs = self._first_pack(1)
    epoch = EpochLedger(
      packs=packs,
      slots=packs * self.seq_len,
      tokens_prompt=tokens - trained,
      tokens_trained=trained,
      tokens_padding=packs * self.seq_len - tokens,
    )
    return dataclasses.replace(self.store.ledger, epoch=epoch)


def lay_out(
  examples: Sequence[Example],
  seq_len: int,
  *,
  normalize: str = "token",
) -> Batch:
  """Lays documents into one row, B = 1; see `Batch` for the picture.

  The shift by one happens here and only here: a slot's target is the next
  token of its own document, so a document's last slot predicts nothing and
  no document is predicted from the one before it.
  """
  zeros = np.zeros((1, seq_len), np.int32)
  row = Batch(
    tokens=zeros,
    targets=zeros.copy(),
    loss_weights=zeros.astype(np.float32),
    segment_ids=zeros.copy(),
    positions=zeros.copy(),
  )
  start = 0
  for segment, example in enumerate(examples, 1):
    tokens, weights = example.tokens, example.loss_weights
    end = start + len(tokens)
    if normalize == "example":
      weights = weights / weights.sum()
    row.tokens[0, start:end] = tokens
    row.targets[0, start : end - 1] = tokens[1:]
    row.loss_weights[0, start : end - 1] = weights[1:]
    row.segment_ids[0, start:end] = segment
    row.positions[0, start:end] = np.arange(len(tokens))
    start = end
  return row


def _stack(rows: Sequence[Batch]) -> Batch:
  return Batch._make(map(np.concatenate, zip(*rows, strict=True)))
