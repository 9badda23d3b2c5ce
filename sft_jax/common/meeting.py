"""Processes of a run meet before JAX makes them one: it names nobody.

JAX waits for who does not come in C++, says nothing, and after five minutes
ends all others with a native stack. So they meet first, at the coordinator's
port, before it is JAX's:

    1 ---\\
    2 ------ 0     'wait' and who is missing, each minute; 'go'; or 'no' and why

Strangers that connect are let go. Who ended is missing, and may come again.
"""

import contextlib
import json
import selectors
import socket
import sys
import time
from typing import Any

# Seconds after which those who wait say for whom, again and again; and give up.
WORD, PATIENCE = 60.0, 300.0
_ANSWER = 2.0  # Seconds that a single answer may take.
_HELLO = 1000  # Bytes of one, at most.


def meet(address: str, process: int, count: int) -> None:
  """Returns once all processes of a run are here; says who is missing.

  Args:
    address: host:port of the first process; the port is free on return.
    process, count: which this is, and how many there are.

  Raises ValueError: some did not come within PATIENCE; one came twice, or
  counts others; the port is another program's.
  """
  host, _, port = address.rpartition(":")
  if process == 0:
    _gather(int(port), count)
  else:
    _visit((host.strip("[]"), int(port)), process, count)


def listen(port: int) -> socket.socket:
  """A server for both IPs, or for the one that there is."""
  dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dual else socket.AF_INET
  return socket.create_server(("", port), family=family, dualstack_ipv6=dual)


def _gather(port: int, count: int) -> None:
  """The first process waits for the others, and tells them how it stands."""
  begin = time.monotonic()
  try:
    server = listen(port)
  except OSError as error:
    raise ValueError(
      f"hosts: process 0 of {count}: got port {port} ({error}), expected one "
      "that is free. End what listens there, or give every process another."
    ) from error
  # By connection: (process, its host).
  here: dict[socket.socket, tuple[int, str]] = {}
  said = 1
  with contextlib.ExitStack() as closing, selectors.DefaultSelector() as waits:
    closing.enter_context(server).settimeout(_ANSWER)
    waits.register(server, selectors.EVENT_READ)
    while len(here) < count - 1:
      found: list[Any] = [key.fileobj for key, _ in waits.select(0.5)]
      for line in [x for x in found if x in here]:  # It has no more to say.
        del here[line]
        waits.unregister(line)
        line.close()
      if server in found and (line := _greet(server, here, count)):
        waits.register(closing.enter_context(line), selectors.EVENT_READ)
      missing = set(range(1, count)) - {number for number, _ in here.values()}
      passed = time.monotonic() - begin
      text = (
        f"hosts: of {count} processes {_short(missing)} did not come to "
        f"process 0 on {socket.gethostname()}, port {port}, in {passed:.0f} s"
      )
      if missing and passed > PATIENCE:
        cure = ". Start them, or look at their output and at the network."
        _tell(here, "no", text + cure)
        raise ValueError(text + cure)
      if missing and passed > said * WORD:
        said += 1
        print(f"{text}; waiting ...", file=sys.stderr, flush=True)
        _tell(here, "wait", f"{text}; waiting ...")
    _tell(here, "go")
    for line in here:  # Who closes last keeps the port for a while.
      with contextlib.suppress(OSError):
        line.recv(1)


def _short(numbers: set[int]) -> str:
  """'1, 2, 5', of a thousand the first few."""
  first = ", ".join(map(str, sorted(numbers)[:8]))
  return first + f" and {len(numbers) - 8} more" * (len(numbers) > 8)


def _greet(
  server: socket.socket, here: dict[socket.socket, tuple[int, str]], count: int
) -> socket.socket | None:
  """Notes a process that came; None where it is a stranger, or refused."""
  line = None
  try:
    line, _ = server.accept()
    line.settimeout(_ANSWER)
    process, others, host = json.loads(line.recv(_HELLO))
    if not isinstance(process, int):
      raise TypeError
  except (OSError, ValueError, TypeError, RecursionError):
    if line:
      line.close()
    return None
  first = dict(here.values()).get(process)
  if others == count and first is None and process in range(1, count):
    here[line] = process, str(host)
    return line
  text = (
    f"hosts: got process {process} of {others} on {host}"
    + (f", and one of that number on {first}" if first else "")
    + f"; expected each of {count}, once. Correct its number."
  )
  print(f"warning: {text}", file=sys.stderr, flush=True)
  _tell([line], "no", text)
  line.close()
  return None


def _tell(lines: Any, kind: str, text: str = "") -> None:
  for line in lines:
    with contextlib.suppress(OSError):  # It ended; that is found elsewhere.
      line.sendall(json.dumps([kind, text]).encode() + b"\n")


def _visit(where: tuple[str, int], process: int, count: int) -> None:
  """Comes to the first process, as often as it takes."""
  begin, said = time.monotonic(), 1
  hello = json.dumps([process, count, socket.gethostname()]).encode()
  while True:
    try:
      kind, text = _ask(where, hello)
    except (ValueError, TypeError):
      kind, text = "", "another program answers there"
    except OSError as error:
      kind, text = "", str(error)
    if kind == "go":
      return
    if kind == "no":
      raise ValueError(text)
    passed = time.monotonic() - begin
    text = (
      f"hosts: process {process} of {count} did not reach process 0 at "
      f"{where[0]}:{where[1]} in {passed:.0f} s ({text})"
    )
    if passed > PATIENCE:
      raise ValueError(f"{text}. Start it, or look at its output.")
    if passed > said * WORD:
      said += 1
      print(f"{text}; waiting ...", file=sys.stderr, flush=True)
    time.sleep(min(0.5, WORD / 4))


def _ask(where: tuple[str, int], hello: bytes) -> tuple[str, str]:
  """The last word of the first process, 'go' or 'no'; prints those before."""
  with socket.create_connection(where, timeout=5) as line:
    line.sendall(hello)
    line.settimeout(PATIENCE + WORD)
    with line.makefile("r") as answers:
      for kind, text in map(json.loads, answers):
        if kind != "wait":
          return kind, text
        print(text, file=sys.stderr, flush=True)
  return "", "it ended"
