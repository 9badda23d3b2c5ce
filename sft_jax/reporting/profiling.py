"""A profile: what the device did in some steps, for people to look at."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax


class Profile:
  """Traces steps `start` to `start + steps - 1` into a folder, by the scopes of
  the code (`jax.named_scope`), on the first process alone."""

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

    The folder is for TensorBoard's profiler, XProf or Perfetto. Steps count
    from 1; `left` are those that this process is going to take; 0 `steps` are
    none. `log` is given the place of the trace, or why there is none.

    Raises ValueError: there is no such step in any run.
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
    """Within, the step of this number is handed to the device. A trace begins
    and ends when all that `state` gives is there, so that it holds whole steps.
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
