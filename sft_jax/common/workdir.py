"""The folder of a run: one process at a time, files whole, incidents kept."""

import contextlib
import datetime
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from sft_jax.common import distributed

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


def read_json(path: Path) -> Any:
  """What is in a JSON file of a workdir; ValueError where it is damaged."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(
      f"{path}: is damaged ({error}), expected JSON. Resuming the run writes "
      "it again."
    ) from error


def find_json(path: Path) -> Any:
  """The same; None where it is missing, or damaged, which stderr says."""
  try:
    return read_json(path)
  except FileNotFoundError:
    return None
  except ValueError as error:
    print(f"warning: {error}", file=sys.stderr)
    return None


def write_json(path: Path, value: Any) -> None:
  """Writes a file whole or not at all; the first process writes for all."""
  text = json.dumps(value, indent=2) + "\n"
  if jax.process_index() == 0:
    write_text(path, text)


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
  """The same of a file of one value per line."""
  text = "".join(json.dumps(row) + "\n" for row in rows)
  if jax.process_index() == 0:
    write_text(path, text)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a file whole or not at all, whichever process calls it."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  try:
    with part.open("w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)
  sync_folder(path.parent)


def digest(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def replace_folder(
  path: Path, marker: str, write: Callable[[Path], None]
) -> None:
  """Fills a folder beside `path`, then puts it in its place: all or nothing.

  Of several processes every one calls `write`, which may gather arrays, and
  only the first may write.

  Raises ValueError: `path` holds something else than a folder with a `marker`.
  """
  first = jax.process_index() == 0
  fresh = path.with_name(f".{path.name}.writing")
  old = path.with_name(f".{path.name}.replaced")
  if first:
    if path.exists() and not (
      path.is_dir() and ((path / marker).exists() or not any(path.iterdir()))
    ):
      raise ValueError(
        f"{path}: exists and is not a model folder (no {marker}); expected a "
        "new, an empty or a model folder. Choose another path."
      )
    path.parent.mkdir(parents=True, exist_ok=True)
    # What a killed process left behind.
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
  distributed.barrier("sft_jax.replace_folder")
  try:
    write(fresh)
    distributed.barrier("sft_jax.replace_folder")
    if first:
      sync_tree(fresh)
      if path.exists():
        path.rename(old)
      fresh.rename(path)
      sync_folder(path.parent)
  finally:
    if first:
      shutil.rmtree(fresh, ignore_errors=True)
      shutil.rmtree(old, ignore_errors=True)
  distributed.barrier("sft_jax.replace_folder")


def sync_folder(folder: Path) -> None:
  """Names that a folder has now are there after a power cut."""
  if os.name != "posix":  # Windows opens no folders.
    return
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def sync_tree(folder: Path) -> None:
  """And all that is below it; what others remove meanwhile is left out."""
  for place, _, names in os.walk(folder, topdown=False):
    for name in names:
      with (
        contextlib.suppress(FileNotFoundError),
        (Path(place) / name).open("rb+" if os.name == "nt" else "rb") as file,
      ):
        os.fsync(file.fileno())
    sync_folder(Path(place))


def wall_clock() -> str:
  """The time of day, which may jump: for people, and for time between runs."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def seconds_between(first: str, second: str) -> float:
  """Of two of `wall_clock`; 0 where it jumped back."""
  begin, end = map(datetime.datetime.fromisoformat, (first, second))
  return max(0.0, (end - begin).total_seconds())


class Incidents:
  """incidents.jsonl: what happened to a run that is not in its plan.

  One object per line: 'time' (of the clock on the wall), 'kind', 'step' and
  'message'. Kinds are resumed, rejected (a checkpoint), halted and skipped (bad
  steps), records lost, forced (another config or data), and stopped.
  """

  def __init__(self, workdir: Path):
    self._path = workdir / "incidents.jsonl"

  def add(
    self, kind: str, step: int | None, message: str, **figures: float
  ) -> None:
    """Appends a line, down to the disk; `figures` are further keys of it."""
    if jax.process_index():
      return
    line = {"time": wall_clock(), "kind": kind, "step": step, **figures}
    line["message"] = message
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
