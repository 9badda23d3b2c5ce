"""Bad steps: losses that are not finite, or jump; what becomes of the run.

The step itself refuses a bad batch: parameters and optimiser state stay as
they were (`train_step.make_train_step`). Here is how far a loss may rise, and
how many steps may be left out before the run halts.
"""

import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sft_jax.reporting.metrics import Pairs

# Steps that the host runs ahead of the device. A loss is compared only with
# losses that are known whenever they are asked for, so that a resumed run, or
# one that logs more often, judges as the uninterrupted one does.
IN_FLIGHT = 2
_REMEMBERED = 64  # Losses whose median is the yardstick.
_ENOUGH = 8  # Fewer are no yardstick.


class Bad(NamedTuple):
  """A step that was not applied.

  Attributes:
    step: its number.
    reason: what was wrong, with the figures.
    halts: the run ends here.
  """

  step: int
  reason: str
  halts: bool


class Judge:
  """Finds bad steps; remembers what a resumed run must know.

  Attributes:
    left: steps that may still be left out.
  """

  def __init__(
    self,
    *,
    spike_factor: float,
    skip_limit: int,
    losses: list[list[float]],
    skipped: int,
  ):
    """Starts with what `to_json` of an earlier judge said.

    Args:
      spike_factor: a loss of more than this many running medians is bad;
        0 = no loss is too high.
      skip_limit: steps that may be left out in all; 0 = none.
      losses: [step, nats per token] of recent steps.
      skipped: steps left out so far.
    """
    if spike_factor and spike_factor <= 1:
      raise ValueError(
        f"faults.spike_factor: got {spike_factor}, expected more than 1, or 0 "
        "for none. Set it to 3, say."
      )
    self._factor = spike_factor
    self._losses = losses
    self._skipped = skipped
    self.left = max(0, skip_limit - skipped)

  def limit(self, step: int) -> float:
    """The highest loss that step number `step` may have."""
    known = [x for at, x in self._losses if at < step - IN_FLIGHT]
    if not self._factor or len(known) < _ENOUGH:
      return float("inf")
    return self._factor * statistics.median(known[-_REMEMBERED:])

  def look(self, step: int, pairs: Pairs) -> Bad | None:
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
      halts = not self.left
      if not halts:
        self.left -= 1
        self._skipped += 1
      return Bad(step, reason, halts)
    if self._factor and loss[1]:
      self._losses.append([step, mean])
      del self._losses[: -_REMEMBERED - IN_FLIGHT]
    return None

  def to_json(self) -> dict[str, Any]:
    """What a judge after this one must know."""
    return {"losses": list(self._losses), "skipped": self._skipped}


def guarded(train_step: Any) -> Any:
  """`step(state, batch, limit, left) -> (state, metrics, left)`.

  `left` counts the steps that may still be left out. Once it is below 0 no
  step is applied: the host hears of a bad step a few steps late, and then
  finds the state as it was before it.
  """

  def step(state: Any, batch: Any, limit: Any, left: Any):
    limit = jnp.where(left < 0, -jnp.inf, limit)
    state, pairs = train_step(state, batch, limit)
    bad = pairs["optim/nonfinite"][0] + pairs["optim/spike"][0]
    return state, pairs, left - bad.astype(left.dtype)

  return step
