"""Runs of several processes and users share a cache, and none is harmed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import tiny

ROOT = Path(__file__).parents[3]
# Builds a store, slowly; says in a line each what was done, then what is in it.
PROGRAM = """
import json, os, sys, tempfile, time
from sft_jax.data.chat import sandbox
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.store import build, fingerprint, shards
from sft_jax.data.tokenizers.tokenizer import load_tokenizer

folder, rows, directory, delay, user = sys.argv[1:]
tokenizer = load_tokenizer(folder)
# Readable still, though the user may not look into the folder of the tests.
tokenizer.files = ()
# What it starts and imports, before it is another user, who may not.
with tempfile.TemporaryDirectory() as first:
  build.build(rows, tokenizer, RenderOptions(), directory=first,
              max_length=64, num_workers=1, log=lambda line: None)
version = fingerprint.code_version()
fingerprint.code_version = lambda: version
read = shards.read

def slow(*args, **kwargs):
  for chunk in read(*args, **kwargs, chunk_rows=2):
    print("read", flush=True)
    time.sleep(float(delay))
    yield chunk

shards.read = slow
if user == "other" and not os.getuid():
  os.setgroups([])
  os.setgid(65534)
  os.setuid(65534)
log = lambda line: print(line, flush=True)
store = build.build(rows, tokenizer, RenderOptions(), directory=directory,
                    max_length=64, num_workers=1, log=log)
print(json.dumps([store.fingerprint, store.tokens.tolist()]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def shared():
  """A folder that other users may write; those of pytest are one user's."""
  with tempfile.TemporaryDirectory() as made:
    os.chmod(made, 0o777)
    yield Path(made)


@pytest.fixture
def start(folder, shared):
  """Starts a process that builds a store of rows in a shared cache."""
  rows = tiny.rows_file(shared / "rows.jsonl", tiny.ROWS[:8])
  os.chmod(rows, 0o644)
  started = []

  def start(delay=0.0, user="me", umask=0o022, directory=shared / "cache"):
    process = subprocess.Popen(
      [sys.executable, "-c", PROGRAM, str(folder), str(rows), str(directory),
       str(delay), user],
      cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
      umask=umask,
    )  # fmt: skip
    started.append(process)
    return process

  yield start
  for process in started:
    process.kill()
    process.communicate()


def result(process) -> tuple[str, list]:
  """What a process said, and what it has in its store."""
  out = process.communicate(timeout=60)[0]
  assert not process.returncode, out
  *said, found = out.splitlines()
  return "\n".join(said), json.loads(found)


def test_of_runs_that_need_one_store_one_builds_and_the_others_wait(
  start, shared
):
  runs = [start(delay=0.3) for _ in range(3)]
  said, found = zip(*map(result, runs), strict=True)
  assert sum("data: encoding" in one for one in said) == 1
  assert sum("waiting for another run" in one for one in said) == 2
  assert sum("from cache" in one for one in said) == 2
  assert found[0] == found[1] == found[2]
  assert not list((shared / "cache").glob(".*")), "nothing is left"


def test_who_waits_builds_when_the_builder_is_killed(start, shared):
  builder = start(delay=30)
  assert builder.stdout.readline().startswith("data: encoding")
  waiter = start()
  assert waiter.stdout.readline().startswith("data: waiting")
  builder.send_signal(signal.SIGKILL)
  said, _ = result(waiter)
  assert "data: encoding" in said
  assert not list((shared / "cache").glob(".*")), "nothing is left"


def test_a_builder_that_stands_still_is_not_waited_for(
  start, shared, monkeypatch
):
  monkeypatch.setattr(sys.modules[__name__], "PROGRAM", PROGRAM.replace(
    "read = shards.read\n", "build._PATIENCE = 1.0\nread = shards.read\n"
  ))  # fmt: skip
  builder = start(delay=30)
  assert builder.stdout.readline().startswith("data: encoding")
  builder.send_signal(signal.SIGSTOP)
  said, _ = result(start())
  assert "no progress for 1 s" in said
  builder.send_signal(signal.SIGCONT)
  time.sleep(0.1)
  assert builder.poll() is None, "and its folder was left alone"


def test_another_users_cache_is_used_or_left_alone(start, shared):
  """Files that may not be read are those of a user with umask 077."""
  cache = shared / "cache"
  cache.mkdir()
  cache.chmod(0o777)
  left = cache / ".building-00.lock"
  left.touch(0o000)
  said, mine = result(start(user="other"))
  assert "data: encoding" in said
  assert "cannot be used" not in said
  assert left.exists()

  (store,) = (one for one in cache.iterdir() if one.is_dir())
  cache.chmod(0o555)
  said, found = result(start(user="other"))
  assert "from cache" in said, "what may be read, and not be written"
  assert found == mine

  cache.chmod(0o777)
  store.chmod(0o000)
  said, found = result(start(user="other"))
  assert "cannot be used" in said
  assert "for this run alone" in said
  assert found == mine
  assert not [
    one for one in Path(tempfile.gettempdir()).glob("sft_jax-data-*")
    if one.stat().st_uid == store.stat().st_uid
    and time.time() - one.stat().st_mtime < 60
  ], "what was made for one run is gone after it"  # fmt: skip
  store.chmod(0o755)

  for path in (f".building-{store.name}.lock", ""):
    store.rename(cache / "away")
    (cache / path).touch() if path else None
    (cache / path).chmod(0o000)
    said, found = result(start(user="other"))
    assert "cannot be used" in said
    assert found == mine
    (cache / path).chmod(0o755)
    (cache / "away").rename(store)


def test_two_users_with_umask_077(start, shared):
  (shared / "cache").mkdir()
  (shared / "cache").chmod(0o1777)
  said, mine = result(start(umask=0o077))
  assert "data: encoding" in said
  said, found = result(start(user="other", umask=0o077))
  if os.getuid():
    assert "from cache" in said
  else:
    assert "for this run alone" in said
  assert found == mine
