"""Runs training steps, a few ahead of what the host knows of their results.

A step itself refuses a bad batch (a loss that is not finite, or a spike):
parameters and optimizer state stay as they were, see
`train_step.make_train_step`. Here is how high a loss may be, and how many
steps may be skipped before the run halts.
"""

import collections
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.checkpointing import digests
from sft_jax.common import compile_cache, flops
from sft_jax.common.batch import Batch
from sft_jax.reporting import metrics
from sft_jax.step.train_step import TrainState

# Steps that the host runs ahead of the device. A loss is compared only with
# losses that are known whenever they are asked for, so that a resumed run, or
# one that logs more often, decides as the uninterrupted one does.
IN_FLIGHT = 2
_REMEMBERED = 64  # Losses whose median a new loss is compared with.
_ENOUGH = 8  # Fewer losses have no useful median.


class BadStep(NamedTuple):
  """A step that was not applied, and why; `halts`: the run ends here."""

  step: int
  reason: str
  halts: bool


class SpikeDetector:
  """Finds bad steps.

  Attributes:
    losses: [step, nats per token] of recent steps.
    skipped: steps skipped so far.
    skips_left: steps that may still be skipped.
  """

  def __init__(
    self,
    spike_factor: float,
    skip_limit: int,
    *,
    losses: list[list[float]],
    skipped: int,
  ):
    """Starts with the losses and skips of an interrupted run, if any.

    Args:
      spike_factor: a loss of more than this many running medians is bad;
        0 = no loss is too high.
      skip_limit: steps that may be skipped in all; 0 = none.
    """
    self._factor = spike_factor
    self.losses = list(losses)
    self.skipped = skipped
    self.skips_left = max(0, skip_limit - skipped)

  def limit(self, step: int) -> float:
    """The highest loss that step number `step` may have."""
    known = [x for at, x in self.losses if at < step - IN_FLIGHT]
    if not self._factor or len(known) < _ENOUGH:
      return float("inf")
    return self._factor * statistics.median(known[-_REMEMBERED:])

  def check(self, step: int, pairs: metrics.Pairs) -> BadStep | None:
    """What was wrong with a step, or None. Waits for the device."""
    names = ("optim/nonfinite", "optim/spike", "loss/nats_per_token")
    nonfinite, spike, loss = jax.device_get([pairs[name] for name in names])
    mean = float(loss[0]) / float(loss[1]) if loss[1] else 0.0
    if nonfinite[0] or spike[0]:
      reason = "the loss or its gradient is not finite"
      if spike[0]:
        reason = (
          f"the loss of {mean:.4g} nats per token is more than "
          f"{self.limit(step):.4g}, {self._factor:g} x the running median"
        )
      halts = not self.skips_left
      if not halts:
        self.skips_left -= 1
        self.skipped += 1
      return BadStep(step, reason, halts)
    if self._factor and loss[1]:
      self.losses.append([step, mean])
      del self.losses[: -_REMEMBERED - IN_FLIGHT]
    return None


def lower(train_step: Any, state: Any, batch: Any) -> jax.stages.Lowered:
  """The program of a run's step, not yet compiled; the state is donated."""

  def step(state: Any, batch: Any, limit: Any, skips_left: Any):
    # Below 0 no step is applied: the host hears of a bad step a few steps
    # late, and then finds the state as it was before it.
    limit = jnp.where(skips_left < 0, -jnp.inf, limit)
    state, pairs = train_step(state, batch, limit)
    bad = pairs["optim/nonfinite"][0] + pairs["optim/spike"][0]
    with jax.named_scope("row_chain"):
      rows = digests.digest_rows(batch)
    return state, pairs, rows, skips_left - bad.astype(skips_left.dtype)

  limit, skips_left = np.float32(np.inf), np.int32(0)
  return jax.jit(step, donate_argnums=0).lower(state, batch, limit, skips_left)


class StepRunner:
  """A training state, and the steps that change it.

  Attributes:
    state: after the steps submitted; once halted, before the bad step.
    number: of steps submitted.
    halted: the bad step that ends the run, or None.
    chain: the row chain up to the last `collect`; see `digests.extend_chain`.
    found: the compiled step was on disk; see `compile_cache`.
    program: the memory that the compiled step needs on a device.
  """

  def __init__(
    self,
    train_step: Any,
    state: TrainState,
    batch: Batch,
    *,
    detector: SpikeDetector,
    chain: str,
    on_skip: Callable[[BadStep], None],
  ):
    """Compiles the step for batches like this one; donates every state.

    `chain` is that of the rows before; `on_skip` is called with each step that
    is skipped.
    """
    self.state, self.number = state, int(state.step)
    self.halted: BadStep | None = None
    self.chain = chain
    self._detector, self._on_skip = detector, on_skip
    self._skips_left = jnp.asarray(detector.skips_left, jnp.int32)
    self._in_flight = collections.deque()
    self._window = metrics.Window()
    self._rows: list[Any] = []
    self._step, self.found = compile_cache.compiled(
      lower(train_step, state, batch),
      compile_cache.compiler_options(jax.devices()[0].device_kind),
    )
    self.program = flops.program(self._step)

  def submit(self, batch: Batch) -> None:
    """Hands a step to the device.

    The host runs ahead of the device, but not far: work in flight holds
    batches, and on fake CPU devices too much of it deadlocks.
    """
    limit = np.float32(self._detector.limit(self.number + 1))
    self.state, pairs, rows, self._skips_left = self._step(
      self.state, batch, limit, self._skips_left
    )
    self.number += 1
    self._in_flight.append((self.number, pairs, rows))
    if len(self._in_flight) > IN_FLIGHT:
      self._check_oldest()

  @property
  def newest(self) -> Any:
    """Arrays that the newest step makes; none once halted."""
    return self._in_flight[-1][1] if self._in_flight else ()

  def collect(self) -> dict[str, Any]:
    """Means of the steps since the last `collect`; waits for the device."""
    while self._in_flight:
      self._check_oldest()
    self.chain = digests.extend_chain(self.chain, jax.device_get(self._rows))
    self._rows = []
    return {**self._window.take(), "data/chain": self.chain}

  def _check_oldest(self) -> None:
    """Learns how the oldest step in flight went."""
    number, pairs, rows = self._in_flight.popleft()
    bad = self._detector.check(number, pairs)
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
