"""Compiled programs are found again, by another process, in a safe place."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sft_jax.common import compile_cache
from sft_jax.common.compile_cache import writable_by_others

ROOT = Path(__file__).parents[2]
PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from sft_jax.common import compile_cache
compile_cache._MIN_SECONDS = 0
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
jax.jit(lambda x: x + 1)(1)  # The cache is opened after JAX has compiled.
with compile_cache.opened(sys.argv[1], print):
  lowered = jax.jit(lambda x: jnp.tanh(x @ x).sum()).lower(jnp.ones((8, 8)))
  program, found = compile_cache.compiled(lowered)
print(found, float(program(jnp.ones((8, 8)))))
"""


def _run(folder: Path, largest: int = -1) -> str:
  env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-c", PROGRAM, str(folder), str(largest)]
  done = subprocess.run(
    command, env=env, capture_output=True, text=True, check=True
  )
  return done.stdout.strip()


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
  # Of one that did not fit on the disk nothing is left.
  full = _run(tmp_path / "cache", largest=100)
  assert full.startswith(f"compile_cache: {tmp_path / 'cache'} keeps no more")
  assert "File too large" in full
  assert full.count("\n") == 1
  assert not list((tmp_path / "cache").iterdir())
  first, second = _run(tmp_path / "cache"), _run(tmp_path / "cache")
  assert first.startswith("False ")
  assert second == first.replace("False", "True")


def test_settings_are_as_before_afterwards(tmp_path):
  before = jax.config.jax_compilation_cache_dir
  with contextlib.suppress(KeyError):
    with compile_cache.opened(str(tmp_path), print):
      assert jax.config.jax_compilation_cache_dir == str(tmp_path)
      raise KeyError
  assert jax.config.jax_compilation_cache_dir == before
  with compile_cache.opened("", print):
    assert jax.config.jax_compilation_cache_dir == before
    lowered = jax.jit(lambda x: x * 3).lower(jnp.ones(2))
    assert not compile_cache.compiled(lowered)[1]


def test_a_folder_that_others_may_write_to_is_pointed_out(tmp_path):
  said: list[str] = []
  folder = tmp_path / "cache"
  with compile_cache.opened(str(folder), said.append):
    pass
  assert said == []  # One that is made is this user's alone.
  assert folder.stat().st_mode & 0o777 == 0o700
  folder.chmod(0o777)
  with compile_cache.opened(str(folder), said.append):
    pass
  (line,) = said
  assert str(folder) in line


def test_auto_is_a_folder_of_the_user_and_the_processor(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  with compile_cache.opened("auto", print):
    folder = Path(str(jax.config.jax_compilation_cache_dir))
  assert folder.parent == tmp_path / "sft_jax" / "compiled"
  assert folder.is_dir()


# -- Folders that others could change -----------------------------------------


@pytest.fixture
def place(tmp_path):
  """A folder of our own in a folder of our own."""
  folder = tmp_path / "above" / "cache"
  folder.mkdir(parents=True)
  for one in (folder, folder.parent):
    one.chmod(0o755)
  # Judged from here down: whoever runs the tests may have odd folders above.
  if writable_by_others(tmp_path):
    pytest.skip(f"{writable_by_others(tmp_path)} is writable by others")
  return folder


def test_our_own_folder_is_fine(place):
  assert writable_by_others(place) is None
  assert writable_by_others(place / "not" / "there") is None


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o757])
def test_a_folder_in_which_anybody_writes(place, mode):
  place.chmod(mode)
  assert writable_by_others(place) == place


def test_a_folder_that_anybody_can_replace(place):
  place.parent.chmod(0o777)
  assert writable_by_others(place) == place.parent
  assert writable_by_others(place / "new") == place.parent
  assert writable_by_others(str(place)) == place.parent
  # With the sticky bit what is ours stays ours.
  place.parent.chmod(0o1777)
  assert writable_by_others(place) is None


def test_a_link_is_judged_by_what_it_points_to(place):
  place.chmod(0o777)
  link = place.parent / "link"
  link.symlink_to(place)
  assert writable_by_others(link) == place


AS_ROOT = pytest.mark.skipif(
  os.getuid() != 0, reason="only root can give a folder away"
)


@AS_ROOT
def test_somebody_elses_folder(place):
  os.chown(place, 54321, -1)
  assert writable_by_others(place) == place


@AS_ROOT
def test_a_group_that_is_not_ones_own(place, monkeypatch):
  os.chown(place, 54321, 54321)
  os.chown(place.parent, 54321, 54321)
  place.chmod(0o775)
  monkeypatch.setattr("os.getuid", lambda: 54321)
  assert writable_by_others(place) is None  # The user's own group.
  os.chown(place, 54321, 100)
  assert writable_by_others(place) == place
  place.chmod(0o755)
  assert writable_by_others(place) is None
