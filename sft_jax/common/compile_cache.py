"""Compiled programs kept on disk, so that the second start does not compile.

JAX does the keeping. Here is where: a folder of one user, for one kind of
processor, as JAX's key does not tell CPUs apart.
"""

import ctypes
import hashlib
import os
import platform
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from jax._src import lru_cache
from jax.experimental.compilation_cache import compilation_cache

from sft_jax.common.buckets import storage

# Of what JAX asks to be kept; what compiles faster is not worth a file.
_MIN_SECONDS = 0.2
_HIT = "/jax/compilation_cache/cache_hits"

# What a step is compiled with, by a part of the device's kind. On v6e XLA cuts
# each gathered product into permuted slices ("collective matmul"), and products
# fall to 30 % of the peak: never below a size that no product has.
_OPTIONS: dict[str, dict[str, Any]] = {
  "TPU v6": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
}


def compiler_options(device_kind: str) -> dict[str, Any]:
  """Those with which a training step is compiled for this kind of device."""
  return next((o for k, o in _OPTIONS.items() if k in device_kind), {})


@contextmanager
def opened(path: str, log: Callable[[str], None]) -> Iterator[None]:
  """Keeps what is compiled inside in a folder, and looks there first.

  `path` may be of gs://; 'auto' is a folder under the user's cache; '' leaves
  JAX's settings, such as JAX_COMPILATION_CACHE_DIR, alone. `log` is called if
  others may write there: what is read there is executed.

  Raises OSError: the folder cannot be made.
  """
  if not path:
    yield
    return
  try:
    folder = _own_folder() if path == "auto" else Path(path).resolve()
    if storage.is_remote(path):  # JAX writes there itself.
      folder = path
  except RuntimeError as error:  # No HOME, and a user that nobody knows.
    log(f"compile_cache: none ({error}); name a folder to have one.")
    yield
    return
  if isinstance(folder, Path):
    try:
      folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
      raise OSError(
        f"compile_cache: got {str(folder)!r}, which cannot be made "
        f"({error.strerror}); expected a folder, or '' for none. Correct it."
      ) from error
    if place := writable_by_others(folder):
      log(
        f"compile_cache: other users can write in {place}. Programs found "
        "there are run as they are: name a folder that only you can write to, "
        "or '' for none."
      )
  settings = {
    "jax_compilation_cache_dir": str(folder),
    "jax_persistent_cache_min_compile_time_secs": _MIN_SECONDS,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  _apply(settings)
  cache: Any = lru_cache.LRUCache
  put, most = cache.put, jax.config.values["jax_compilation_cache_max_size"]
  if isinstance(folder, Path) and most < 0:  # Stores keep objects whole.
    cache.put = _put_whole(log)
  try:
    yield
  finally:
    cache.put = put
    _apply(before)


def _put_whole(log: Callable[[str], None]) -> Callable[[Any, str, bytes], None]:
  """Keeps a program whole or not at all; what JAX's own way leaves of a program
  that a kill or a full disk has cut short is never replaced."""
  failed: list[OSError] = []

  def put(cache: Any, key: str, value: bytes) -> None:
    entry = cache.path / f"{key}-cache"
    part = cache.path / f".{os.getpid()}.part"
    try:
      if not entry.exists():
        part.write_bytes(value)
        part.replace(entry)
    except OSError as error:
      with suppress(OSError):
        part.unlink()
      if not failed:
        log(
          f"compile_cache: {cache.path} keeps no more programs ({error}); the "
          "next start compiles them again. Make room, or name another folder."
        )
      failed.append(error)

  return put


def _apply(settings: dict[str, Any]) -> None:
  for name, value in settings.items():
    jax.config.update(name, value)
  # What has compiled before has fixed whether and where there is a cache.
  compilation_cache.reset_cache()


def compiled(
  lowered: jax.stages.Lowered, options: dict[str, Any] | None = None
) -> tuple[jax.stages.Compiled, bool]:
  """The program, and whether it was found on disk rather than compiled. What
  the compiler took goes back to the system, where the C library can give it
  back (glibc): a third of a gigabyte for the step of a six-layer model."""
  heard: list[str] = []
  listen = lambda event, **_: heard.append(event)
  jax.monitoring.register_event_listener(listen)
  try:
    program = lowered.compile(options or None)
  finally:
    jax.monitoring.unregister_event_listener(listen)
  if sys.platform == "linux":
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
  return program, _HIT in heard


def _own_folder() -> Path:
  """Under the user's cache, one for each kind of processor."""
  base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  kind = platform.machine()
  info = Path("/proc/cpuinfo")
  if info.exists():  # Linux; elsewhere a home is seldom shared by machines.
    lines = info.read_text().splitlines()
    kinds = {x for x in lines if x.startswith(("model name", "flags"))}
    kind += "-" + hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()
  return Path(base) / "sft_jax" / "compiled" / kind[:24]


def writable_by_others(path: str | Path) -> Path | None:
  """The folder through which other users could change what is in `path`.

  That is `path` itself where others may write, or a folder above in which they
  may replace it; none with the sticky bit. What does not exist is judged by the
  folders that do. Root and a group with the user's own number are no others;
  access-control lists, and Windows, are not read.
  """
  if not hasattr(os, "getuid"):
    return None
  path, ours = Path(path).resolve(), (0, os.getuid())
  for folder in filter(Path.exists, (path, *path.parents)):
    found = folder.stat()
    by_group = found.st_mode & stat.S_IWGRP and found.st_gid not in ours
    written = by_group or found.st_mode & stat.S_IWOTH
    sticky = folder != path and found.st_mode & stat.S_ISVTX
    if found.st_uid not in ours or (written and not sticky):
      return folder
  return None
