"""Buckets: objects of gs:// and s3:// fetched, verified and written.

    gs://bucket/rows/*.jsonl -> ~/.cache/sft_jax/remote/KEY/rows/a.jsonl

fsspec's clients (gcsfs and s3fs, the [remote] extra) do the work: credentials,
retries of 429, 5xx and lost connections with growing waits. What is fetched is
kept by its address and by the digests that the store names, so that an object
that changes is another file here; a copy is compared with its digest.
"""

import base64
import contextlib
import fnmatch
import functools
import glob
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

try:
  import fcntl
except ImportError:  # Windows: two runs may fetch the same at once.
  fcntl = None

_CLIENTS = {"gs": "gcsfs", "s3": "s3fs"}
_RIGHTS = {
  ("gs", "read"): "storage.objects.get and .list, as in the role "
  "roles/storage.objectViewer",
  ("gs", "write"): "storage.objects.create, .delete, .get and .list, as in the "
  "role roles/storage.objectUser",
  ("s3", "read"): "s3:GetObject and s3:ListBucket",
  ("s3", "write"): "s3:PutObject, s3:DeleteObject, s3:GetObject and "
  "s3:ListBucket",
}
_CREDENTIALS = (
  *("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError"),
  *("DefaultCredentialsError", "RefreshError"),
)
TRIES = 3  # Of a copy that is not what the store says.


def is_remote(path: Any) -> bool:
  """Whether a path names its scheme.

  >>> [is_remote(x) for x in ("gs://b/run", "hf://o/n", "runs/demo", "C:/x")]
  [True, True, False, False]
  """
  return re.match(r"[a-z][\w+.-]*://", str(path)) is not None


def check_scheme(path: Any, where: str, schemes: Sequence[str] = ()) -> None:
  """Raises ValueError if the path has a scheme that a place does not take."""
  if is_remote(path) and str(path).partition("://")[0] not in schemes:
    taken = "".join(f", {scheme}://..." for scheme in schemes)
    raise ValueError(
      f"{where}: got {str(path)!r}, expected a local path{taken}. Copy it to "
      "one of these."
    )


def cache_folder() -> Path:
  """Where copies are: of the user, on this machine's disk."""
  base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  return Path(base) / "sft_jax"


def join(url: str, *names: str) -> str:
  return "/".join((url.rstrip("/"), *names))


@functools.cache
def _client(scheme: str) -> Any:
  if "STORAGE_EMULATOR_HOST" in os.environ:  # It has no gRPC to ask.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  try:
    import fsspec
    from fsspec import config

    if not importlib.util.find_spec(_CLIENTS[scheme]):
      raise ImportError(_CLIENTS[scheme])
  except ImportError as error:
    raise ValueError(
      f"{scheme}://: needs {_CLIENTS[scheme]}, which is not installed; "
      "expected it. pip install 'sft_jax[remote]'."
    ) from error
  # What others write and remove must be seen, by Orbax's client, too.
  for name in (scheme, "gcs"):
    config.conf.setdefault(name, {})["use_listings_cache"] = False
  return fsspec.filesystem(scheme)


def client(url: str) -> tuple[Any, str]:
  """(fsspec's file system, 'bucket/name') of an address.

  Raises:
    ValueError: another scheme than gs or s3, or its client is not installed.
  """
  check_scheme(url, "storage", tuple(_CLIENTS))
  scheme, _, path = url.partition("://")
  return _client(scheme), path


@contextlib.contextmanager
def explained(url: str, right: str) -> Iterator[None]:
  """Whatever a store's client raises, as one OSError of one line.

  Of reading FileNotFoundError is left as it is.

  Args:
    url: what is asked for.
    right: 'read' or 'write'.
  """
  try:
    yield
  except FileNotFoundError as error:
    if right == "read":
      raise
    raise OSError(
      f"{url}: there is no such bucket ({error}), expected one. Make it, or "
      "correct the address."
    ) from error
  except Exception as error:
    scheme, _, path = url.partition("://")
    said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    denied = (
      isinstance(error, PermissionError)
      or type(error).__name__ in _CREDENTIALS
      or str(getattr(error, "code", "")) in ("401", "403")
      or re.search("Forbidden|Invalid Credentials|AccessDenied", said)
    )
    bucket = path.partition("/")[0]
    if denied:
      raise PermissionError(
        f"{url}: may not {right} ({said}); expected credentials that have in "
        f"bucket {bucket} the right {_RIGHTS[scheme, right]}. Grant it to this "
        "machine's account, or log in with another."
      ) from error
    raise OSError(
      f"{url}: could not {right} ({said}), also when tried again; expected "
      f"bucket {bucket} to answer. Look at the network and the name of the "
      "bucket; the same command goes on."
    ) from error


def read(url: str) -> bytes:
  """An object, whole; FileNotFoundError where there is none."""
  fs, path = client(url)
  with explained(url, "read"):
    return fs.cat_file(path)


def write(url: str, data: bytes, *, new: bool = False) -> None:
  """Writes an object, whole or not at all.

  Raises:
    FileExistsError: with `new`, there is one: the store's own precondition.
  """
  fs, path = client(url)
  there = False
  with explained(url, "write"):
    try:
      fs.pipe_file(path, data, mode="create" if new else "overwrite")
    except Exception as error:
      said = f"{type(error).__name__} {getattr(error, 'code', '')} {error}"
      there = new and bool(re.search("FileExists|412", said))
      if not there:
        raise
  if there:
    raise FileExistsError(url)


def remove(url: str) -> None:
  """Removes an object, or all below a folder; none is no error."""
  fs, path = client(url)
  with explained(url, "write"), contextlib.suppress(FileNotFoundError):
    fs.rm(path, recursive=True)


def list_objects(url: str) -> dict[str, dict[str, Any]]:
  """{name below the folder, 'a/b': what the store says} of all objects."""
  fs, path = client(url)
  path = path.rstrip("/")
  with explained(url, "read"):
    try:
      found = fs.find(path, detail=True)
    except FileNotFoundError:
      return {}
  return {
    name[len(path) + 1 :]: info
    for name, info in sorted(found.items())
    if name.startswith(path + "/") and info["type"] == "file"
  }


def exists(url: str) -> bool:
  fs, path = client(url)
  with explained(url, "read"):
    return fs.exists(path)


def upload(file: Path, url: str) -> None:
  """Copies a file to an object, and compares what the store has with it.

  Raises OSError: it did not come whole; see `explained`.
  """
  fs, path = client(url)
  with explained(url, "write"):
    for _ in range(TRIES):
      fs.put_file(str(file), path)
      if is_copy(file, fs.info(path)):
        return
  raise OSError(
    f"{url}: holds something else than {file} after {TRIES} tries, expected "
    "a copy. Does another process write there?"
  )


def download(url: str, file: Path, info: dict[str, Any]) -> None:
  """Copies an object to a file, and compares it with what the store says.

  Raises OSError: it did not come whole; see `explained`.
  """
  fs, path = client(url)
  file.parent.mkdir(parents=True, exist_ok=True)
  for _ in range(TRIES):
    with explained(url, "read"):
      fs.get_file(path, str(file))
    if is_copy(file, info):
      return
  raise OSError(
    f"{url}: came with {file.stat().st_size} bytes, or others than the store's "
    f"digest says, expected {info['size']}, after {TRIES} tries. Is it being "
    "written?"
  )


def move_folder(url: str, target: str, marker: str) -> None:
  """Copies objects within the store, then removes them, the marker first."""
  fs, path = client(url)
  names = list_objects(url)
  with explained(url, "write"):
    for name in names:
      fs.cp_file(f"{path}/{name}", f"{client(target)[1]}/{name}")
  remove(join(url, marker))
  remove(url)


def upload_folder(folder: Path, url: str, marker: str) -> None:
  """Copies a folder; its file `marker`, without which it is none, comes last.

  What was there before is none from the beginning.
  """
  old = list_objects(url)
  remove(join(url, marker))
  files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
  names = {p.relative_to(folder).as_posix(): p for p in files}
  for name in sorted(names, key=lambda name: name == marker):
    if name == marker:
      for gone in old.keys() - names.keys():
        remove(join(url, gone))
    upload(names[name], join(url, name))


def fetch(
  url: str,
  patterns: Sequence[str] = ("*",),
  without: Sequence[str] = (),
  *,
  make: Callable[[str, Path, dict[str, Any]], None] = download,
  key: str = "",
) -> Path:
  """The local copy of an object, of a folder's, or of those of a glob.

  Fetched once per machine; an object that has changed is fetched again.

  Args:
    url: 'gs://bucket/a.jsonl', 'gs://bucket/folder', 'gs://bucket/*/a.json'.
    patterns: of names below the folder as `fnmatch` reads them.
    without: of those that are left.
    make: make(url, file, what the store says) fills a file.
    key: what else than the objects its copies depend on.

  Returns the file, or the folder that holds what was found below the folder, or
  below the part of a glob before its first magic character.

  Raises:
    FileNotFoundError: there is no such object.
    OSError: see `explained`, or copies that differ from what the store has.
  """
  fs, path = client(url)
  with explained(url, "read"):
    if glob.has_magic(path):
      start = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
      found = fs.glob(path, detail=True)
    elif fs.isfile(path):
      start, found = path.rpartition("/")[0], {path: fs.info(path)}
    else:
      start = path.rstrip("/")
      found = fs.find(start, detail=True)
  names = {
    name[len(start) + 1 :]: info
    for name, info in sorted(found.items())
    if info["type"] == "file"
    and any(fnmatch.fnmatch(name[len(start) + 1 :], p) for p in patterns)
    and not any(fnmatch.fnmatch(name[len(start) + 1 :], p) for p in without)
  }
  if not names:
    raise FileNotFoundError(f"{url}: no such object")
  if odd := [n for n in names if ".." in n.split("/") or n.startswith("/")]:
    raise OSError(f"{url}: holds {odd[0]!r}, expected names of files. Rename.")
  stamps = [[name, info["size"], stamp(info)] for name, info in names.items()]
  text = json.dumps([start, stamps, key])
  key = hashlib.sha256(text.encode()).hexdigest()[:24]
  home = cache_folder() / "remote" / key
  copy = home / (start.rpartition("/")[2] or "bucket")
  home.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
  with locked(copy):
    if not all(
      (copy / name).is_file() and (copy / name).stat().st_size == size
      for name, size, _ in stamps
    ):
      shutil.rmtree(home, ignore_errors=True)
      _fetch_all(url, start, names, copy, make)
  return copy / next(iter(names)) if path in found else copy


@contextlib.contextmanager
def locked(copy: Path) -> Iterator[None]:
  """No other process makes or removes a file of a copy's folder meanwhile."""
  remote = cache_folder().resolve() / "remote"
  key = copy.resolve().relative_to(remote).parts[0]
  with (remote / f"{key}.lock").open("w") as lock:
    if fcntl is not None:
      fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _fetch_all(
  url: str,
  start: str,
  names: dict[str, dict[str, Any]],
  copy: Path,
  make: Callable[[str, Path, dict[str, Any]], None],
) -> None:
  """Copies objects into a folder, whole or not at all."""
  scheme = url.partition("://")[0]
  part = Path(tempfile.mkdtemp(dir=copy.parents[1]))
  try:
    for name, info in names.items():
      make(f"{scheme}://{start}/{name}", part / copy.name / name, info)
    os.rename(part, copy.parent)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def stamp(info: dict[str, Any]) -> str:
  """What changes when an object does."""
  names = ("md5Hash", "crc32c", "generation", "etag", "ETag")
  # Some stores list it in milliseconds, and tell it in seconds.
  changed = str(info.get("LastModified", ""))[:19]
  return " ".join([*(str(info.get(name, "")) for name in names), changed])


def is_copy(file: Path, info: dict[str, Any]) -> bool:
  """Whether a file has the size, and where there is one the MD5, of an object.

  Objects that were put together of parts have none.
  """
  if file.stat().st_size != info["size"]:
    return False
  wanted = None
  if md5 := info.get("md5Hash"):
    wanted = base64.b64decode(md5).hex()
  elif found := re.fullmatch('"?([0-9a-f]{32})"?', str(info.get("ETag", ""))):
    # Of what KMS encrypts the tag is none.
    kms = str(info.get("ServerSideEncryption", "")).startswith("aws:kms")
    wanted = None if kms else found[1]
  if wanted is None:
    return True
  with file.open("rb") as opened:
    return hashlib.file_digest(opened, "md5").hexdigest() == wanted
