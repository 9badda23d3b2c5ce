"""Proves that the tests have power: every known bug, put in, turns one red.

    python tools/dev/run_traps.py                     every trap
    python tools/dev/run_traps.py loss data.double-bos      of a theme, or one

A trap (tests/mutations/*.toml) is a bug that trains something else in silence,
as a small change of the package, with the ordinary tests that must fail by it:

    [shift-forgotten]
    number = "B1"          of the list the bug is from; may be missing
    why = "..."            what would go wrong, unseen
    file = "sft_jax/data/packing.py"
    old = "..."            stands in the file exactly once
    new = "..."
    tests = ["tests/data/test_packing.py::test_..."]

Each is put into a copy of the repository, never into this one. The tests must
pass without it and fail with it, by what they find rather than by a change
that is no longer a program.

Exit codes: 0 all caught; 1 a trap that no test notices, or that is broken.
"""

import argparse
import ast
import functools
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.text import Text

from sft_jax.reporting import terminal

ROOT = Path(__file__).parents[2]
TRAPS = ROOT / "tests" / "mutations"
_COPIED = ("sft_jax", "tests", "tools", "configs", "docs", "pyproject.toml")
_TIMEOUT = 600  # Seconds of a trap; a loop without end is a finding too.
# Python 3.11 counts the depth of all threads' parsing together.
_PARSER = threading.Lock()
# What a change says that is no program any more; no proof of any test.
_BROKEN = ("SyntaxError", "NameError", "ImportError", "ModuleNotFoundError")


class Trap(NamedTuple):
  """A bug as a change of one file, and the tests that must fail by it."""

  name: str
  why: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]
  number: str = ""


class Outcome(NamedTuple):
  """What became of a trap.

  Attributes:
    caught: the test that failed; '' if none did.
    said: what it said; or what is wrong with the trap.
    seconds: that it took.
  """

  caught: str
  said: str
  seconds: float


def load(folder: Path = TRAPS) -> list[Trap]:
  """Every trap of the folder's files, as 'theme.name'.

  Raises:
    ValueError: a trap with other fields than a Trap's.
  """
  traps = []
  for path in sorted(folder.glob("*.toml")):
    for name, fields in tomllib.loads(path.read_text()).items():
      fields["tests"] = tuple(fields.get("tests", ()))
      try:
        traps.append(Trap(f"{path.stem}.{name}", **fields))
      except TypeError as error:
        raise ValueError(
          f"{path}: [{name}]: got {sorted(fields)}; expected {Trap._fields} "
          f"({error}). Mend the trap."
        ) from error
  return traps


def patched(trap: Trap, root: Path = ROOT) -> str:
  """The text of the trap's file with the bug in it.

  Raises:
    ValueError: the text to change is not there exactly once, or what comes of
      it is not a program.
  """
  path = root / trap.file
  text = path.read_text(encoding="utf-8")
  if (count := text.count(trap.old)) != 1:
    raise ValueError(
      f"{trap.name}: got {count} places in {trap.file} with {trap.old!r}; "
      "expected one. The code has moved on: write the same bug into it."
    )
  changed = text.replace(trap.old, trap.new)
  try:
    same = _parsed(changed) == _program(text)
  except SyntaxError as error:
    raise ValueError(
      f"{trap.name}: got {trap.file} with {error}; expected a program. Mend "
      "the trap's `new`."
    ) from error
  if same:
    raise ValueError(
      f"{trap.name}: got the same program; expected another. Mend `new`."
    )
  return changed


@functools.cache
def _program(text: str) -> str:
  """What is left of a file without its layout and comments."""
  return _parsed(text)


def _parsed(text: str) -> str:
  with _PARSER:
    return ast.dump(ast.parse(text))


class Copy:
  """A copy of the repository to put bugs into."""

  def __init__(self, folder: Path):
    """Copies what tests need; without compiled files, which are of paths."""
    self.folder = folder
    self._changes = 0
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    for name in _COPIED:
      if (ROOT / name).is_dir():
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
      elif (ROOT / name).exists():
        shutil.copyfile(ROOT / name, folder / name)

  def _write(self, path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    # Python takes a compiled file for that of its source by the second and
    # the size: two changes within a second could be taken for one another.
    self._changes += 1
    when = time.time() + self._changes
    os.utime(path, (when, when))

  def run(self, trap: Trap) -> Outcome:
    """Puts the bug in, runs its tests, and takes it out again."""
    path = self.folder / trap.file
    whole, start = path.read_text(encoding="utf-8"), time.monotonic()
    self._write(path, patched(trap, self.folder))
    try:
      code, output = self.pytest(trap.tests)
    finally:
      self._write(path, whole)
    seconds = time.monotonic() - start
    failed = re.search(r"^FAILED (.+?)(?: - (.*))?$", output, re.MULTILINE)
    if code == 0:
      return Outcome("", "no test noticed", seconds)
    if code is None:
      return Outcome(trap.tests[0], f"not done in {_TIMEOUT} s", seconds)
    if code != 1 or not failed or (failed[2] or "").startswith(_BROKEN):
      tail = " / ".join(output.strip().splitlines()[-3:])
      return Outcome("", f"broken: {tail}", seconds)
    return Outcome(failed[1], failed[2] or "", seconds)

  def pytest(
    self, tests: Iterable[str], timeout: int | None = _TIMEOUT
  ) -> tuple[int | None, str]:
    """(exit code, output) of tests of the copy; no code if they do not end."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfs", "--tb=no"]
    # Whole lines in pytest's summary; the copy's package and no other; its
    # modules compiled once, whatever the user has told Python.
    env = {**os.environ, "COLUMNS": "400", "PYTHONPATH": str(self.folder)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    try:
      done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *tests],
        cwd=self.folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
      )
    except subprocess.TimeoutExpired as expired:
      return None, str(expired)
    return done.returncode, done.stdout + done.stderr


def check_without(copy: Copy, traps: Sequence[Trap]) -> None:
  """Raises ValueError unless all named tests run and pass without a trap."""
  tests = dict.fromkeys(test for trap in traps for test in trap.tests)
  # By file: what a module's fixtures make, they make once.
  code, output = copy.pytest(sorted(tests), timeout=None)
  last = output.strip().rpartition("\n")[2]
  if code != 0 or "skipped" in last:
    told = re.findall(r"^(?:FAILED|ERROR|SKIPPED).*", output, re.MULTILINE)
    raise ValueError(
      f"without any trap: got {told or output[-600:]}; expected the tests that "
      "traps name to pass, none skipped. Mend them first."
    )


def run(
  traps: Sequence[Trap],
  *,
  jobs: int = 1,
  announce: Callable[[Trap, Outcome], None] = lambda trap, outcome: None,
) -> list[Outcome]:
  """What becomes of each trap, in their order.

  Raises:
    ValueError: a trap that does not fit the code, or whose tests do not pass
      without it.
  """
  for trap in traps:
    patched(trap)
  with tempfile.TemporaryDirectory() as folder:
    copies: queue.Queue[Copy] = queue.Queue()
    first = Copy(Path(folder) / "0")
    check_without(first, traps)
    copies.put(first)
    for i in range(1, jobs):
      copies.put(Copy(Path(folder) / str(i)))

    def one(trap: Trap) -> Outcome:
      copy = copies.get()
      try:
        outcome = copy.run(trap)
      finally:
        copies.put(copy)
      announce(trap, outcome)
      return outcome

    with ThreadPoolExecutor(jobs) as pool:
      return list(pool.map(one, traps))


def main() -> None:
  parser = argparse.ArgumentParser(
    description="Puts known bugs in, one by one."
  )
  add = parser.add_argument
  add("chosen", nargs="*", help="themes and names of traps; none: all")
  add("--jobs", type=int, default=2, help="traps at a time")
  args = parser.parse_args()
  traps = [
    trap
    for trap in load()
    if not args.chosen or {trap.name, trap.name.split(".")[0]} & {*args.chosen}
  ]
  if not traps:
    sys.exit(f"error: no trap is called {args.chosen}")
  out, start = terminal.console(), time.monotonic()

  def announce(trap: Trap, outcome: Outcome) -> None:
    found = f"{outcome.caught.rpartition('/')[2]}  {outcome.said}"
    out.print(
      Text(
        f"{'caught' if outcome.caught else 'MISSED'} {outcome.seconds:4.0f} s"
      )
      + f"  {trap.name} {trap.number}\n"
      f"    breaks: {trap.why}\n    found by: {found}"
    )

  outcomes = run(traps, jobs=args.jobs, announce=announce)
  missed = [
    (trap.name, outcome.said)
    for trap, outcome in zip(traps, outcomes, strict=True)
    if not outcome.caught
  ]
  out.print(
    f"{len(traps) - len(missed)} of {len(traps)} traps caught in "
    f"{time.monotonic() - start:.0f} s"
  )
  for name, said in missed:
    out.print(Text(f"MISSED {name}: {said}", style="bold red"))
  sys.exit(1 if missed else 0)


if __name__ == "__main__":
  main()
