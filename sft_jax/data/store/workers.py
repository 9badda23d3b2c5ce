"""Workers: processes that map a function over jobs, in order.

`concurrent.futures.ProcessPoolExecutor`, spawned, for forking would copy the
locks of JAX's threads; and a worker that was killed or stalls is named, workers
end with a killed parent, Ctrl-C reaches the parent alone, and workers do not
import the user's main program.
"""

import concurrent.futures
import contextlib
import faulthandler
import functools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import traceback
import types
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

# Seconds for an answer; a job is some 50 ms of work.
PATIENCE = 600.0
_GRACE = 5.0  # Seconds in which a worker should have ended.
_CURE = "then run the same command again."


class WorkerDied(OSError):
  """A worker ended before it answered, or did not answer in time."""


def num_cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def map_ordered(
  function: Callable[[Job], Result],
  jobs: Iterable[Job],
  *,
  workers: int,
  patience: float = PATIENCE,
) -> Generator[Result, None, None]:
  """Yields function(job) of every job in order, computed by `workers`.

  At most two jobs per worker are under way, so memory is bounded however many
  jobs there are and however slowly results are taken. Function, jobs and
  results are picklable; what it raises is raised here, in the jobs' order.

  Raises WorkerDied: a worker was killed or crashed, or gave no answer in
  `patience` seconds and was ended, its stack on stderr.
  """
  context, start = multiprocessing.get_context("spawn"), pickle.dumps(function)
  executor = concurrent.futures.ProcessPoolExecutor(
    workers, context, _begin, (start, patience)
  )
  processes: dict[int, Any] = {}
  under_way: deque[concurrent.futures.Future[Result]] = deque()

  def next_result() -> Result:
    try:
      # Two jobs may wait for one worker; a worker ends itself before this.
      return under_way.popleft().result(2 * patience + _GRACE)
    except BrokenProcessPool as error:
      raise _died(processes, patience) from error
    except TimeoutError as error:  # One that was stopped, not one that hangs.
      raise _stalled(sorted(processes), patience) from error

  try:
    for job in jobs:
      try:
        with _starting():
          under_way.append(executor.submit(_work, job))
      except BrokenProcessPool as error:
        raise _died(processes, patience) from error
      processes.update(executor._processes or {})
      if len(under_way) == 2 * workers:
        yield next_result()
    while under_way:
      yield next_result()
  finally:
    for process in processes.values():
      process.kill()
    executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _starting() -> Iterator[None]:
  """Within, processes are started that ignore Ctrl-C and know no main program,
  whose file `spawn` would run again in every worker."""
  main = sys.modules["__main__"]
  mask = getattr(signal, "pthread_sigmask", None)  # Windows has none.
  masked = mask and mask(signal.SIG_BLOCK, {signal.SIGINT})
  sys.modules["__main__"] = types.ModuleType("__main__")
  try:
    yield
  finally:
    sys.modules["__main__"] = main
    if mask:
      mask(signal.SIG_SETMASK, masked)


def _died(processes: dict[int, Any], patience: float) -> WorkerDied:
  """Which worker ended first, and how; the pool has ended the others."""
  for process in processes.values():
    process.join(_GRACE)
  codes = {pid: process.exitcode for pid, process in processes.items()}
  # The pool ends the others by SIGTERM.
  first = [pid for pid, code in codes.items() if code not in (None, -15, 0)]
  pid = next(iter([*first, *codes]), 0)
  if codes.get(pid) == _STALLED:
    return _stalled([pid], patience)
  code = codes.get(pid) or -signal.SIGTERM
  name = signal.Signals(-code).name if code < 0 else ""
  how = f"signal {-code} ({name})" if name else f"exit code {code}"
  return WorkerDied(
    f"data worker {pid}: got {how} in the middle of its work; expected an "
    f"answer. If the machine ran out of memory, lower data.workers; {_CURE}"
  )


def _stalled(pids: list[int], patience: float) -> WorkerDied:
  return WorkerDied(
    f"data worker {', '.join(map(str, pids))}: got no answer in {patience:g} "
    "s; expected one in less than one. Look at its stack, if it could still "
    f"write it to stderr, at the rows it was given, and at the disk; {_CURE}"
  )


_STALLED = 1  # The exit code of faulthandler's timer.
_function: Callable[[Any], Any]
_patience: float


def _begin(function: bytes, patience: float) -> None:
  """In a worker: gets it ready."""
  global _function, _patience
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends its workers.
  # Each is one of many: threads of its own would only get in the way.
  os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
  faulthandler.enable()  # A worker that is ended says where it was.
  parent = multiprocessing.parent_process()
  assert parent
  ended = functools.partial(multiprocessing.connection.wait, [parent.sentinel])
  threading.Thread(target=lambda: (ended(), os._exit(1)), daemon=True).start()
  _patience = patience
  _function = pickle.loads(function)


def _work(job: Any) -> Any:
  faulthandler.dump_traceback_later(_patience, exit=True)
  try:
    return _function(job)
  except Exception as error:
    error.add_note(f"In a data worker:\n{traceback.format_exc()}")
    raise
  finally:
    faulthandler.cancel_dump_traceback_later()
