"""Files and folders that are there whole or not at all; digests of files."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from sft_jax.common import distributed


def read_json(path: Path) -> Any:
  """What is in a JSON file of a workdir; ValueError where it is damaged."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(
      f"{path}: is damaged ({error}), expected JSON. Resuming the run writes "
      "it again."
    ) from error


def find_json(path: Path) -> Any:
  """The same; None where it is missing, or damaged, which stderr says."""
  try:
    return read_json(path)
  except FileNotFoundError:
    return None
  except ValueError as error:
    print(f"warning: {error}", file=sys.stderr)
    return None


def write_json(path: Path, value: Any) -> None:
  """Writes a file whole or not at all; the first process writes for all."""
  text = json.dumps(value, indent=2) + "\n"
  if jax.process_index() == 0:
    write_text(path, text)


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
  """The same of a file of one value per line."""
  text = "".join(json.dumps(row) + "\n" for row in rows)
  if jax.process_index() == 0:
    write_text(path, text)


def write_text(path: str | Path, text: str) -> None:
  """Writes a file whole or not at all, whichever process calls it."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  try:
    part.write_text(text, encoding="utf-8")
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)


def digest(path: Path) -> str:
  """SHA-256 of a file."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def replace_folder(
  path: Path, marker: str, write: Callable[[Path], None]
) -> None:
  """Fills a folder beside `path`, then puts it in its place: all or nothing.

  Of several processes the first one makes and moves the folder; every one
  calls `write`, which may gather arrays, and only the first may write.

  Raises ValueError: `path` holds something else than a folder with a `marker`.
  """
  first = jax.process_index() == 0
  fresh = path.with_name(f".{path.name}.writing")
  old = path.with_name(f".{path.name}.replaced")
  if first:
    if path.exists() and not (
      path.is_dir() and ((path / marker).exists() or not any(path.iterdir()))
    ):
      raise ValueError(
        f"{path}: exists and is not a model folder (no {marker}); expected a "
        "new, an empty or a model folder. Choose another path."
      )
    path.parent.mkdir(parents=True, exist_ok=True)
    # What a killed process left behind.
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
  distributed.barrier("sft_jax.replace_folder")
  try:
    write(fresh)
    distributed.barrier("sft_jax.replace_folder")
    if first:
      if path.exists():
        path.rename(old)
      fresh.rename(path)
  finally:
    if first:
      shutil.rmtree(fresh, ignore_errors=True)
      shutil.rmtree(old, ignore_errors=True)
  distributed.barrier("sft_jax.replace_folder")
