"""The stream: conservation, and one integer that resumes it."""

import itertools
import json
import math
import threading
import time
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_store import fake_store, random_store
from sft_jax.data.packing import stack_rows
from sft_jax.data.pipeline import Stream
from sft_jax.data.sources import Source
from sft_jax.data.store.store import Store

T = 32


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
  epoch = stream.stats.epoch
  assert (epoch.tokens_trained, epoch.tokens_prompt) == (
    trained,
    tokens - trained,
  )
  # The ledger counts packs; the last batch is filled up with empty rows.
  rows = sum(int((b.segment_ids.max(axis=1) > 0).sum()) for b in batches)
  assert (epoch.packs, epoch.tokens_padding) == (rows, rows * T - tokens)
  assert stream.fill == tokens / (rows * T)
  stream.stats.check()


@pytest.mark.parametrize("copies", [1, 2.5])
@pytest.mark.parametrize("epochs", [2, None])
def test_what_was_consumed_is_what_the_batches_held(copies, epochs):
  """Rows counted in the batches; epochs end where their packs end."""
  store = random_store(60, longest=T, weights=(copies,))
  stream = Stream(store, seq_len=T, batch_size=4, seed=3, epochs=epochs)
  steps = stream.num_steps or 3 * math.ceil(stream.steps_per_epoch)
  seen = 0
  assert stream.consumed(0) == (0.0, 0)
  fresh = Stream(store, seq_len=T, batch_size=4, seed=3, epochs=epochs)
  for step, batch in enumerate(itertools.islice(stream.batches(), steps), 1):
    seen += len(_documents(batch))
    # As after a resume, and asked in any order.
    for one in (stream, fresh):
      assert one.consumed(step).rows == seen
    if seen == round(60 * copies):
      assert stream.consumed(step).epochs == 1.0
  assert all(
    a.epochs < b.epochs
    for a, b in itertools.pairwise(map(stream.consumed, range(steps)))
  )
  half = stream.stats.epoch.packs / 8
  assert stream.consumed(int(half)).epochs == pytest.approx(
    int(half) * 4 / stream.stats.epoch.packs
  )
  if epochs:
    assert stream.consumed(steps) == (2.0, round(120 * copies))


def test_epochs_join_without_a_gap():
  store = random_store(50, longest=T)
  stream = Stream(store, seq_len=T, batch_size=4, epochs=3)
  packs = stream.stats.epoch.packs
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
  packs = stream.stats.epoch.packs
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
      itertools.islice(stream().batches(start, block), len(whole) - start)
      for block in np.split(np.arange(4), processes)
    ]
    joined = [stack_rows(blocks) for blocks in zip(*parts, strict=True)]
    assert len(joined) == len(whole) - start
    assert all(_equal(a, b) for a, b in zip(joined, whole[start:], strict=True))


@settings(max_examples=8, deadline=None)
@given(
  numbers=st.lists(st.integers(2, 20), min_size=1, max_size=3),
  repeats=st.lists(st.sampled_from([1, 2, 0.3, 1.5]), min_size=3, max_size=3),
  start=st.integers(0, 12),
  processes=st.sampled_from([1, 2, 8]),
  seed=st.integers(0, 3),
)
def test_any_mixture_resumes_anywhere_on_any_processes(
  numbers, repeats, start, processes, seed
):
  """The stream is a pure function of (data, seed, step): Law 4."""
  source = [i for i, number in enumerate(numbers) for _ in range(number)]
  weights = tuple(repeats[: len(numbers)])
  store = random_store(len(source), longest=T, source=source, weights=weights)

  def stream():
    return Stream(store, seq_len=T, batch_size=8, seed=seed)

  steps = 2
  whole = list(itertools.islice(stream().batches(), start + steps))[start:]
  blocks = zip(
    *(
      stream().batches(start, block)
      for block in np.split(np.arange(8), processes)
    ),
    strict=True,
  )
  for step, batch, parts in zip(
    range(start, start + steps), whole, blocks, strict=False
  ):
    assert _equal(batch, stack_rows(parts))
    ids = [i for row in stream().rows_of(step) for i in row]
    assert _documents(batch) == _stored(store, ids)


def test_a_source_of_which_an_epoch_takes_no_row_is_refused():
  weights = (1, 1e-300)
  store = random_store(6, longest=T, source=[0, 0, 0, 1, 1, 1], weights=weights)
  with pytest.raises(ValueError, match="got 1e-300 times its 3 rows in an ep"):
    Stream(store, seq_len=T, batch_size=2)


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
  packs = stream.stats.epoch.packs
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


def test_the_weight_of_a_source_multiplies_that_of_its_tokens():
  sources = (Source("0.jsonl"), Source("1.jsonl", loss_weight=0.25))
  store = random_store(
    20, longest=8, source=[0] * 10 + [1] * 10, sources=sources
  )
  stream = Stream(store, seq_len=T, batch_size=4, epochs=1)
  found = [d for batch in stream.batches() for d in _documents(batch)]
  scale = {
    tokens: (1.0, 0.25)[i >= 10]
    for i, (tokens, _) in enumerate(_stored(store, range(20)))
  }
  plain = dict(_stored(store, range(20)))
  assert len(found) == 20
  for tokens, weights in found:
    assert weights == tuple(scale[tokens] * w for w in plain[tokens])


def test_reading_threads_stop_with_the_reader():
  store = random_store(10, longest=T)
  before = threading.active_count()
  batches = Stream(store, seq_len=T, batch_size=2).batches()
  next(batches)
  assert threading.active_count() > before
  del batches
  for _ in range(100):
    # Threads of tests before this one may end, too.
    if threading.active_count() <= before:
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


def test_only_the_rows_asked_for_are_read(monkeypatch):
  stream = Stream(random_store(30, longest=T), seq_len=T, batch_size=4, seed=1)
  whole = next(stream.batches())
  read, example = [], Store.example

  def watched(self, i):
    read.append(i)
    return example(self, i)

  monkeypatch.setattr(Store, "example", watched)
  some = next(stream.batches(0, [2, 0]))
  assert _equal(some, jax.tree.map(lambda x: x[[2, 0]], whole))
  # Read ahead, but of these rows only.
  rows = [stream.rows_of(step) for step in range(20)]
  assert set(read) <= {i for step in rows for r in (0, 2) for i in step[r]}


@pytest.mark.parametrize("rows", [[], [4], [-1]])
def test_rows_that_a_batch_has_not(rows):
  stream = Stream(random_store(10, longest=T), seq_len=T, batch_size=4)
  with pytest.raises(ValueError, match="batches: got rows"):
    stream.batches(0, rows)


def test_empty_store():
  with pytest.raises(ValueError, match="no rows"):
    Stream(fake_store([]), seq_len=T, batch_size=2)
