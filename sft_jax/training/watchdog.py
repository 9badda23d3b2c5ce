"""The watchdog: a run that hangs ends, and says where it hung."""

import faulthandler
import sys
from typing import Any


class Watchdog:
  """Ends the process when nothing moves for too long.

  Every thread's stack goes to stderr, and the exit code is 1. Python's
  faulthandler does it, from a thread of its own in C: also when the
  interpreter is held by whatever hangs. Its clock is monotonic.
  """

  def __init__(self, seconds: float):
    """Seconds without a move after which the process ends; 0 = never."""
    self._seconds = seconds

  def __enter__(self) -> "Watchdog":
    self.moved()
    return self

  def moved(self) -> None:
    """Something was done: the time begins anew."""
    if self._seconds:
      faulthandler.dump_traceback_later(
        self._seconds, exit=True, file=sys.__stderr__ or sys.stderr
      )

  def __exit__(self, *exception: Any) -> None:
    faulthandler.cancel_dump_traceback_later()
