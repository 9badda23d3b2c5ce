"""Workers answer in order, end with their reader, and die aloud."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sft_jax.data.store import workers

# What the workers do. They import this file, and through it no JAX.


def double(number):
  return 2 * number


def slow_at_first(number):
  time.sleep(0.2 if number == 0 else 0)
  return number


def has_jax(_):
  return "jax" in sys.modules


def fails_at_two(number):
  if number >= 2:
    raise ValueError(f"the number {number}")
  return number


def dies_at_two(number):
  if number == 2:
    os.kill(os.getpid(), signal.SIGKILL)
  return number


def stalls_at_two(number):
  time.sleep(600 if number == 2 else 0)
  return number


def stops_at_two(number):
  if number == 2:
    os.kill(os.getpid(), signal.SIGSTOP)
  return number


def prints(number):
  print("words that must not come between the answers", flush=True)
  return number


def one_process(number):
  return os.getpid()


def _alive(process):
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  return True


def test_answers_come_in_the_order_of_the_jobs():
  answers = workers.map_ordered(slow_at_first, range(20), workers=2)
  assert list(answers) == list(range(20))
  assert list(workers.map_ordered(double, [b"x" * 10**6], workers=1)) == [
    b"x" * 2 * 10**6
  ], "more than a pipe holds"
  assert list(workers.map_ordered(double, [], workers=1)) == []


def test_workers_never_import_jax_and_may_print():
  assert list(workers.map_ordered(has_jax, [0], workers=1)) == [False]
  assert list(workers.map_ordered(prints, range(3), workers=1)) == [0, 1, 2]


def test_jobs_are_read_as_they_are_needed():
  read = []
  jobs = (read.append(i) or i for i in range(1000))
  answers = workers.map_ordered(double, jobs, workers=1)
  assert list(itertools.islice(answers, 3)) == [0, 2, 4]
  assert len(read) <= 5, "no more than two under way"
  answers.close()


def test_a_failure_is_raised_in_its_turn():
  answers = workers.map_ordered(fails_at_two, range(9), workers=2)
  assert [next(answers), next(answers)] == [0, 1]
  with pytest.raises(ValueError, match="the number 2") as raised:
    next(answers)
  assert "fails_at_two" in raised.value.__notes__[0], "the worker's own trace"


def test_a_killed_worker_is_named():
  with pytest.raises(workers.WorkerDied, match=r"data worker \d+: .*SIGKILL"):
    list(workers.map_ordered(dies_at_two, range(9), workers=2))


@pytest.mark.parametrize("stuck", [stalls_at_two, stops_at_two])
def test_a_worker_that_stalls_is_ended_and_says_where(stuck, capfd):
  answers = workers.map_ordered(stuck, range(9), workers=2, patience=2)
  with pytest.raises(
    workers.WorkerDied, match=r"worker [\d, ]+: got no answer in 2"
  ):
    list(answers)
  if stuck is stalls_at_two:  # One that is stopped cannot.
    assert stuck.__name__ in capfd.readouterr().err


def test_workers_and_threads_end_with_their_reader():
  threads = threading.active_count()
  answers = workers.map_ordered(one_process, itertools.count(), workers=1)
  process = next(answers)
  assert _alive(process)
  answers.close()
  assert not _alive(process)
  assert threading.active_count() == threads


def test_workers_end_with_a_killed_parent(tmp_path):
  """kill -9 leaves the parent no time to end them: their pipe does."""
  here, name = os.path.split(__file__)
  program = tmp_path / "parent.py"
  program.write_text(
    f"import itertools, sys\nsys.path[:] = {[here, *sys.path]!r}\n"
    "from sft_jax.data.store import workers\n"
    f"import {name.removesuffix('.py')} as jobs\n"
    # Without a guard: a worker does not run its parent's program.
    "for pid in workers.map_ordered("
    "jobs.one_process, itertools.count(), workers=1):\n"
    "  print(pid, flush=True)\n"
  )
  parent = subprocess.Popen(
    [sys.executable, program], stdout=subprocess.PIPE, text=True
  )
  process = int(parent.stdout.readline())
  parent.kill()
  parent.wait()
  parent.stdout.close()
  deadline = time.monotonic() + 20
  while _alive(process):
    assert time.monotonic() < deadline, "the worker outlives its parent"
    time.sleep(0.05)
