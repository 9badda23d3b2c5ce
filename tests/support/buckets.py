"""Buckets on this machine: emulators of gs:// and s3://, and their faults.

    python tests/support/buckets.py FOLDER

runs both behind a proxy until it is killed, and writes FOLDER/env.json. Before
each request the proxy looks at FOLDER/faults.json:

    {"kind": "503", "match": "regex of method and path", "times": 3,
     "every": 1, "seen": 0}

Of the requests that match each `every`-th meets one of the kinds, in turn,
until it was `times`. kind: a status; 'drop' (the connection ends without an
answer); 'torn' (it ends in one); 'late' (all is done, but nobody hears of it);
'slow' (half a second); 'stale' (a listing of before). The emulator of gs://
knows no preconditions and no generations: the proxy checks ifGenerationMatch=0,
and that what is asked of a generation is of that one.
"""

import base64
import hashlib
import http.client
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.utils import glob_translate

BUCKET = "bucket-of-tests"
_CLIENTS = ("gcsfs", "s3fs", "gcp_storage_emulator", "moto")
missing = [name for name in _CLIENTS if not importlib.util.find_spec(name)]
remote = pytest.mark.skipif(
  bool(missing), reason=f"needs {missing}: the [remote-test] extra"
)
# Emulators take a second to start, and clients of theirs to wait for one.
marks = (remote, pytest.mark.slow)
gs, s3 = (pytest.param(scheme, marks=marks) for scheme in ("gs", "s3"))
both = pytest.mark.parametrize("scheme", [gs, s3])
# What needs no faults of a server is tested everywhere, without one.
every = pytest.mark.parametrize("scheme", ["memory", gs, s3])


class Memory(MemoryFileSystem):
  """A store without a server, for tests where there is no client of one."""

  store: dict = {}  # noqa: RUF012
  cachable = False

  def info(self, path, **_):
    found = super().info(path)
    if found["type"] == "file":
      data = self.cat_file(path)
      found["md5Hash"] = base64.b64encode(hashlib.md5(data).digest()).decode()
    return found | {"name": found["name"].lstrip("/")}

  def find(self, path, detail=False, **_):
    names = [name.lstrip("/") for name in super().find(path)]
    return {name: self.info(name) for name in names}

  def rm(self, path, recursive=False, maxdepth=None):
    for name in [*self.store]:
      if name == f"/{path}" or (recursive and name.startswith(f"/{path}/")):
        del self.store[name]

  def glob(self, path, detail=False, **_):
    wanted = re.compile(glob_translate(path))
    found = self.find(path.partition("/")[0], detail=True)
    return {name: one for name, one in found.items() if wanted.match(name)}


class Proxy(BaseHTTPRequestHandler):
  """Forwards to `backend`, with the faults that a file asks for."""

  protocol_version = "HTTP/1.1"
  backend = 0
  faults = Path()
  lock = threading.Lock()
  creating = threading.Lock()
  lists: dict[str, tuple] = {}  # noqa: RUF012

  def log_message(self, *_):
    pass

  def fault(self) -> str:
    with self.lock:
      try:
        asked = json.loads(self.faults.read_text())
      except (OSError, ValueError):
        return ""
      line = f"{self.command} {self.path}"
      if not asked["times"] or not re.search(asked["match"], line):
        return ""
      asked["seen"] += 1
      hit = asked["seen"] % asked["every"] == 0
      asked["times"] -= hit
      self.faults.write_text(json.dumps(asked))
      kinds = asked["kind"].split(",")
      return kinds[asked["times"] % len(kinds)] if hit else ""

  def ask(self, body: bytes) -> tuple[int, list, bytes]:
    there = http.client.HTTPConnection("127.0.0.1", self.backend, timeout=60)
    try:
      headers = {k: v for k, v in self.headers.items() if k != "Connection"}
      there.request(self.command, self.path, body, headers)
      answer = there.getresponse()
      return answer.status, answer.getheaders(), answer.read()
    finally:
      there.close()

  def is_there(self) -> bool:
    """Whether the object that an upload names exists."""
    url = urlsplit(self.path)
    name = parse_qs(url.query).get("name", [""])[0]
    if not name:
      return b'"name"' in self.body and self.exists(
        url.path, json.loads(re.search(rb"{.*?}", self.body, re.S)[0])["name"]
      )
    return self.exists(url.path, name)

  def generation(self) -> str:
    """Of the object that a path names."""
    there = http.client.HTTPConnection("127.0.0.1", self.backend, timeout=60)
    path = urlsplit(self.path).path.replace("/download/", "/")
    there.request("GET", path)
    answer = there.getresponse()
    text = answer.read()
    there.close()
    return json.loads(text)["generation"] if answer.status == 200 else ""

  def exists(self, path: str, name: str) -> bool:
    there = http.client.HTTPConnection("127.0.0.1", self.backend, timeout=60)
    bucket = re.search(r"/b/([^/]+)/", path)[1]
    there.request("GET", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}")
    status = there.getresponse().status
    there.close()
    return status == 200

  def answer(self, status: int, headers: list, body: bytes, cut: bool) -> None:
    self.send_response_only(status)
    plain = [h for h in headers if h[0].lower() not in _HOPS]
    # A HEAD has the length of what a GET would bring.
    if self.command == "HEAD":
      plain += [h for h in headers if h[0].lower() == "content-length"]
    else:
      plain.append(("Content-Length", str(len(body))))
    for name, value in plain:
      self.send_header(name, value)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body[: len(body) // 2] if cut else body)
    self.close_connection = self.close_connection or cut

  def do(self) -> None:
    self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    if self.headers.get("Transfer-Encoding", "") == "chunked":
      while size := int(self.rfile.readline(), 16):
        self.body += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
      del self.headers["Transfer-Encoding"]
    fault = self.fault()
    if fault == "drop":
      self.close_connection = True
      return
    if fault.isdigit():
      self.answer(int(fault), [], b'{"error": {"message": "made up"}}', False)
      return
    if fault == "slow":
      time.sleep(0.5)
    if fault == "stale" and self.path in self.lists:
      self.answer(*self.lists[self.path], False)
      return
    wanted = parse_qs(urlsplit(self.path).query).get("generation", [""])[0]
    if wanted and wanted != self.generation():
      found = 404, [], b'{"error": {"message": "No such object"}}'
    elif "ifGenerationMatch=0" in self.path:
      with self.creating:
        if self.is_there():
          found = 412, [], b'{"error": {"message": "conditionNotMet"}}'
        else:
          found = self.ask(self.body)
    else:
      found = self.ask(self.body)
    if fault == "late":
      self.close_connection = True
      return
    if self.command == "GET" and "prefix=" in self.path:
      self.lists[self.path] = found
    self.answer(*found, fault == "torn")

  do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = do


_HOPS = ("content-length", "connection", "transfer-encoding", "date", "server")


def serve(folder: Path) -> None:
  """Both emulators and their proxies, in this process."""
  from gcp_storage_emulator.server import create_server
  from moto.server import ThreadedMotoServer

  google = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
  google.start()
  amazon = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
  amazon.start()
  backends = google._api._httpd.server_port, amazon.get_host_and_port()[1]
  ports = []
  for backend in backends:
    proxy = type(
      "P", (Proxy,), {"backend": backend, "faults": folder / "faults.json"}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ports.append(server.server_port)
  there = http.client.HTTPConnection("127.0.0.1", backends[1])
  there.request("PUT", f"/{BUCKET}")
  assert there.getresponse().status == 200
  gs, s3 = (f"http://127.0.0.1:{port}" for port in ports)
  part = folder / "env.part"
  part.write_text(
    json.dumps(
      {
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "STORAGE_EMULATOR_HOST": gs,
        "TENSORSTORE_GCS_HTTP_URL": gs,
        "GOOGLE_CLOUD_PROJECT": "tests",
        "NO_GCE_CHECK": "true",
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
      }
    )
  )
  part.rename(folder / "env.json")
  parent = os.getppid()
  while os.getppid() == parent:
    time.sleep(1)
  os._exit(0)  # The emulators' threads would go on.


class Buckets:
  """The emulators, in a process of their own; their environment in `env`."""

  def __init__(self, folder: Path):
    self._folder = folder
    self._process = subprocess.Popen(
      [sys.executable, __file__, str(folder)],
      stdout=(folder / "log.txt").open("w"),
      stderr=subprocess.STDOUT,
    )
    for _ in range(600):
      if (folder / "env.json").exists():
        break
      assert self._process.poll() is None, (folder / "log.txt").read_text()
      time.sleep(0.1)
    self.env = json.loads((folder / "env.json").read_text())
    self.env["XDG_CACHE_HOME"] = str(folder / "cache")

  def fail(
    self, kind: str, match: str = "", times: int = 1, every: int = 1
  ) -> None:
    """The next requests that match get a fault, or some of them."""
    asked = {"kind": kind, "match": match, "times": times}
    asked |= {"every": every, "seen": 0}
    (self._folder / "faults.json").write_text(json.dumps(asked))

  def left(self) -> int:
    """How many faults nobody has met."""
    return json.loads((self._folder / "faults.json").read_text())["times"]

  def close(self) -> None:
    self._process.kill()
    self._process.wait()


if __name__ == "__main__":
  serve(Path(sys.argv[1]))
