"""SHA256SUMS: digests of an export's files, as `sha256sum -c` reads them."""

import hashlib
from pathlib import Path

NAME = "SHA256SUMS"


def write(folder: Path) -> None:
  """Writes the digests of all files that are in a folder."""
  files = (p for p in folder.iterdir() if p.is_file() and p.name != NAME)
  names = sorted(p.name for p in files)
  lines = [f"{_digest(folder / name)}  {name}\n" for name in names]
  (folder / NAME).write_text("".join(lines), encoding="utf-8")


def check(folder: Path) -> None:
  """Compares a folder's files with their digests, if it has any.

  Raises:
    ValueError: a file is missing, or is not what was written.
  """
  path = folder / NAME
  if not path.exists():
    return
  wrong = []
  for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
    expected, _, name = line.partition("  ")
    file = folder / name
    # A damaged name must not lead out of the folder.
    if not name or file.parent != folder or not file.is_file():
      wrong.append(f"{name} (missing)")
    elif _digest(file) != expected:
      wrong.append(name)
  if wrong:
    raise ValueError(
      f"{folder}: got other contents than were written of {wrong}, expected "
      f"those of its {NAME}. Export again, or copy the folder again; if you "
      f"changed the files on purpose, delete {NAME}."
    )


def _digest(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
