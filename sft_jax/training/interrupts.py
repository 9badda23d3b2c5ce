"""Stopping a run from outside: SIGTERM and Ctrl-C, at any moment, lose no step.

While steps are taken, the signal is a request: the step in progress ends, its
state is saved, and the loop raises `Stopped`. At any other moment (loading,
measuring, exporting) nothing is in memory that is not on disk or can be made
again, and `Stopped` is raised at once. More SIGTERMs change nothing; a second
Ctrl-C ends the process at once.
"""

import contextlib
import faulthandler
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any


class Stopped(KeyboardInterrupt):
  """The run was asked to stop, and lost nothing.

  A notebook shows it as it shows Ctrl-C; `except Exception` lets it through.

  `agreed`: every process of the run raises it, after the same step.
  """

  agreed = False


class StopRequest:
  """Turns SIGTERM, SIGHUP and Ctrl-C into an orderly end.

  In a thread there are no signals: such a run ends with its process, and
  resumes from the last step saved.

  `requested`: a signal has come.
  """

  def __init__(self) -> None:
    self.requested = False
    self._deferred = False

  def __enter__(self) -> "StopRequest":
    self._before = {
      number: signal.signal(number, self._request) for number in self._signals()
    }
    return self

  @staticmethod
  def _signals() -> list[signal.Signals]:
    if threading.current_thread() is not threading.main_thread():
      return []
    names = ("SIGTERM", "SIGINT", "SIGHUP")  # Windows has no SIGHUP.
    found = (getattr(signal, name, None) for name in names)
    # A process under nohup ignores SIGHUP, and continues to.
    return [x for x in found if x and signal.getsignal(x) != signal.SIG_IGN]

  def _request(self, number: int, frame: Any) -> None:
    del frame
    first, self.requested = not self.requested, True
    if number == signal.SIGINT:
      signal.signal(number, self._before[signal.SIGINT])
    if first and not self._deferred:
      self.obey()

  def obey(self) -> None:
    """Raises Stopped if a signal has come."""
    if self.requested:
      raise Stopped(
        "stopped by a signal; nothing is lost. Run the same command again to "
        "continue from the last step saved."
      )

  @contextlib.contextmanager
  def deferred(self) -> Iterator[None]:
    """Within, a signal is a request that the caller reads and obeys."""
    self._deferred = True
    try:
      yield
    finally:
      self._deferred = False

  def __exit__(self, *exception: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)


class Watchdog:
  """Ends the process when nothing progresses for too long.

  Every thread's stack goes to stderr, and the exit code is 1. Python's
  faulthandler does it, from a thread of its own in C: also when the
  interpreter is held by whatever hangs. Its clock is monotonic.
  """

  def __init__(self, seconds: float):
    """Seconds without progress after which the process ends; 0 = never."""
    self._seconds = seconds

  def __enter__(self) -> "Watchdog":
    self.reset()
    return self

  def reset(self) -> None:
    """Something progressed: the time starts again."""
    if self._seconds:
      faulthandler.dump_traceback_later(
        self._seconds, exit=True, file=sys.__stderr__ or sys.stderr
      )

  def __exit__(self, *exception: Any) -> None:
    faulthandler.cancel_dump_traceback_later()
