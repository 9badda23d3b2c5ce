"""A child that answers within its limits, or dies alone."""

import concurrent.futures
import os
import resource
import time

import pytest

from sft_jax.data.tokenizers import child

SECONDS, MEMORY = 0.5, 400 << 20


def serve():
  """In the child."""
  child.serve(_answer, MEMORY)


def _answer(request):
  child.limit_time(SECONDS)
  if request == "time":
    while True:
      pass
  if request == "memory":
    return len(bytearray(MEMORY))
  if request == "abort":
    os.abort()
  return request


@pytest.fixture(scope="module")
def one():
  made = child.Child(__name__, SECONDS, MEMORY)
  yield made
  made.stop()


@pytest.mark.parametrize("request_", ["time", "memory", "abort"])
def test_what_exceeds_a_limit_ends_the_child_alone(one, request_):
  assert one.ask([1]) == [1]
  begin = time.perf_counter()
  assert one.ask(request_) is None
  assert time.perf_counter() - begin < 20
  assert one.ask({"a": "b"}) == {"a": "b"}  # Of the next child.


def test_threads_get_their_own_answers(one):
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(one.ask, range(99))) == list(range(99))


@pytest.mark.skipif(
  not hasattr(resource, "prlimit"), reason="asks Linux for another's limits"
)
def test_the_kernel_knows_the_limit(one):
  one.ask(1)
  found = resource.prlimit(one.process.pid, resource.RLIMIT_AS)
  assert found == (MEMORY, MEMORY)


def test_where_memory_is_not_limited_it_is_said_once(monkeypatch, capfd):
  """As on Windows."""
  monkeypatch.setattr(child, "resource", None)
  lonely = child.Child(__name__, SECONDS, MEMORY)
  assert lonely.ask(1) == 1
  lonely.stop()
  assert lonely.ask(2) == 2
  lonely.stop()
  (line,) = capfd.readouterr().err.splitlines()
  assert line.startswith("warning: this platform limits no memory")


def test_an_interrupt_leaves_no_answer_behind(one, monkeypatch):
  class Header:
    size, pack = child._HEADER.size, child._HEADER.pack

    def unpack(self, data):
      raise KeyboardInterrupt

  one.ask(1)
  with monkeypatch.context() as patch:
    patch.setattr(child, "_HEADER", Header())
    with pytest.raises(KeyboardInterrupt):
      one.ask("late")
  assert one.ask("next") == "next"
