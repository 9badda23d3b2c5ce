"""Every trap fits the code of today, and the runner tells a trap from none."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

import run_traps
from run_traps import ROOT, TRAPS, Trap

ALL = run_traps.load()


def functions(file):
  """Names of the test functions of a file."""
  tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
  return {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)}


def test_every_trap_fits_the_code():
  """Where this fails the code has moved on: write the bug into the new code."""
  misfits = []
  for trap in ALL:
    try:
      run_traps.patched(trap)
    except ValueError as error:
      misfits.append(str(error))
  assert not misfits
  assert len(ALL) >= 60


def test_every_trap_names_tests_that_exist():
  for trap in ALL:
    assert trap.tests, trap.name
    assert trap.why.endswith("."), trap.name
    assert not trap.number or re.fullmatch(r"[A-H]\d+", trap.number), trap.name
    for test in trap.tests:
      file, _, function = test.partition("::")
      assert (ROOT / file).is_file(), (trap.name, test)
      if function:
        assert function.partition("[")[0] in functions(file), (trap.name, test)


def test_the_page_counts_them():
  page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
  themes = [path.stem for path in sorted(TRAPS.glob("*.toml"))]
  for theme in themes:
    number = sum(trap.name.startswith(f"{theme}.") for trap in ALL)
    assert f"| {theme} | {number} |" in page, (theme, number)
  assert f"holds {len(ALL)} bugs" in page


def one(**changes):
  trap = Trap(
    name="toy.toy",
    why="Nothing.",
    file="sft_jax/data/packing.py",
    old="= tokens[1:]",
    new="= tokens[:-1]",
    tests=("tests/data/test_packing.py::test_a_row_is_the_table_of_batch",),
  )
  return trap._replace(**changes)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"old": "= tokenz[1:]"}, "got 0 places"),
    ({"old": "start"}, r"got \d+ places"),
    ({"new": "= tokens[1:"}, "expected a program"),
    ({"new": "= (tokens[1:])"}, "got the same program"),
  ],
)
def test_a_trap_that_is_no_bug_is_refused(changes, said):
  with pytest.raises(ValueError, match=said):
    run_traps.patched(one(**changes))


def test_an_unknown_field_is_refused(tmp_path):
  (tmp_path / "a.toml").write_text('[x]\nwhi = "?"')
  with pytest.raises(ValueError, match=r"\[x\]: got .*'whi'"):
    run_traps.load(tmp_path)
  assert tomllib.loads(Path(TRAPS / "loss.toml").read_text())


def test_bugs_are_caught_and_harmless_changes_are_not():
  """Two traps of the collection, a change that changes nothing that is
  tested, and one that is no program when it runs."""
  chosen = [
    trap
    for trap in ALL
    if trap.name in ("loss.shift-forgotten", "packing.positions-not-reset")
  ]
  harmless = one(
    old="np.zeros((1, seq_len), dtype)", new="np.full((1, seq_len), 0, dtype)"
  )
  broken = one(old="= tokens[1:]", new="= tokenz[1:]")
  *caught, missed, none = run_traps.run([*chosen, harmless, broken])
  assert [outcome.caught for outcome in caught] == [
    "tests/data/test_packing.py::test_a_row_is_the_table_of_batch"
  ] * 2
  assert (missed.caught, missed.said) == ("", "no test noticed")
  assert none.caught == ""
  assert none.said.startswith("broken: ")
