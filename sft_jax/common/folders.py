"""Folders that other users of the machine could change."""

import os
import stat
from pathlib import Path


def writable_by_others(path: str | Path) -> Path | None:
  """The folder through which another user could change what is in `path`.

  That is `path` itself where others may write in it, or a folder above it in
  which they may put another one in its place; None where there is none. What
  does not exist yet is judged by the folders that do. A compile cache holds
  programs that are run, and a checkpoint what a run goes on with.

  Others are all users but this one and root, so far as owners and permission
  bits tell; access-control lists are not read. A group with the number of its
  user counts as that user's own, as Linux distributions make it.
  """
  path = Path(path).resolve()
  for folder in (path, *path.parents):
    if not folder.exists():
      continue
    found = folder.stat()
    owners = found.st_uid not in (0, os.getuid())
    group = found.st_mode & stat.S_IWGRP and found.st_gid not in (
      0,
      os.getuid(),
    )
    written = bool(group or found.st_mode & stat.S_IWOTH)
    # In a folder with the sticky bit, such as /tmp, nobody can replace what
    # is another's, but everybody can add.
    if folder != path and found.st_mode & stat.S_ISVTX:
      written = False
    if owners or written:
      return folder
  return None
