"""A workdir in a bucket: a lease, and a copy of a folder of this machine.

    gs://bucket/run/
      lease/00000003               who writes; the highest number has it
      metrics.jsonl.parts/0001-000007   lines appended, joined by readers
      config.json, evals/...       written whole
      export/, adapter/            complete once config.json, of the adapters
                                   adapter_config.json, is there: it comes last
      checkpoints/17/              of gs:// by Orbax itself, complete by its
                                   commit_success.txt; of s3:// a copy,
                                   complete by its _CHECKPOINT_METADATA

Stores have no locks, renames or appending: only a precondition, that an object
is new. Every process starts from what is in the bucket, the first one writes.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sft_jax.common import distributed, workdir
from sft_jax.common.buckets import storage

# Seconds between signs of life, and after which a run without one is over.
BEAT, LAPSE = 10.0, 60.0
# Appended to line by line.
_LOGS = ("metrics.jsonl", "incidents.jsonl")
_MOST_PARTS = 500  # Then they are joined in one.
# What makes a folder one; it is written last.
MARKERS = {
  "export": "config.json",
  "adapter": "adapter_config.json",
  "checkpoints": "_CHECKPOINT_METADATA",
}
_LEASE = "lease"
_mirrors: dict[Path, "Mirror"] = {}


def folder(path: str | Path) -> Path:
  """Where a workdir's files are on this machine; of a bucket's a process's."""
  if not storage.is_remote(path):
    return Path(path)
  storage.check_scheme(path, "workdir", ("gs", "s3"))
  return _home(path) / f"process_{jax.process_index()}"


def cache(path: str | Path) -> Path:
  """Where a run's encoded rows are, for all processes of this machine."""
  return (_home if storage.is_remote(path) else Path)(path) / "cache"


def _home(url: str | Path) -> Path:
  key = hashlib.sha256(str(url).rstrip("/").encode()).hexdigest()[:24]
  return storage.cache_folder() / "workdirs" / key


class Lease:
  """Who writes in a remote workdir: the highest of numbered objects.

  Taking it makes the next number, which must be new: of two that try, the
  store lets one. Nobody trusts a clock: a lease is over once its object has
  not changed for LAPSE seconds while the next run watched it.
  """

  def __init__(self, url: str):
    """`url`: the workdir's."""
    self._url, self._number, self._beats = url, 0, 0
    self._me = {
      "process": os.getpid(),
      "host": socket.gethostname(),
      "processes": _process_namespace(),
      "id": uuid.uuid4().hex,
    }

  def _newest(self) -> tuple[int, dict[str, Any] | None]:
    """(the highest number, what it holds); (0, None) where there is none."""
    names = storage.list_objects(storage.join(self._url, _LEASE))
    numbers = [int(name) for name in names if name.isdigit()]
    if not numbers:
      return 0, None
    with contextlib.suppress(FileNotFoundError, ValueError):
      return max(numbers), json.loads(storage.read(self._object(max(numbers))))
    return max(numbers), None

  def _object(self, number: int) -> str:
    return storage.join(self._url, _LEASE, f"{number:08d}")

  def acquire(self) -> None:
    """Takes the lease, after another's has lapsed.

    Raises:
      ValueError: another run shows signs of life; names its process and host.
    """
    for _ in range(5):  # Others may be faster.
      number, held = self._newest()
      if held and not held.get("released") and not self._is_dead(held):
        self._watch(number, held)
      self._number = number + 1
      with contextlib.suppress(FileExistsError):
        storage.write(self._object(self._number), self._text(), new=True)
      # A store may answer "exists" when an answer was lost and asked again.
      with contextlib.suppress(FileNotFoundError, ValueError):
        now = json.loads(storage.read(self._object(self._number)))
        if now["id"] == self._me["id"]:
          for old in range(max(1, self._number - 9), self._number):
            storage.remove(self._object(old))
          return
    raise ValueError(
      f"{self._url}: other runs took its lease 5 times, expected one run at a "
      "time. End them, or choose another workdir."
    )

  def _is_dead(self, held: dict[str, Any]) -> bool:
    """Whether it was a process of this machine that is no more."""
    here = ("host", "processes")
    if any(held.get(name) != self._me[name] for name in here):
      return False
    try:
      os.kill(held["process"], 0)
    except OSError as error:
      return isinstance(error, ProcessLookupError)
    return False

  def _watch(self, number: int, held: dict[str, Any]) -> None:
    """Returns once a lease has lapsed or is let go; ValueError at a sign of
    life, which neither an older listing nor an object cut short is."""
    who = f"process {held['process']} on {held['host']}"
    print(
      f"{self._url}: in use by {who} when last heard of; waiting {LAPSE:.0f} s "
      "for a sign of life ...",
      file=sys.stderr,
    )
    began = time.monotonic()
    while time.monotonic() - began < LAPSE:
      time.sleep(min(1.0, BEAT / 4))
      newest, now = self._newest()
      if newest == number and now and now.get("released"):
        return
      if newest > number or (newest == number and now and now != held):
        raise ValueError(
          f"{self._url}: in use by {who}, expected one run at a time. Wait for "
          "it, end it, or choose another workdir."
        )

  def check(self) -> None:
    """Raises OSError if another run has taken the lease since."""
    number, held = self._newest()
    other = held is not None and held["id"] != self._me["id"]
    if number < self._number or (number == self._number and not other):
      return
    who = f"process {held['process']} on {held['host']}" if held else "another"
    raise OSError(
      f"{self._url}: its lease was taken by {who}, as this run had shown no "
      f"sign of life for {LAPSE:.0f} s; expected this run to have it. Nothing "
      "more is written; the other run goes on."
    )

  def beat(self) -> None:
    """A sign of life."""
    self.check()
    self._beats += 1
    storage.write(self._object(self._number), self._text())

  def release(self) -> None:
    """Lets the next run begin at once."""
    self._me["released"] = True
    storage.write(self._object(self._number), self._text())

  def _text(self) -> bytes:
    return json.dumps({**self._me, "beats": self._beats}).encode()


def _process_namespace() -> str:
  """Where a process's number means the same process; '' = not known."""
  try:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return uuid.uuid4().hex


class Mirror:
  """A folder of this machine and what a bucket has of it."""

  def __init__(self, url: str, folder: Path, lease: Lease | None = None):
    """Nothing is read or written yet; `lease`: of who writes."""
    self._url, self._folder, self._lease = url.rstrip("/"), folder, lease
    self._copies_steps = url.startswith("s3://")
    self._lock = threading.Lock()
    self._sent: dict[str, tuple[int, int]] = {}  # (mtime, size) of files.
    # Of logs: generation, parts, bytes and their digest.
    self._logs: dict[str, tuple[int, int, int, str]] = {}

  # -- From the bucket ------------------------------------------------------

  def pull(self, *, checkpoints: bool = True) -> None:
    """Makes the folder what the bucket has, but for exports.

    `checkpoints`: those of s3:// as well; Orbax reads those of gs:// itself.

    Raises OSError: a part of a record is missing, or see `storage.explained`.
    """
    for old in self._folder.glob("*"):
      if old.name != "lock":
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    self._folder.mkdir(parents=True, exist_ok=True)
    names = storage.list_objects(self._url)
    checkpoints = checkpoints and self._copies_steps
    skipped = (_LEASE, "export", "adapter")
    for log in _LOGS:
      self._join(log, [name for name in names if name.startswith(log + ".")])
    marked = {
      name.split("/")[1]
      for name in names
      if re.fullmatch(rf"checkpoints/\d+/{MARKERS['checkpoints']}", name)
    }
    for name in names:
      top, *rest = name.split("/")
      if top in skipped or top.startswith(".") or ".parts/" in name:
        continue
      wanted = checkpoints and rest and rest[0] in marked
      if top.startswith("checkpoints") and not wanted:
        continue
      target = self._folder / name
      storage.download(storage.join(self._url, name), target, names[name])
      self._sent[name] = _stamp(target)

  def _join(self, log: str, names: list[str]) -> None:
    """Writes a record from its parts, those of the newest generation."""
    parts = sorted(name.rpartition("/")[2] for name in names)
    if not parts:
      return
    generation = parts[-1].partition("-")[0]
    parts = [part for part in parts if part.startswith(generation)]
    if parts[-1] != f"{generation}-{len(parts):06d}":
      raise OSError(
        f"{self._url}/{log}.parts: got {len(parts)} parts up to {parts[-1]}, "
        "expected all of them. Put the missing ones back, or list again: a "
        "store may be slow to show what was written."
      )
    data = b"".join(
      storage.read(storage.join(self._url, f"{log}.parts", part))
      for part in parts
    )
    (self._folder / log).write_bytes(data)
    self._logs[log] = (int(generation), len(parts), len(data), _digest(data))

  # -- To the bucket --------------------------------------------------------

  def push(self) -> None:
    """Copies what has changed; records first, and exports once complete.

    Raises OSError: another run has taken the lease, or see `storage.explained`.
    """
    with self._lock:
      if self._lease:
        self._lease.check()
      for log in _LOGS:
        if (self._folder / log).exists():
          self._push_log(log)
      for file in sorted(self._folder.rglob("*")):
        name = file.relative_to(self._folder).as_posix()
        top = name.split("/")[0]
        if (
          top in (*MARKERS, *_LOGS, "lock")
          or any(part.startswith(".") for part in name.split("/"))
          or name.endswith(".part")
        ):
          continue
        with contextlib.suppress(FileNotFoundError):  # Replaced meanwhile.
          if file.is_file() and self._sent.get(name) != (now := _stamp(file)):
            storage.upload(file, storage.join(self._url, name))
            self._sent[name] = now
      for name in ("export", "adapter"):
        marker = self._folder / name / MARKERS[name]
        if marker.exists() and self._sent.get(name) != (now := _stamp(marker)):
          url = storage.join(self._url, name)
          storage.upload_folder(marker.parent, url, marker.name)
          self._sent[name] = now
      if self._copies_steps:
        self._push_steps()

  def _push_log(self, log: str) -> None:
    """Writes the lines since the last part; all again if others are gone."""
    data = (self._folder / log).read_bytes()
    data = data[: data.rfind(b"\n") + 1]  # What is being written comes next.
    generation, parts, sent, digest = self._logs.get(log, (0, 0, 0, ""))
    url = storage.join(self._url, f"{log}.parts")
    again = _digest(data[:sent]) != digest or parts >= _MOST_PARTS
    if again:
      generation, parts, sent = generation + 1, 0, 0
    if len(data) > sent or again:
      part = f"{generation:04d}-{parts + 1:06d}"
      storage.write(storage.join(url, part), data[sent:])
      state = (generation, parts + 1, len(data), _digest(data))
      self._logs[log] = state
    if again:  # Readers take the newest generation; the others are waste.
      for name in storage.list_objects(url):
        if int(name.partition("-")[0]) < generation:
          storage.remove(storage.join(url, name))

  def _push_steps(self) -> None:
    """Copies checkpoints that are whole, and removes those that are gone."""
    here = {
      p.name for p in self._folder.glob("checkpoints/*") if p.name.isdigit()
    }
    url = storage.join(self._url, "checkpoints")
    marker, whole = MARKERS["checkpoints"], False
    for step in sorted(here, key=int):
      name = f"checkpoints/{step}/{marker}"
      # Orbax may delete it meanwhile; then a newer one is there.
      with contextlib.suppress(FileNotFoundError):
        if self._sent.get(name) != (now := _stamp(self._folder / name)):
          folder = (self._folder / name).parent
          storage.upload_folder(folder, storage.join(url, step), marker)
          self._sent[name] = now
        whole = True
    there = {name.split("/")[0] for name in storage.list_objects(url)}
    # Not the last that is whole there, whatever is here.
    for step in there - here if whole else ():
      storage.remove(storage.join(url, step, marker))
      storage.remove(storage.join(url, step))


def _stamp(file: Path) -> tuple[int, int]:
  found = file.stat()
  return found.st_mtime_ns, found.st_size


def _digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest() if data else ""


@contextlib.contextmanager
def opened(url: str, folder: Path) -> Iterator[None]:
  """Holds a workdir while a run lives; of a bucket's, its lease and its copy.

  Raises:
    ValueError: another run has it; names its process and host.
    OSError: it cannot be written; or the lease was lost.
  """
  with workdir.locked(folder):
    if not storage.is_remote(url):
      yield
      return
    if jax.process_count() > 1 and not url.startswith("gs://"):
      raise ValueError(
        f"workdir: got {url} with {jax.process_count()} processes, expected "
        "gs:// or a folder that they share: they write one checkpoint "
        "together. Use one process, or another place."
      )
    lease = Lease(url)
    mirror = Mirror(url, folder, lease)
    first = jax.process_index() == 0
    if first:
      lease.acquire()
    distributed.barrier("sft_jax.remote_workdir")
    mirror.pull()
    if not first:
      yield
      return
    over = threading.Event()
    keeper = threading.Thread(
      target=_keep, args=(lease, mirror, over), daemon=True
    )
    keeper.start()
    _mirrors[folder] = mirror
    try:
      yield
    finally:
      over.set()
      keeper.join()
      del _mirrors[folder]
      try:
        mirror.push()
      finally:
        lease.release()


def _keep(lease: Lease, mirror: Mirror, over: threading.Event) -> None:
  """Shows signs of life, and copies what there is."""
  while not over.wait(BEAT):
    try:
      lease.beat()
      mirror.push()
    except OSError as error:
      print(f"warning: {error}", file=sys.stderr)
      if "its lease was taken" in str(error):
        os.kill(os.getpid(), signal.SIGTERM)  # The run ends at its next step.
        return


def push(folder: Path) -> None:
  """Copies what a run has recorded; for a checkpoint that is to follow.

  Raises OSError: another run has taken the lease, or see `storage.explained`.
  """
  if mirror := _mirrors.get(folder):
    mirror.push()


@contextlib.contextmanager
def copied(path: str | Path, *, checkpoints: bool = False) -> Iterator[Path]:
  """A workdir to read: the folder, or a copy of what a bucket has now.

  `checkpoints`: those of s3:// as well, see `Mirror.pull`.
  """
  if not storage.is_remote(path):
    yield Path(path)
    return
  with tempfile.TemporaryDirectory(prefix="sft_jax-workdir-") as copy:
    Mirror(str(path), Path(copy)).pull(checkpoints=checkpoints)
    yield Path(copy)


def share(folder: Path, url: str) -> None:
  """Gives every process the folder that the first one has written.

  By way of a bucket, where processes have no folder in common.
  """
  if jax.process_count() == 1 or not storage.is_remote(url):
    return
  there = storage.join(url, ".shared")
  if jax.process_index() == 0:
    storage.upload_folder(folder, there, "config.json")
  distributed.barrier("sft_jax.share")
  if jax.process_index():
    for name, info in storage.list_objects(there).items():
      storage.download(storage.join(there, name), folder / name, info)
  distributed.barrier("sft_jax.shared")
  if jax.process_index() == 0:
    storage.remove(there)


def is_run(url: str) -> bool:
  """Whether an address is of a remote workdir, and not of a model."""
  return url.startswith(("gs://", "s3://")) and storage.exists(
    storage.join(url, f"{_LOGS[0]}.parts")
  )
