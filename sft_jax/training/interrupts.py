"""Stopping a run from outside: SIGTERM and Ctrl-C, at any moment, lose no step.

While steps are taken, the signal is a wish: the step under way ends, its state
is saved, and the loop raises `Stopped`. At any other moment (loading,
measuring, exporting) nothing is in memory that is not on disk or can be made
again, and `Stopped` is raised on the spot. More SIGTERMs change nothing; a
second Ctrl-C ends the process at once.
"""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Stopped(BaseException):
  """The run was asked to stop, and lost nothing by it.

  As KeyboardInterrupt, it is not for `except Exception`.
  """


class StopRequest:
  """Turns SIGTERM and Ctrl-C into an orderly end.

  Attributes:
    requested: a signal has come.
  """

  def __init__(self) -> None:
    self.requested = False
    self._deferred = False

  def __enter__(self) -> "StopRequest":
    self._before = {
      number: signal.signal(number, self._request)
      for number in (signal.SIGTERM, signal.SIGINT)
    }
    return self

  def _request(self, number: int, frame: Any) -> None:
    del frame
    first, self.requested = not self.requested, True
    if number == signal.SIGINT:
      signal.signal(number, self._before[signal.SIGINT])
    if first and not self._deferred:
      raise Stopped(
        f"stopped by {signal.Signals(number).name}; nothing is lost. Run the "
        "same command again to go on from the last step saved."
      )

  @contextlib.contextmanager
  def deferred(self) -> Iterator[None]:
    """Within, a signal is a wish that the caller reads and obeys."""
    self._deferred = True
    try:
      yield
    finally:
      self._deferred = False

  def __exit__(self, *exception: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
