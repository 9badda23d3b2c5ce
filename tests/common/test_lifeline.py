"""Processes learn which of them is gone: here several in one process."""

import os
import queue
import signal
import socket
import subprocess
import sys
import time

import pytest

import host_runs
from sft_jax.common import lifeline


class Coordinator(dict):
  key_value_set = dict.__setitem__

  def blocking_key_value_get(self, key, milliseconds):
    del milliseconds
    return self[key]


@pytest.fixture
def lines():
  """Of three processes, with what each was told."""
  client, told = Coordinator(), [queue.Queue() for _ in range(3)]
  made = [
    lifeline.Lifeline(
      *(client, i, 3, "localhost"),
      lambda text, code, i=i: told[i].put(f"{text} {code}"),
    )
    for i in range(3)
  ]
  deadline = time.monotonic() + 10
  while len(made[0]._others) < 2:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  yield made, told
  for one in made:
    one.close()


def _vanish(one):
  """As the system does where a process is killed."""
  one._closing = True
  one._thread.join()
  for line in list(one._others):
    one._selector.unregister(line)
    one._others.pop(line)
    line.close()


def _said(told, victim) -> list[str]:
  """What the others are told: all of them of this process, which is not."""
  others = [told[i].get(timeout=10) for i in range(3) if i != victim]
  assert all(x.startswith(f"process {victim} of 3, on ") for x in others)
  assert told[victim].empty()
  return others


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_the_others_name_who_is_gone(lines, victim):
  made, told = lines
  _vanish(made[victim])
  assert all("(its connection is closed)" in x for x in _said(told, victim))


def test_who_says_goodbye_is_not_missed(lines):
  made, told = lines
  for one in made[::-1]:
    one.close()
  time.sleep(0.2)
  assert all(one.empty() for one in told)


@pytest.mark.parametrize("victim", [0, 1])
def test_who_leaves_says_why_and_the_code_of_the_others(lines, victim):
  made, told = lines
  made[victim].leave("stopped by a signal", 75)
  _vanish(made[victim])
  for sentence in _said(told, victim):
    assert "(stopped by a signal)" in sentence
    assert sentence.endswith(" 75")


def test_who_is_stopped_is_missed(lines, monkeypatch):
  made, told = lines
  monkeypatch.setattr(lifeline, "SILENCE", 3.0)
  made[2]._closing = True  # Its thread ends, and its connection stays.
  for i in (0, 1):
    said = told[i].get(timeout=20)
    assert said.startswith("process 2 of 3")
    assert "no sign of life for 3 s" in said


def test_strangers_are_no_processes_and_are_counted(lines, capsys, monkeypatch):
  """Nor do those who say nothing keep the others waiting."""
  made, told = lines
  (server,) = (
    key.fileobj
    for key in made[0]._selector.get_map().values()
    if key.fileobj not in made[0]._others
  )
  silent = socket.create_connection(server.getsockname()[:2])
  texts = b"", b"\xff\n", b'["wrong", 1, "h"]\n', b"{}\n", b"[" * 1999
  for text in texts:
    with socket.create_connection(server.getsockname()[:2]) as stranger:
      stranger.sendall(text)
  deadline = time.monotonic() + 10
  while made[0].strangers < len(texts):
    assert time.monotonic() < deadline
    time.sleep(0.02)
  known = [one[0] for one in made[0]._others.values()]
  assert sorted(known, key=str) == [1, 2, None]
  monkeypatch.setattr(lifeline, "BEAT", 0.1)
  assert silent.recv(1) == b""  # Nor is it told who is alive.
  silent.close()
  assert all(one.empty() for one in told)
  for one in made:
    one.close()
  text = capsys.readouterr().err
  assert text.count("is none of them") == 1
  assert "6 strangers connected" in text


_PAIR = """
import os, signal, sys, time
from sft_jax.common import distributed

process, port, victim, how = map(int, sys.argv[1:])
with distributed.joined(f"localhost:{port}", 2, process):
  print("joined", flush=True)
  if process == victim:
    time.sleep(1)
    os.kill(os.getpid(), how)
  time.sleep(0 if victim < 0 else 100)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [-1, 0, 1])
def test_real_pairs(victim, how):
  """Of JAX, without a run: it ends where one is gone, and names it."""
  port = str(host_runs.free_port())
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  environment["PYTHONPATH"] = str(host_runs.ROOT)
  pair = [
    subprocess.Popen(
      [sys.executable, "-c", _PAIR, str(i), port, str(victim), str(int(how))],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    for one in pair:
      assert one.stdout
      assert one.stdout.readline() == "joined\n"
    begin = time.monotonic()
    for i in range(2):
      if i != victim:
        _, said = pair[i].communicate(timeout=60)
        if victim < 0:
          assert pair[i].returncode == 0, said
          continue
        assert pair[i].returncode == 1
        assert f"error: process {victim} of 2, on " in said
        limit = 10 if how == signal.SIGKILL else 50
        assert time.monotonic() - begin < limit
  finally:
    for one in pair:
      one.kill()
      one.communicate()
