"""Bad steps: the run halts before them, or goes on as if they never were."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from sft_jax.common.batch import Batch
from sft_jax.step.loss import LossSums
from sft_jax.step.train_step import init_state, make_train_step
from sft_jax.training.step_runner import SpikeDetector, StepRunner

NAN = float("nan")


def loss_fn(params, batch) -> LossSums:
  """Least squares, with tokens for targets: smooth, and quick to compile."""
  wrong = params["w"][batch.positions] - batch.tokens
  weights = batch.loss_weights
  return tiny.loss_sums((weights * wrong**2).sum(), weights.sum())


def make_batch(seed: int, weight: float = 1.0, scale: int = 1) -> Batch:
  tokens = np.random.default_rng(seed).integers(0, 9, (1, 2, 4)).astype("i4")
  ones = np.ones((1, 2, 4), np.int32)
  return Batch(
    tokens=tokens * scale,
    targets=ones,
    loss_weights=np.full((1, 2, 4), weight, "f4"),
    segment_ids=ones,
    positions=np.tile(np.arange(4, dtype=np.int32), (1, 2, 1)),
  )


def make_steps(skip_limit: int = 0, factor: float = 0.0):
  tx = optax.adam(0.1)
  state = init_state({"w": jnp.zeros(4)}, lambda path: True, tx)
  detector = SpikeDetector(
    spike_factor=factor, skip_limit=skip_limit, losses=[], skipped=0
  )
  left_out = []
  steps = StepRunner(
    make_train_step(loss_fn, tx, optax.constant_schedule(0.1)),
    state,
    make_batch(0),
    detector=detector,
    chain="",
    on_skip=left_out.append,
  )
  return steps, detector, left_out


def take(steps: StepRunner, batches, every: int = 4):
  """Takes steps as the loop does, with a record at every few of them."""
  records = []
  for i, batch in enumerate(batches, 1):
    steps.submit(batch)
    if i % every == 0 or i == len(batches) or steps.halted:
      records.append(steps.collect())
    if steps.halted:
      break
  return records


def same(a, b) -> bool:
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: (x == y).all(), a, b)))


GOOD = [make_batch(seed) for seed in range(6)]


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_skipped_batch_might_never_have_been(at, every):
  plain, _, none = make_steps()
  take(plain, GOOD)
  steps, detector, left_out = make_steps(skip_limit=1)
  records = take(steps, [*GOOD[:at], make_batch(9, NAN), *GOOD[at:]], every)
  assert same(steps.state.params, plain.state.params)
  assert same(steps.state.opt_state, plain.state.opt_state)
  assert int(steps.state.step) == 7
  assert [bad.step for bad in left_out] == [at + 1]
  assert none == []
  assert detector.skipped == 1
  trained = sum(record["loss/trained_weight"] for record in records)
  assert trained == 8 * len(GOOD)


@pytest.mark.parametrize("every", [1, 3, 9])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_halting_leaves_the_state_before_the_bad_step(at, every):
  plain, _, _ = make_steps()
  take(plain, GOOD[:at])
  steps, _, _ = make_steps()
  take(steps, [*GOOD[:at], make_batch(9, NAN), *GOOD[at:]], every)
  assert steps.halted is not None
  assert (steps.halted.step, steps.number) == (at + 1, at)
  assert same(steps.state, plain.state)
  assert steps.chain == plain.chain


def test_more_bad_steps_than_may_be_left_out_halt():
  nan = make_batch(9, NAN)
  plain, _, _ = make_steps()
  take(plain, GOOD[:2])
  steps, _, left_out = make_steps(skip_limit=2)
  take(steps, [GOOD[0], nan, GOOD[1], nan, nan, *GOOD[2:]])
  assert steps.halted is not None
  assert steps.halted.step == 5
  assert [bad.step for bad in left_out] == [2, 4]
  assert same(steps.state.params, plain.state.params)


@pytest.mark.parametrize("every", [1, 5, 100])
def test_a_spike_is_measured_by_the_median_before_it(every):
  calm = [make_batch(seed) for seed in range(14)]
  plain, _, _ = make_steps()
  take(plain, calm)
  steps, detector, left_out = make_steps(skip_limit=1, factor=3.0)
  take(steps, [*calm[:12], make_batch(3, scale=9), *calm[12:]], every)
  assert [bad.step for bad in left_out] == [13]
  assert "3 x the running median" in left_out[0].reason
  assert same(steps.state.params, plain.state.params)
  # The yardstick holds the steps that were known by then, whatever `every`.
  losses = dict(detector.losses)
  assert 13 not in losses
  known = [loss for step, loss in losses.items() if step < 13 - 2]
  assert detector.limit(13) == pytest.approx(3 * np.median(known))


def test_no_spike_before_there_is_a_yardstick():
  steps, _, _ = make_steps(factor=1.5)
  take(steps, [*GOOD[:5], make_batch(3, scale=9)])
  assert steps.halted is None
