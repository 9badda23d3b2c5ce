"""The folder of a run: one process at a time, incidents kept."""

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

try:
  import fcntl
except ImportError:  # Windows.
  fcntl = None


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
  """Holds the workdir while a run lives; the lock ends with its process.

  Raises:
    ValueError: another process has it; names process and host.
    OSError: the folder cannot be written.
  """
  if jax.process_index():  # The first process has it for all.
    yield
    return
  path = workdir / "lock"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
  except OSError as error:
    raise OSError(
      f"{workdir}: cannot be written ({error}), expected a folder that can. "
      "Change its permissions, or choose another workdir."
    ) from error
  with file:
    try:
      _lock(file.fileno())
    except (BlockingIOError, PermissionError) as error:
      file.seek(0)
      raise ValueError(
        f"{workdir}: in use by {file.read().strip() or 'a run'}, expected one "
        "run at a time. Wait for it, end it, or choose another workdir."
      ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield


def _lock(file: int) -> None:
  """Takes a file for this process alone; raises where another has it."""
  if fcntl:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  else:
    import msvcrt

    locking: Any = msvcrt  # Only Windows has its functions.
    locking.locking(file, locking.LK_NBLCK, 1)


class Incidents:
  """incidents.jsonl: what happened to a run that is not in its plan.

  One object per line: 'time' (of the clock on the wall, for people), 'kind',
  'step' and 'said'. Kinds are resumed, rejected (a checkpoint), halted and
  skipped (bad steps), records lost, forced (another config or data), and
  stopped.
  """

  def __init__(self, workdir: Path):
    """Opens the record of a run; the first process alone writes to it."""
    self._path = workdir / "incidents.jsonl"

  def add(self, kind: str, step: int | None, said: str) -> None:
    """Appends a line, down to the disk."""
    if jax.process_index():
      return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = {"time": now, "kind": kind, "step": step, "said": said}
    with self._path.open("a+b") as file:
      # A line that a crash cut short ends here.
      if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
          file.write(b"\n")
      file.write(json.dumps(line).encode() + b"\n")
      file.flush()
      os.fsync(file.fileno())

  def read(self) -> list[dict[str, Any]]:
    """All lines that are whole."""
    if not self._path.exists():
      return []
    found = []
    for line in self._path.read_text(errors="replace").splitlines():
      with contextlib.suppress(ValueError):  # Cut short by a crash.
        found.append(json.loads(line))
    return found
