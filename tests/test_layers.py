"""Imports point down: a module may import only from floors below its own."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "sft_jax"

# From the ground up (DESIGN section 2). `data` and `models` share a floor
# and never import each other. The package's own table of contents and its
# public functions (api) sit on top.
FLOORS = [
  {"trees", "batch", "hub", "folders"},
  {"data", "models"},
  {
    "losses",
    "loss_chunk",
    "objective",
    "optim",
    "rounding",
    "sharding",
    "next_token",
    "decoding",
    "sampler",
    "token_groups",
  },
  {
    "evals",
    "export",
    "pages",
    "report",
    "compare_page",
    "audit_page",
    "terminal",
    "manifest",
    "checkpoint",
    "row_chain",
    "metrics",
    "versions",
    "event_file",
    "pace",
    "profiling",
    "train_step",
    "selfcheck",
    "fit",
    "compile_cache",
    "topology",
    "traced",
    "collectives",
    "hosts",
  },
  {
    "setup",
    "setup_rows",
    "setup_data",
    "setup_evals",
    "setup_model",
    "setup_selfcheck",
    "setup_step",
  },
  {"bad_steps", "early_stop", "watchdog", "workdir", "record"},
  {
    *("present", "start_page", "setup_plan", "plan", "stop", "resume"),
    *("steps", "run_folder", "writers", "records"),
    "same",
  },
  {"loop"},
  {"train"},
  {"main"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}


def _imports(path: Path) -> set[str]:
  """First-level sft_jax modules that a file imports, at any depth of code."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
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
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room != "__init__":
      files.append((path, room))
  return files


def test_every_module_has_a_floor():
  assert {room for _, room in _files()} <= FLOOR.keys()


def test_imports_point_down():
  for path, room in _files():
    for other in _imports(path) & FLOOR.keys():
      # Rooms of one floor may use each other, except across the wings.
      allowed = FLOOR[other] <= FLOOR[room]
      if {room, other} == {"data", "models"}:
        allowed = False
      assert allowed, f"{path.name} ({room}) imports upward: {other}"


def test_seams():
  """flax lives in models/ only; the step and sampler import no model."""
  for path, room in _files():
    text = path.read_text()
    if room != "models":
      assert "import flax" not in text, path
      assert "from flax" not in text, path
    if room in {"losses", "loss_chunk", "train_step", "decoding", "sampler"}:
      assert not _imports(path) & {"models", "data"}, path
