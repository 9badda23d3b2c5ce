"""The stream: layout, conservation, and one integer that resumes it."""

import itertools
import json
import threading
import time
from collections import Counter

import numpy as np
import pytest

from fake_store import fake_store, random_store
from sft_jax.batch import Batch
from sft_jax.data.encode import Example
from sft_jax.data.pipeline import Stream, lay_out

T = 32


def _example(tokens, weights):
  return Example(np.array(tokens, np.int32), np.array(weights, np.float32))


def _equal(a, b):
  return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _documents(batch):
  """Brute force: every document of a batch as (tokens, loss_weights)."""
  found = []
  for row in range(len(batch.tokens)):
    for segment in range(1, batch.segment_ids[row].max() + 1):
      slots = np.flatnonzero(batch.segment_ids[row] == segment)
      tokens = batch.tokens[row, slots]
      assert batch.positions[row, slots].tolist() == list(range(len(slots)))
      assert batch.targets[row, slots].tolist() == [*tokens[1:], 0]
      weights = batch.loss_weights[row, slots]
      assert weights[-1] == 0
      found.append((tuple(tokens.tolist()), (0.0, *weights[:-1].tolist())))
  return found


def _stored(store, ids):
  examples = [store.example(i) for i in ids]
  return [
    (tuple(e.tokens.tolist()), tuple(e.loss_weights.tolist())) for e in examples
  ]


def test_layout_is_the_table_of_batch():
  row = lay_out(
    [_example([10, 11, 12], [0, 0, 1]), _example([20, 21, 22], [0, 1, 1])], 8
  )
  expected = Batch(
    tokens=np.array([[10, 11, 12, 20, 21, 22, 0, 0]]),
    targets=np.array([[11, 12, 0, 21, 22, 0, 0, 0]]),
    loss_weights=np.array([[0, 1, 0, 1, 1, 0, 0, 0]]),
    segment_ids=np.array([[1, 1, 1, 2, 2, 2, 0, 0]]),
    positions=np.array([[0, 1, 2, 0, 1, 2, 0, 0]]),
  )
  assert _equal(row, expected)
  assert [x.dtype.name for x in row] == [
    "int32",
    "int32",
    "float32",
    "int32",
    "int32",
  ]


def test_normalize_by_example():
  row = lay_out(
    [_example([1, 2, 3], [0, 1, 1]), _example([4, 5], [0, 0.25])],
    5,
    normalize="example",
  )
  assert row.loss_weights.tolist() == [[0.5, 0.5, 0, 1, 0]]


@pytest.mark.parametrize("packing", [True, False])
def test_one_epoch_is_every_row_once(packing):
  store = random_store(101, longest=T)
  stream = Stream(
    store, seq_len=T, batch_size=4, seed=1, packing=packing, epochs=1
  )
  batches = list(stream.batches())
  assert len(batches) == stream.num_steps
  found = [document for batch in batches for document in _documents(batch)]
  assert Counter(found) == Counter(_stored(store, range(101)))

  tokens = sum(int((b.segment_ids > 0).sum()) for b in batches)
  trained = sum(int((b.loss_weights > 0).sum()) for b in batches)
  epoch = stream.ledger.epoch
  assert (epoch.tokens_trained, epoch.tokens_prompt) == (
    trained,
    tokens - trained,
  )
  # The ledger counts packs; the last batch is filled up with empty rows.
  rows = sum(int((b.segment_ids.max(axis=1) > 0).sum()) for b in batches)
  assert (epoch.packs, epoch.tokens_padding) == (rows, rows * T - tokens)
  assert stream.fill == tokens / (rows * T)
  stream.ledger.check()


def test_epochs_join_without_a_gap():
  store = random_store(50, longest=T)
  stream = Stream(store, seq_len=T, batch_size=4, epochs=3)
  packs = stream.ledger.epoch.packs
  assert packs % 4, "the seed should leave a remainder to carry over"
  assert stream.num_steps == -(-3 * packs // 4)
  batches = list(stream.batches())
  for batch in batches[:-1]:
    assert (batch.segment_ids.max(axis=1) > 0).all()
  found = Counter(d for batch in batches for d in _documents(batch))
  assert set(found.values()) == {3}
  assert len(found) == 50


def test_neighbours_change_with_the_epoch():
  store = random_store(200, longest=8)
  stream = Stream(store, seq_len=T, batch_size=1, epochs=2)
  packs = stream.ledger.epoch.packs
  first, second = (
    {
      pair
      for step in range(epoch * packs, (epoch + 1) * packs)
      for rows in stream.rows_of(step)
      for pair in itertools.combinations(sorted(rows), 2)
    }
    for epoch in range(2)
  )
  assert len(first & second) < 0.2 * len(first)


@pytest.mark.parametrize("epochs", [2, None])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_same_global_batches_on_any_processes_from_any_step(processes, epochs):
  store = random_store(40, longest=T)

  def stream():
    return Stream(store, seq_len=T, batch_size=4, seed=3, epochs=epochs)

  whole = list(itertools.islice(stream().batches(), 9))
  for start in (0, 1, 7):
    parts = [
      itertools.islice(
        stream().batches(start, p, processes), len(whole) - start
      )
      for p in range(processes)
    ]
    joined = [
      Batch._make(map(np.concatenate, zip(*blocks, strict=True)))
      for blocks in zip(*parts, strict=True)
    ]
    assert len(joined) == len(whole) - start
    assert all(_equal(a, b) for a, b in zip(joined, whole[start:], strict=True))


def test_counted_stream_ends_and_endless_does_not():
  store = random_store(10, longest=T)
  counted = Stream(store, seq_len=T, batch_size=2, epochs=1)
  assert list(counted.batches(counted.num_steps)) == []
  endless = Stream(store, seq_len=T, batch_size=2)
  assert endless.num_steps is None
  first, again = (next(endless.batches(10**6)) for _ in range(2))
  assert _equal(first, again)
  assert (first.segment_ids.max(axis=1) > 0).all()


def test_rows_of_a_step_replay_it():
  store = random_store(30, longest=T)
  stream = Stream(store, seq_len=T, batch_size=3, epochs=1)
  for step, batch in enumerate(stream.batches()):
    rows = stream.rows_of(step)
    assert len(rows) == 3
    ids = [i for row in rows for i in row]
    assert _documents(batch) == _stored(store, ids)
    assert all(store.place(i) == f"rows.jsonl:{i + 1}" for i in ids)


def test_mixture_weights():
  source = [0] * 20 + [1] * 20 + [2] * 20
  store = random_store(60, longest=8, source=source, weights=(1.0, 2.0, 1.25))
  stream = Stream(store, seq_len=8, batch_size=1, packing=False, epochs=4)
  packs = stream.ledger.epoch.packs
  assert packs == 20 + 40 + 25
  assert stream.num_steps == 4 * packs
  chosen = []
  for epoch in range(4):
    steps = range(epoch * packs, (epoch + 1) * packs)
    times = Counter(stream.rows_of(step)[0][0] for step in steps)
    assert [times[i] for i in range(40)] == [1] * 20 + [2] * 20
    assert {times[i] for i in range(40, 60)} == {1, 2}
    chosen.append(frozenset(i for i in range(40, 60) if times[i] == 2))
  assert {len(rows) for rows in chosen} == {5}
  assert len(set(chosen)) > 1, "a random share is drawn anew each epoch"


def test_reading_threads_stop_with_the_reader():
  store = random_store(10, longest=T)
  before = threading.active_count()
  batches = Stream(store, seq_len=T, batch_size=2).batches()
  next(batches)
  assert threading.active_count() > before
  del batches
  for _ in range(100):
    if threading.active_count() == before:
      return
    time.sleep(0.05)
  raise AssertionError(f"{threading.active_count() - before} threads left")


def test_fingerprint_is_of_everything_that_decides_a_batch():
  store = random_store(10, longest=T)
  base = {"seq_len": T, "batch_size": 2, "seed": 0}
  changes = [
    {"seq_len": T + 1},
    {"batch_size": 4},
    {"seed": 1},
    {"packing": False},
    {"normalize": "example"},
  ]
  prints = {Stream(store, **(base | c)).fingerprint for c in [{}, *changes]}
  heavier = random_store(10, longest=T, weights=(2.0,))
  other = random_store(10, longest=T, seed=1)
  prints |= {Stream(s, **base).fingerprint for s in (heavier, other)}
  assert len(prints) == len(changes) + 3
  assert Stream(store, **base, epochs=2).fingerprint in prints


def test_order_is_pinned():
  """A change here changes what a resumed run sees: raise ORDER_VERSION."""
  store = random_store(12, longest=16)
  stream = Stream(store, seq_len=T, batch_size=2, seed=5)
  order = [stream.rows_of(step) for step in (0, 3)]
  assert json.dumps(order) == "[[[9], [5, 0, 8]], [[1, 4, 10], [5, 0, 8]]]"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"batch_size": 0}, "batch_size 0"),
    ({"epochs": 0}, "epochs 0"),
    ({"normalize": "row"}, "loss.normalize"),
    ({"seq_len": 4}, "expected 1 to 4"),
  ],
)
def test_bad_arguments(arguments, message):
  store = random_store(10, longest=T)
  with pytest.raises(ValueError, match=message):
    Stream(store, **({"seq_len": T, "batch_size": 2} | arguments))


def test_batch_that_processes_cannot_share():
  stream = Stream(random_store(10, longest=T), seq_len=T, batch_size=4)
  with pytest.raises(ValueError, match="process 1 of 3"):
    stream.batches(0, 1, 3)


def test_empty_store():
  with pytest.raises(ValueError, match="no rows"):
    Stream(fake_store([]), seq_len=T, batch_size=2)
