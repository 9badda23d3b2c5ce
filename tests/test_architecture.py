"""Imports point down, and the package keeps the shape of its map."""

import ast
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
