"""Connections by which the processes of a run learn which of them is gone.

JAX ends the processes of a run whose partner died, in C++, with a stack and
without its name. So each process also holds a connection to the first one,
which the operating system closes with the process:

    1 ---\\
    2 ------ 0     tells the others who is gone; all say so and end
    3 ---/

A process that is stopped, or whose machine or network is gone, closes
nothing: it is missed after `SILENCE`. The first process is where the
coordinator is, at a port of its own that the coordinator tells the others.
"""

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from sft_jax.common import meeting

# Seconds between signs of life, and without one until a process counts as gone:
# less than JAX's, which names nobody.
BEAT, SILENCE = 2.0, 30.0
_KEY = "sft_jax lifeline"
_MILLISECONDS = 60_000  # For the first process to come.
_HELLO = 1000  # Bytes of a first line, at most.


class Lifeline:
  """Watches from a thread until it is closed.

  Args:
    client: of JAX's coordinator; other processes read there where we listen.
    process, count: which this is, and how many there are.
    host: of the first process.
    lost: called once, with a sentence that names who is gone, and the exit
      code of the others; ends the process by default.
  """

  def __init__(
    self,
    client: Any,
    process: int,
    count: int,
    host: str,
    lost: Callable[[str, int], None] | None = None,
  ):
    self._process, self._count = process, count
    self._lost = lost or _end
    self._closing = False
    self.strangers = 0
    self._selector = selectors.DefaultSelector()
    # By connection: [process, its host, when it was last heard, what it said];
    # None is a stranger, so far.
    self._others: dict[socket.socket, list[Any]] = {}
    if process == 0:
      self._token = secrets.token_hex(16)
      server = meeting.listen(0)
      server.setblocking(False)
      self._selector.register(server, selectors.EVENT_READ)
      client.key_value_set(
        _KEY, json.dumps([server.getsockname()[1], self._token])
      )
    else:
      port, self._token = json.loads(
        client.blocking_key_value_get(_KEY, _MILLISECONDS)
      )
      line = socket.create_connection((host, port), timeout=SILENCE)
      hello = [self._token, process, socket.gethostname()]
      line.sendall(json.dumps(hello).encode() + b"\n")
      self._add(line, 0, host)
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def close(self) -> None:
    """Says goodbye: this process ends as all others do."""
    if self._selector.get_map() is None:  # Closed before.
      return
    self._closing = True
    self._send({"bye": self._process})
    self._thread.join(2 * BEAT)
    for key in list(self._selector.get_map().values()):
      key.fileobj.close()  # pyright: ignore
    self._selector.close()
    if self.strangers > 1:
      print(f"warning: {self.strangers} strangers connected.", file=sys.stderr)

  def leave(self, how: str, code: int) -> None:
    """This process ends, and the others shall with this code; returns."""
    self._closing = True
    self._send({"gone": [self._process, socket.gethostname(), how, code]})

  def _add(self, line: socket.socket, process: int | None, host: str) -> None:
    line.setblocking(False)
    self._others[line] = [process, host, time.monotonic(), b""]
    self._selector.register(line, selectors.EVENT_READ)

  def _send(self, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    for line, (process, *_) in list(self._others.items()):
      with contextlib.suppress(OSError):  # Reading notices who is gone.
        if process is not None:
          line.sendall(data)

  def _watch(self) -> None:
    last = 0.0
    while not self._closing:
      if time.monotonic() - last > BEAT:
        last = time.monotonic()
        self._send({})
      for key, _ in self._selector.select(BEAT / 4):
        line: Any = key.fileobj
        if line in self._others:
          self._read(line)
        else:
          self._greet(line)
      for line, (process, host, heard, _) in list(self._others.items()):
        silent = time.monotonic() - heard
        if process is None:
          if silent > BEAT:
            self._drop(line)
        elif silent > SILENCE:
          self._tell(process, host, f"no sign of life for {SILENCE:g} s")
          return

  def _greet(self, server: socket.socket) -> None:
    """Accepts a connection, of a stranger until its first line says more."""
    with contextlib.suppress(OSError):  # It is gone already.
      line, (address, *_) = server.accept()
      self._add(line, None, address)

  def _know(self, line: socket.socket, hello: bytes) -> bool:
    """Whether a first line is that of a process; nobody else has the token."""
    try:
      token, process, host = json.loads(hello)
      if hmac.compare_digest(str(token).encode(), self._token.encode()):
        self._others[line][:2] = int(process), str(host)
    except (ValueError, TypeError, RecursionError):  # Whatever strangers send.
      pass
    return self._others[line][0] is not None

  def _drop(self, line: socket.socket) -> None:
    """Closes a connection; says once that strangers come, and counts them."""
    process, host, *_ = self._others.pop(line)
    self._selector.unregister(line)
    line.close()
    if process is None:
      self.strangers += 1
      if self.strangers == 1:
        print(
          f"warning: {host} connected to the port by which processes of this "
          "run watch each other, and is none of them; it and others like it "
          "are refused. Their number follows at the end.",
          file=sys.stderr,
        )

  def _read(self, line: socket.socket) -> None:
    process, host, _, before = state = self._others[line]
    try:
      data = line.recv(4096)
    except BlockingIOError:
      return
    except OSError:
      data = b""
    if not data:
      self._drop(line)
      if process is not None:
        self._tell(process, host, "its connection is closed")
      return
    *messages, state[3] = (before + data).split(b"\n")
    if process is None and not messages and len(state[3]) < _HELLO:
      return
    if process is None and not self._know(line, [*messages, b""][0]):
      self._drop(line)
      return
    state[2] = time.monotonic()
    for message in map(json.loads, messages[process is None :]):
      if "bye" in message:
        self._drop(line)
      elif "gone" in message:
        self._tell(*message["gone"])

  def _tell(self, process: int, host: str, how: str, code: int = 1) -> None:
    if self._closing:  # This one ends anyway.
      return
    self._closing = True
    self._send({"gone": [process, host, how, code]})
    self._lost(
      f"process {process} of {self._count}, on {host}, is gone ({how}); the "
      "others cannot continue without it. Look at its output; then the same "
      "commands continue from the last step saved.",
      code,
    )


def _end(sentence: str, code: int) -> None:
  print(f"error: {sentence}", file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
