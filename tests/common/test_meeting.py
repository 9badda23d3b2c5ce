"""Processes of a run meet, or learn who is missing: here threads of one."""

import json
import socket
import threading
import time

import pytest

from host_runs import free_port
from sft_jax.common import meeting


class Process(threading.Thread):
  """Meets; what it raised is in `error`."""

  def __init__(self, port, process, count):
    super().__init__(daemon=True)
    self.at, self.error = (f"localhost:{port}", process, count), None
    self.start()

  def run(self):
    try:
      meeting.meet(*self.at)
    except ValueError as error:
      self.error = str(error)

  def ends(self, error=""):
    self.join(10)
    assert not self.is_alive()
    assert error in (self.error or ""), self.error
    assert bool(error) == bool(self.error), self.error


@pytest.fixture
def port(monkeypatch):
  monkeypatch.setattr(meeting, "WORD", 0.4)
  monkeypatch.setattr(meeting, "PATIENCE", 8.0)
  return free_port()


def said(capsys, *texts):
  """Reads stderr until all of the texts are there."""
  found, end = "", time.monotonic() + 10
  while not all(text in found for text in texts):
    assert time.monotonic() < end, found
    time.sleep(0.05)
    found += capsys.readouterr().err
  return found


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_return_once_the_last_is_here(port, order):
  ones = [Process(port, i, 3) for i in order[:2]]
  time.sleep(0.2)
  assert all(one.is_alive() for one in ones)
  for one in (*ones, Process(port, order[2], 3)):
    one.ends()
  meeting.listen(port).close()  # It is free for JAX.


def test_who_is_missing_is_said_by_all(port, capsys):
  ones = [Process(port, i, 4) for i in (1, 0)]
  text = said(capsys, "of 4 processes 2, 3 did not come to process 0")
  # By both of them, or by the one that is told.
  text += said(capsys, "waiting ...") if text.count("2, 3") < 2 else ""
  assert text.count("of 4 processes 2, 3 did") >= 2
  for one in (*ones, Process(port, 2, 4), Process(port, 3, 4)):
    one.ends()


def test_the_first_is_missing_and_others_give_up(port, capsys, monkeypatch):
  one = Process(port, 1, 2)
  said(capsys, "process 1 of 2 did not reach process 0 at localhost")
  monkeypatch.setattr(meeting, "PATIENCE", 0.1)
  one.ends("Start it")
  first = Process(port, 0, 2)
  first.ends("of 2 processes 1 did not come to process 0")


def test_strangers_and_who_ended_do_not_count(port, capsys):
  first = Process(port, 0, 3)
  said(capsys, "processes 1, 2 did not come")
  gone = json.dumps([1, 3, "gone"]).encode()
  for text in (b"GET / HTTP/1.1\n\n", b"[1]", b"[" * 900, b"[[1], 3, 0]", gone):
    with socket.create_connection(("localhost", port)) as line:
      line.sendall(text)
  second = Process(port, 2, 3)
  said(capsys, "processes 1 did not come")
  assert first.is_alive()
  for one in (first, second, Process(port, 1, 3)):
    one.ends()


def test_a_wrong_number_is_refused_by_name(port, capsys):
  first, one = Process(port, 0, 3), Process(port, 1, 3)
  time.sleep(0.3)
  Process(port, 1, 3).ends("got process 1 of 3 on")
  Process(port, 2, 4).ends("expected each of 3, once")
  said(capsys, "warning: hosts: got process 1 of 3")
  for other in (first, one, Process(port, 2, 3)):
    other.ends()


def test_a_port_of_another_program_is_no_process(port, capsys):
  with socket.create_server(("", port)) as server:
    Process(port, 0, 2).ends(f"got port {port}")
    one, text = Process(port, 1, 2), ""
    server.settimeout(5)
    while "another program answers there" not in text:
      line, _ = server.accept()
      with line:
        line.sendall(b"SSH-2.0\n")
      text += capsys.readouterr().err
  Process(port, 0, 2).ends()
  one.ends()
