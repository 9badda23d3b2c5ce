"""Imports point down, and the package keeps the shape of its map."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sft_jax"

# From the bottom up: a folder imports from those above its line here, and
# folders of one line never import each other.
LAYERS = (
  {"common"},
  {"data", "models", "step"},
  {"inference"},
  {"evals", "checkpointing"},
  {"reporting"},
  {"training"},
  {"commands"},
  {"main"},
)
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
# The pure step knows neither models nor data: it is given functions and arrays.
MOST_ENTRIES = 12


def _imports(path: Path) -> set[str]:
  """First-level sft_jax names that a file imports, at any depth of code."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    for name in names:
      parts = name.split(".")
      if parts[0] == "sft_jax" and len(parts) > 1:
        found.add(parts[1])
  return found


def _files() -> list[tuple[Path, str]]:
  files = []
  for path in sorted(PACKAGE.rglob("*.py")):
    top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if top != "__init__":
      files.append((path, top))
  return files


def test_every_folder_has_a_layer():
  assert {top for _, top in _files()} == LAYER.keys()


def test_imports_point_down():
  wrong = [
    f"{path.relative_to(PACKAGE)} imports {other}"
    for path, top in _files()
    for other in _imports(path) & LAYER.keys()
    if other != top and LAYER[other] >= LAYER[top]
  ]
  assert not wrong


def test_only_models_knows_flax():
  for path, top in _files():
    text = path.read_text(encoding="utf-8")
    if top != "models":
      assert "import flax" not in text, path
      assert "from flax" not in text, path


def _folders() -> list[Path]:
  inits = sorted(PACKAGE.rglob("__init__.py"))
  return [init.parent for init in inits if init.parent.name != "__pycache__"]


def test_modules_are_imported_where_a_platform_lacks_some():
  """As Windows does: each such import is tried, or of a function."""
  lacking = {"fcntl", "resource", "pwd", "grp", "termios", "pty"}
  for file in sorted(PACKAGE.rglob("*.py")):
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
      if isinstance(node, ast.Import):
        assert not lacking & {one.name for one in node.names}, file


def test_folders_have_at_most_twelve_entries():
  beside = {"__init__.py", "__pycache__", "py.typed"}
  wide = {
    folder.name: len(names)
    for folder in _folders()
    if len(names := {x.name for x in folder.iterdir()} - beside) > MOST_ENTRIES
  }
  assert not wide


def test_every_folder_says_what_comes_in_and_what_goes_out():
  for folder in _folders():
    text = (folder / "__init__.py").read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(text)) or ""
    assert text, folder
    if folder in (PACKAGE, PACKAGE / "commands"):
      continue  # The map, and `sft-jax --help`, have these.
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert modules <= set(re.findall(r"\w+", text)), folder


# Modules under 80 lines with one importer, and why they are files of their own.
ALONE = {
  "commands/compare.py": "a command",
  "commands/replay.py": "a command",
  "data/audit/languages.py": "the only user of a library",
  "data/readers/memory.py": "a reader, beside those of files",
  "reporting/html/audit_page.py": "a page, beside the others",
  "training/build/host_consistency.py": "what hosts must share, tested alone",
}


def _importers() -> dict[str, set[str]]:
  """{module: those that import it}, by paths below the package."""
  paths = {path.relative_to(PACKAGE).as_posix() for path, _ in _files()}
  found: dict[str, set[str]] = {path: set() for path in paths}
  for path in sorted(PACKAGE.rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if not isinstance(node, ast.ImportFrom) or not node.module:
        continue
      base = node.module.replace(".", "/").removeprefix("sft_jax")
      for name in (f"{base}.py", *(f"{base}/{a.name}.py" for a in node.names)):
        if name.lstrip("/") in found:
          found[name.lstrip("/")].add(path.relative_to(PACKAGE).as_posix())
  return found


def test_small_modules_are_not_split_off():
  small = {
    name
    for name, importers in _importers().items()
    if len(importers) <= 1
    and not name.endswith("__init__.py")
    and len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) < 80
  }
  assert small == ALONE.keys()


# Words that say nothing by themselves, and words of an older vocabulary.
BANNED = {
  *("find", "parts", "piece", "pieces", "place", "rows", "same", "table"),
  *("announce", "ink", "look", "muted", "said", "say", "seams", "settle"),
  *("Judge", "Policy", "Script", "box", "hull", "spread", "told", "unsaid"),
}


def test_public_names_say_what_they_are():
  found = [
    f"{path.relative_to(PACKAGE)}: {node.name}"
    for path, _ in _files()
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in BANNED
  ]
  assert not found


def test_the_map_of_the_documents_is_the_tree():
  page = PACKAGE.parent / "docs" / "architecture.md"
  text = page.read_text(encoding="utf-8").split("## The map")[1]
  names, folder = {}, ""
  for line in text.split("## ")[0].splitlines():
    if not line.startswith("    "):
      continue
    words = line.split("  # ")[0].split()
    if words and words[0].endswith("/"):
      folder, *words = words
      folder = "." if folder == "sft_jax/" else folder.rstrip("/")
    names.setdefault(folder, set()).update(words)
  assert names == {
    folder.relative_to(PACKAGE).as_posix(): {
      path.stem for path in folder.glob("*.py") if path.stem != "__init__"
    }
    for folder in _folders()
  }


def test_the_pages_are_short():
  for name, most in (
    ("README.md", 150),
    ("AGENTS.md", 60),
    ("docs/architecture.md", 150),
  ):
    text = (PACKAGE.parent / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= most, name
