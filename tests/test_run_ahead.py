"""The host runs ahead: no step waits for it, and the next batch is there.

The device of these tests is stubborn: it is done with a step only once the
host has handed it more. A host that waited for the step in between would wait
for ever, whatever call it waited in; here until the device's patience ends.
"""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import sft_jax
import tiny
from sft_jax import bad_steps, loop, sharding, steps

STEPS, EVERY, PATIENCE = 11, 4, 20.0


class Device:
  """Holds back the end of each step until it is given what is next.

  Attributes:
    steps: handed to it so far.
    batches: put on it so far.
    waits: what each step was held back for, [(step, steps, batches)].
    in_vain: the step at which its patience ended; None if it never did.
  """

  def __init__(self):
    self.steps = self.batches = 0
    self.waits: list[tuple[int, int, int]] = []
    self.in_vain: int | None = None
    self._given = threading.Condition()

  def count(self, name: str, function):
    """The function, each call of which, once back, is counted."""

    def counted(*arguments):
      made = function(*arguments)
      with self._given:
        setattr(self, name, getattr(self, name) + 1)
        self._given.notify_all()
      return made

    return counted

  def hold(self, number: np.ndarray) -> np.ndarray:
    """Runs on the device's own thread, within step `number`."""
    step = int(number)
    # A record takes the figures of all steps up to its own, so there the host
    # may wait; the batch after it must be there nevertheless.
    record = min(-(-step // EVERY) * EVERY, STEPS)
    ahead = min(step + bad_steps.IN_FLIGHT, record)
    batches = min(step + bad_steps.IN_FLIGHT, record + 1, STEPS)
    there = lambda: self.steps >= ahead and self.batches >= batches
    with self._given:
      self.waits.append((step, ahead, batches))
      if self.in_vain is None and not self._given.wait_for(there, PATIENCE):
        self.in_vain = step
    return number


@pytest.fixture
def device(monkeypatch) -> Device:
  """What the steps of a run are taken on."""
  device, guarded = Device(), bad_steps.guarded

  def stubborn(train_step):
    def step(*arguments):
      state, *others = guarded(train_step)(*arguments)
      number = io_callback(
        device.hold, jax.ShapeDtypeStruct((), jnp.int32), state.step
      )
      return (state._replace(step=number), *others)

    return step

  class Counted(steps.Steps):
    def __init__(self, *arguments, **named):
      super().__init__(*arguments, **named)
      self._step = device.count("steps", self._step)

  monkeypatch.setattr(bad_steps, "guarded", stubborn)
  monkeypatch.setattr(loop, "Steps", Counted)
  monkeypatch.setattr(
    sharding, "put_rows", device.count("batches", sharding.put_rows)
  )
  return device


@pytest.mark.parametrize("watched", [False, True])
def test_no_step_waits_for_the_host(tmp_path, device, watched):
  """Also where the losses of earlier steps are a yardstick for the next."""
  config = tiny.config(
    tmp_path,
    tiny.model_folder(tmp_path / "model"),
    tiny.rows_file(tmp_path / "rows.jsonl"),
    steps=STEPS,
    log__every=EVERY,
    checkpoint__every=0,
    faults__spike_factor=9.0 if watched else 0.0,
    export=False,
  )
  sft_jax.train(config)
  assert device.in_vain is None, (
    f"the host waited for step {device.in_vain} before it gave the device "
    "another step, or the batch of one"
  )
  assert [step for step, _, _ in device.waits] == list(range(1, STEPS + 1))
  # Two steps ahead, but for the last before a record.
  assert [ahead - step for step, ahead, _ in device.waits[:4]] == [2, 2, 1, 0]
  assert device.batches == device.steps == STEPS
