"""The hub of this machine: what huggingface_hub asks to make and fill a model.

One repository, `name`, of one user; its files are kept in memory. Large files
come by LFS, as safetensors do, and are refused where their digest is wrong.
"""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN, NAME = "hf_of_tests", "me/model"


class FakeHub(BaseHTTPRequestHandler):
  """Answers; its server has `files`, `private`, `blobs`, `cards`, `asked`."""

  def log_message(self, *_):
    pass

  def _answer(self, status, body):
    data = json.dumps(body).encode()
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    if status == 404:
      self.send_header("X-Error-Code", "RepoNotFound")
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def _respond(self):
    hub, path = self.server, self.path.partition("?")[0]
    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    hub.asked.append(f"{self.command} {path}")
    if path.startswith("/blob/"):
      hub.blobs[path[6:]] = body
      right = hashlib.sha256(body).hexdigest() == path[6:]
      return self._answer(200 if right else 400, {})
    if self.headers.get("Authorization") != f"Bearer {TOKEN}":
      return self._answer(401, {"error": "Invalid username or password."})
    if path == "/api/whoami-v2":
      return self._answer(200, {"name": "me", "type": "user"})
    if path == "/api/repos/create":
      asked = json.loads(body)
      if asked["organization"] != "me":
        return self._answer(403, {"error": "You don't have the rights."})
      there = hub.files is not None
      hub.private = hub.private or asked.get("visibility") == "private"
      hub.files = hub.files or {}
      return self._answer(409 if there else 200, {"url": f"{hub.url}/{NAME}"})
    if path == "/api/validate-yaml":
      hub.cards.append(json.loads(body)["content"])
      return self._answer(200, {"warnings": [], "errors": []})
    own = path.startswith((f"/api/models/{NAME}", f"/{NAME}.git"))
    if hub.files is None or not own:
      return self._answer(404, {"error": "Repository not found"})
    if "/preupload/" in path:
      mode = lambda name: "lfs" if name.endswith("tensors") else "regular"
      asked = [file["path"] for file in json.loads(body)["files"]]
      found = [
        {"path": name, "uploadMode": mode(name), "shouldIgnore": False}
        for name in asked
      ]
      return self._answer(200, {"files": found})
    if path.endswith("/objects/batch"):
      asked = json.loads(body)["objects"]
      place = lambda oid: {"upload": {"href": f"{hub.url}/blob/{oid}"}}
      found = [one | {"actions": place(one["oid"])} for one in asked]
      return self._answer(200, {"transfer": "basic", "objects": found})
    if "/commit/" in path:
      for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "deletedFile":
          del hub.files[value["path"]]
        elif line["key"] == "lfsFile":
          hub.files[value["path"]] = hub.blobs[value["oid"]]
        elif line["key"] == "file":
          hub.files[value["path"]] = base64.b64decode(value["content"])
      url = f"{hub.url}/{NAME}/commit/{'a' * 40}"
      return self._answer(200, {"commitUrl": url, "commitOid": "a" * 40})
    if "/tree/" in path:
      files = [
        {"type": "file", "path": name, "size": len(x), "oid": "b" * 40}
        for name, x in hub.files.items()
      ]
      return self._answer(200, files)
    return self._answer(200, {"id": NAME, "sha": "a" * 40, "siblings": []})

  do_GET = do_POST = do_PUT = _respond


@contextlib.contextmanager
def opened(monkeypatch):
  """A hub that huggingface_hub takes for its own, while it is open."""
  server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
  server.url = f"http://127.0.0.1:{server.server_port}"
  server.files, server.private, server.blobs = None, False, {}
  server.cards, server.asked = [], []
  monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
  # Xet is a protocol of its own; LFS is what the library does without it.
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
  monkeypatch.setenv("HF_TOKEN", TOKEN)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    thread.join()
    server.server_close()
