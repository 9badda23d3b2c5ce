"""A profile: what the device did in some steps, for people to look at."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax


class Profile:
  """Traces steps `start` to `start + steps - 1` into a folder.

  The scopes of the code (`jax.named_scope`) name what is in the trace. The
  first process alone writes one.
  """

  def __init__(
    self,
    folder: Path,
    *,
    start: int,
    steps: int,
    left: range,
    log: Callable[[str], None],
  ):
    """Starts nothing yet.

    Args:
      folder: for TensorBoard's profiler, XProf or Perfetto.
      start: number of the first step, from 1.
      steps: how many; 0 = none.
      left: numbers of the steps that this process is going to take.
      log: given a line with the place of the trace, or why there is none.

    Raises:
      ValueError: there is no such step in any run.
    """
    if steps < 0 or start < 1:
      raise ValueError(
        f"profile: got start {start} and steps {steps}, expected start 1 or "
        "more and steps 0 (none) or more. Set both so."
      )
    self._folder, self._log, self._tracing = folder, log, False
    self._first, self._last = start, min(start + steps, left.stop) - 1
    if jax.process_index() or not steps:
      self._first = self._last = 0
    elif start not in left:
      log(
        f"profile: none, as step {start} is not one of those left, "
        f"{left.start} to {left.stop - 1}."
      )

  @contextmanager
  def step(self, number: int, state: Callable[[], Any]) -> Iterator[None]:
    """Within, the step of this number is handed to the device.

    Args:
      number: of the step, from 1.
      state: gives what the steps so far have made. A trace begins and ends
        when all of it is there, so that it holds whole steps.
    """
    if number == self._first:
      jax.block_until_ready(state())
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # Scopes, not lines of Python.
      jax.profiler.start_trace(self._folder, profiler_options=options)
      self._tracing = True
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield
    if self._tracing and number == self._last:
      jax.block_until_ready(state())
      self.close()

  def close(self) -> None:
    """Ends the trace, if there is one."""
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()
      self._log(f"Profile of steps from {self._first} on: {self._folder}")
