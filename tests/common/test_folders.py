"""Whose hands could change a folder, told by its bits and those above it."""

import os

import pytest

from sft_jax.common.folders import writable_by_others


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
