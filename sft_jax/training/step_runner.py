"""Steps: taken on the device, a few ahead of what the host knows of them."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.checkpointing import row_chain
from sft_jax.common import compile_cache, flops
from sft_jax.common.batch import Batch
from sft_jax.reporting import metrics
from sft_jax.step.train_step import TrainState
from sft_jax.training import bad_steps


def lower(train_step: Any, state: Any, batch: Any) -> jax.stages.Lowered:
  """The program of a run's step, not yet compiled; the state is donated.

  Args:
    train_step: of `train_step.make_train_step`.
    state: arrays, or their shapes and shardings.
    batch: likewise.
  """

  def step(state: Any, batch: Any, limit: Any, left: Any):
    state, pairs, left = bad_steps.guarded(train_step)(
      state, batch, limit, left
    )
    with jax.named_scope("row_chain"):
      rows = row_chain.digest_rows(batch)
    return state, pairs, rows, left

  limit, left = np.float32(np.inf), np.int32(0)
  return jax.jit(step, donate_argnums=0).lower(state, batch, limit, left)


class Steps:
  """A state, and the steps that change it.

  Attributes:
    state: after the steps taken; once halted, before the bad step.
    number: of steps taken.
    halted: the bad step that ends the run, or None.
    chain: see `row_chain`; up to the last record.
    found: the compiled step was on disk; see `compile_cache`.
    program: what it needs of a device.
  """

  def __init__(
    self,
    train_step: Any,
    state: TrainState,
    batch: Batch,
    *,
    judge: bad_steps.Judge,
    chain: str,
    on_skip: Callable[[bad_steps.Bad], None],
  ):
    """Compiles the step for batches like this one; donates every state.

    Args:
      train_step: of `train_step.make_train_step`.
      state: to start from.
      batch: the first.
      judge: of what a bad step is.
      chain: of the rows before.
      on_skip: told of steps that are left out.
    """
    self.state, self.number = state, int(state.step)
    self.halted: bad_steps.Bad | None = None
    self.chain = chain
    self._judge, self._on_skip = judge, on_skip
    self._left = jnp.asarray(judge.left, jnp.int32)
    self._in_flight = collections.deque()
    self._window = metrics.Window()
    self._rows: list[Any] = []

    self._step, self.found = compile_cache.compiled(
      lower(train_step, state, batch)
    )
    self.program = flops.program(self._step)

  def take(self, batch: Batch) -> None:
    """Hands a step to the device.

    The host runs ahead of the device, but not far: work in flight holds
    batches, and on fake CPU devices too much of it deadlocks.
    """
    limit = np.float32(self._judge.limit(self.number + 1))
    self.state, pairs, rows, self._left = self._step(
      self.state, batch, limit, self._left
    )
    self.number += 1
    self._in_flight.append((self.number, pairs, rows))
    if len(self._in_flight) > bad_steps.IN_FLIGHT:
      self._settle()

  @property
  def under_way(self) -> Any:
    """Arrays that the newest step makes; none once halted."""
    return self._in_flight[-1][1] if self._in_flight else ()

  def record(self) -> dict[str, Any]:
    """The means of the steps since the last record; waits for the device."""
    while self._in_flight:
      self._settle()
    self.chain = row_chain.extend(self.chain, jax.device_get(self._rows))
    self._rows = []
    return {**self._window.take(), "data/chain": self.chain}

  def _settle(self) -> None:
    """Learns how the oldest step in flight went."""
    number, pairs, rows = self._in_flight.popleft()
    bad = self._judge.look(number, pairs)
    if bad and bad.halts:
      self.halted = bad
      self._in_flight.clear()  # None of them was applied.
      self.number = number - 1
      count = jax.device_put(
        np.asarray(self.number, np.int32), self.state.step.sharding
      )
      self.state = self.state._replace(step=count)
      return
    self._rows.append(rows)
    if bad:
      self._on_skip(bad)
    else:
      self._window.add(pairs)
