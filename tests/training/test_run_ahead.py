"""The host runs ahead: no step waits for it, and the next batch is there.

What the loop does is written down in the order in which it does it: steps
handed to the device, batches put on it, and figures of a step that are waited
for, in whatever way. Looking at an array always comes to one of two methods.
"""

import threading

import jax
import pytest

import sft_jax
import tiny
from sft_jax.common import sharding
from sft_jax.training import loop, step_runner

STEPS, EVERY = 11, 4


class Diary:
  """Attributes: events: [('step' | 'batch' | 'wait', number)], in order."""

  def __init__(self):
    self.events: list[tuple[str, int]] = []
    self._made: dict[int, tuple[int, jax.Array]] = {}

  def count(self, what: str) -> int:
    return sum(kind == what for kind, _ in self.events)

  def counted(self, what: str, function):
    """The function; each call of which is an event."""

    def call(*arguments):
      made, number = function(*arguments), self.count(what) + 1
      self.events.append((what, number))
      if what == "step":
        for x in jax.tree.leaves(made):
          self._made[id(x)] = (number, x)  # Held, so that ids stay theirs.
      return made

    return call

  def looked_at(self, array: jax.Array) -> None:
    """Of the loop's thread alone: others may wait."""
    number, _ = self._made.get(id(array), (0, None))
    if number and threading.current_thread() is threading.main_thread():
      self.events.append(("wait", number))


@pytest.fixture
def diary(monkeypatch) -> Diary:
  diary, array = Diary(), type(jax.numpy.zeros(()))
  value, block = array._value, jax.block_until_ready

  def look(self):
    diary.looked_at(self)
    return value.__get__(self)

  def wait(tree):
    for x in jax.tree.leaves(tree):
      diary.looked_at(x)
    return block(tree)

  class Counted(step_runner.StepRunner):
    def __init__(self, *arguments, **named):
      super().__init__(*arguments, **named)
      self._step = diary.counted("step", self._step)

  monkeypatch.setattr(array, "_value", property(look))
  monkeypatch.setattr(jax, "block_until_ready", wait)
  monkeypatch.setattr(loop, "StepRunner", Counted)
  monkeypatch.setattr(
    sharding, "put_rows", diary.counted("batch", sharding.put_rows)
  )
  return diary


@pytest.mark.parametrize("watched", [False, True])
def test_no_step_waits_for_the_host(tmp_path, diary, watched):
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
  assert diary.count("step") == diary.count("batch") == STEPS
  taken = put = waits = 0
  for what, number in diary.events:
    taken, put = taken + (what == "step"), put + (what == "batch")
    waits += what == "wait"
    if what == "wait" and number > taken - step_runner.IN_FLIGHT:
      # Of a step with fewer behind it: a record, which takes all up to its own.
      assert taken % EVERY == 0 or taken == STEPS, diary.events
      assert put == min(taken + 1, STEPS), diary.events
  assert waits >= STEPS  # Each step's loss is looked at, in the end.
