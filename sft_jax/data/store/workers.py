"""Workers: processes that map a function over jobs, in order.

They are started as programs of their own and speak pickles over pipes.
Forking this process would copy the locks of JAX's threads, and
`multiprocessing` would import the main program, and JAX with it, once per
worker; these import only what the function needs. A worker ends when its pipe
closes, so none outlives this process, however it ends.
"""

import concurrent.futures
import faulthandler
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
import types
from collections import deque
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import IO, Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


# Seconds for an answer; a job is some 50 ms of work.
PATIENCE = 600.0


class WorkerDied(OSError):
  """A worker ended before it answered, or did not answer in time."""


def num_cores() -> int:
  """Cores that this process may use."""
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
  jobs there are and however slowly results are taken.

  Args:
    function: picklable, as are jobs and results. What it raises is raised
      here, in the order of the jobs.
    jobs: read as workers become free.
    workers: processes to start; they end when the iterator does.
    patience: seconds for one answer.

  Raises:
    WorkerDied: a worker was killed or crashed, or gave no answer in time and
      was ended, its stack on stderr; names its process and signal.
  """
  first = pickle.dumps(sys.path) + pickle.dumps(function)
  processes = [_start() for _ in range(workers)]
  idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
  for process in processes:
    idle.put(process)
  greeted = set()

  def ask(job: Job) -> Result:
    process = idle.get()
    try:
      greeting = b"" if process.pid in greeted else first
      done, value = _ask(process, greeting, job, patience)
      greeted.add(process.pid)
    finally:
      idle.put(process)  # A dead one too, for the next to find it dead.
    if not done:
      raise value
    return value

  # A thread for each worker waits on its pipes.
  threads = concurrent.futures.ThreadPoolExecutor(workers)
  under_way: deque[concurrent.futures.Future[Result]] = deque()
  try:
    for job in jobs:
      under_way.append(threads.submit(ask, job))
      if len(under_way) == 2 * workers:
        yield under_way.popleft().result()
    while under_way:
      yield under_way.popleft().result()
  finally:
    threads.shutdown(wait=False, cancel_futures=True)
    for process in processes:
      process.kill()
    threads.shutdown()
    for process in processes:
      process.wait()
      for pipe in (process.stdin, process.stdout):
        _close(pipe)


def _start() -> subprocess.Popen:
  # -P: the folder of this file is no place to import from. A session of its
  # own, so that Ctrl-C reaches this process alone, which ends its workers.
  return subprocess.Popen(
    [sys.executable, "-P", __file__],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    start_new_session=True,
    # Each is one of many: threads of its own would only get in the way.
    env=os.environ
    | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
  )


def _ask(
  process: subprocess.Popen, greeting: bytes, job: Any, patience: float
) -> Any:
  assert process.stdin is not None
  assert process.stdout is not None
  stalled = threading.Event()
  alarm = threading.Timer(patience, _end_stalled, (process, stalled))
  alarm.start()
  try:
    process.stdin.write(greeting)
    pickle.dump(job, process.stdin, pickle.HIGHEST_PROTOCOL)
    process.stdin.flush()
    return pickle.load(process.stdout)
  except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
    if stalled.is_set():
      raise WorkerDied(
        f"data worker {process.pid}: got no answer in {patience:g} s; expected "
        "one in less than one. Its stack is on stderr: look at the rows it was "
        "given, or at the disk; then run the same command again."
      ) from error
    raise WorkerDied(
      f"data worker {process.pid}: got {_end(process)} in the middle of its "
      "work; expected an answer. If the machine ran out of memory, lower "
      "data.workers; then run the same command again."
    ) from error
  finally:
    alarm.cancel()
    alarm.join()


def _end_stalled(process: subprocess.Popen, stalled: threading.Event) -> None:
  """Ends a worker: with a stack dump, if it still can."""
  stalled.set()
  process.send_signal(signal.SIGABRT)
  process.send_signal(signal.SIGCONT)  # One that was stopped hears nothing.
  try:
    process.wait(timeout=5)
  except subprocess.TimeoutExpired:
    process.kill()


def _close(pipe: IO[bytes] | None) -> None:
  try:
    assert pipe
    pipe.close()
  except BrokenPipeError:  # What it held was for a worker that is gone.
    pass


def _end(process: subprocess.Popen) -> str:
  """How a process ended: 'signal 9 (SIGKILL)' or 'exit code 1'."""
  try:
    code = process.wait(timeout=10)
  except subprocess.TimeoutExpired:
    return "no answer that can be read"
  if code < 0:
    return f"signal {-code} ({signal.Signals(-code).name})"
  return f"exit code {code}"


def _work(asked: IO[bytes], answers: IO[bytes]) -> None:
  """The life of a worker: answers jobs until its pipe closes."""
  try:
    sys.path[:] = pickle.load(asked)
    function = pickle.load(asked)
    while True:
      job = pickle.load(asked)
      try:
        answer = (True, function(job))
      except Exception as error:
        error.add_note(f"In a data worker:\n{traceback.format_exc()}")
        answer = (False, error)
      answers.write(pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))
      answers.flush()
  except (EOFError, BrokenPipeError):
    return


if __name__ == "__main__":
  # The package without its table of contents, which would import JAX.
  package = types.ModuleType("sft_jax")
  package.__path__ = [str(Path(__file__).parents[2])]
  sys.modules["sft_jax"] = package
  faulthandler.enable()  # A worker that is ended says where it was.
  # What libraries print must not come between the answers.
  pipe = os.fdopen(os.dup(1), "wb")
  os.dup2(2, 1)
  _work(sys.stdin.buffer, pipe)
