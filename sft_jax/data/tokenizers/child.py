"""A process that answers requests under limits of time and memory.

What models of strangers bring (templates, tokenizers) runs in libraries that
nothing in Python interrupts, so a child tries it, which the operating system
ends and the next request replaces. It is a limit, not a wall.

    parent                        child
    ask(request)  --pipe->  answer(request)   CPU time: SIGPROF
    the answer    <-pipe--                    memory: RLIMIT_AS
"""

import atexit
import contextlib
import marshal
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

try:
  import resource
except ImportError:  # Windows.
  resource = None

_HEADER = struct.Struct("<q")
_WALL_FACTOR = 10.0  # Where a platform cannot limit CPU time, of that limit.


class Child:
  """Starts with the first request; threads and forked processes may share it.

  The `serve()` of `module` calls `child.serve`. Limits are seconds of CPU time
  per answer, and bytes of address space.
  """

  def __init__(self, module: str, seconds: float, memory: int, **environment):
    self.seconds, self.memory = seconds, memory
    self.process: subprocess.Popen[bytes] | None = None
    self._module, self._environment = module, environment
    self._lock, self._owner = threading.Lock(), 0
    atexit.register(_stop, weakref.ref(self))

  @property
  def limits(self) -> str:
    return f"{self.seconds:g} s or {self.memory >> 20} MiB"

  def ask(self, request: Any) -> Any:
    """Its answer, which `marshal` can hold; None where it died of it."""
    data = pickle.dumps(request, protocol=5)
    with self._lock:
      child: Any = self.process
      if not self._is_mine() or child.poll() is not None:
        self.stop()
        child = self._start()
      timer = None
      if not hasattr(signal, "setitimer"):
        timer = threading.Timer(_WALL_FACTOR * self.seconds, child.kill)
        timer.start()
      try:
        child.stdin.write(_HEADER.pack(len(data)) + data)
        child.stdin.flush()
        header = child.stdout.read(_HEADER.size)
        reply = header and child.stdout.read(*_HEADER.unpack(header))
      except (BrokenPipeError, struct.error):
        reply = b""
      except BaseException:  # An interrupt: its answer must meet no request.
        self.stop()
        raise
      finally:
        if timer is not None:
          timer.cancel()
      if not reply:
        self.stop()
        return None
    return marshal.loads(reply)

  def _is_mine(self) -> bool:
    return self.process is not None and self._owner == os.getpid()

  def _start(self) -> Any:
    if resource is None and not self._owner:
      print(
        "warning: this platform limits no memory of processes: templates and "
        "tokenizers of models that you do not trust may fill it.",
        file=sys.stderr,
      )
    code = (
      "import sys; sys.path[:] = sys.argv[1:]; "
      f"from {self._module} import serve; serve()"
    )
    self._owner = os.getpid()
    self.process = subprocess.Popen(
      [sys.executable, "-I", "-c", code, *filter(None, sys.path), os.getcwd()],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      env={**os.environ, **self._environment},
    )
    return self.process

  def stop(self) -> None:
    """Ends the process, if it is this one's."""
    if self._is_mine():
      assert self.process
      with contextlib.suppress(PermissionError):  # After a change of user.
        self.process.kill()
      with contextlib.suppress(BrokenPipeError):  # What was not yet written.
        self.process.communicate()
      self.process = None


def _stop(child: "weakref.ref[Child]") -> None:
  if (one := child()) is not None:
    one.stop()


def serve(answer: Callable[[Any], Any], memory: int) -> None:
  """In the child: answers requests on its standard streams until they end."""
  for name in ("SIGINT", "SIGTERM"):  # The parent decides when it ends.
    signal.signal(getattr(signal, name), signal.SIG_IGN)
  with contextlib.suppress(ValueError, OSError):
    if resource is not None:
      resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
      resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
  while header := stdin.read(_HEADER.size):
    request = pickle.loads(stdin.read(*_HEADER.unpack(header)))
    reply = marshal.dumps(answer(request))
    stdout.write(_HEADER.pack(len(reply)) + reply)
    stdout.flush()


def limit_time(seconds: float) -> None:
  """In the child: from now on, so much CPU time is left."""
  if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_PROF, seconds)
