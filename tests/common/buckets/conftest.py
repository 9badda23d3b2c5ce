"""The emulators of a module's tests, and an address of each test's own."""

import os

import pytest

import buckets as emulators
from sft_jax.common.buckets import storage


@pytest.fixture(scope="module")
def buckets(tmp_path_factory):
  if emulators.missing:
    pytest.skip(f"needs {emulators.missing}")
  found = emulators.Buckets(tmp_path_factory.mktemp("buckets"))
  before = dict(os.environ)
  os.environ.update(found.env)
  storage._client.cache_clear()
  yield found
  found.close()
  os.environ.clear()
  os.environ.update(before)
  storage._client.cache_clear()


@pytest.fixture
def url(request, scheme, monkeypatch):
  if scheme == "memory":
    scheme, fake = "gs", emulators.Memory()
    monkeypatch.setattr(storage, "_client", lambda scheme: fake)
    folder = request.getfixturevalue("tmp_path") / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
  else:
    request.getfixturevalue("buckets").fail("200", times=0)
  name = "".join(c if c.isalnum() else "-" for c in request.node.name)
  return f"{scheme}://{emulators.BUCKET}/{name}"
