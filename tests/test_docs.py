"""The documents keep their word: links, keys and commands exist."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from sft_jax import main

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
# The log tells what was run on its day; it is not kept up to date.
KEPT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"] + [
  page for page in PAGES if page.name != "log.md"
]


def _config(path: str):
  spec = importlib.util.spec_from_file_location("config", ROOT / path)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def _has(config, key: str) -> bool:
  for part in key.split("."):
    if not hasattr(config, "keys") or part not in config:
      return False
    config = config[part]
  return True


def commands(page: Path) -> list[str]:
  """Commands of the indented and fenced blocks, continued lines joined."""
  text = page.read_text().replace("\\\n", " ")
  lines = (line.strip() for line in text.splitlines() if line[:1] != "|")
  lines = [line for line in lines if not line.startswith("`")]
  found = []
  for line in lines:
    for part in line.removeprefix("$ ").split(" && "):
      words = re.sub(r"^(\w+=\S+ +)*", "", part)
      if re.match(r"python (tools/|-m sft_jax)|sft-jax \w", words):
        found.append(words.split("  #")[0])
  return found


def _with_imports(tool: Path) -> str:
  """A program's text and that of the commands it imports, which add flags."""
  text = tool.read_text()
  names = re.findall(r"sft_jax\.commands import ([\w, ]+)", text)
  names += re.findall(r"sft_jax\.commands\.(\w+) import", text)
  others = [
    ROOT / "sft_jax" / "commands" / f"{name.strip()}.py"
    for names_of_one in names
    for name in names_of_one.split(",")
  ]
  for name in re.findall(r"^import (\w+)$", text, re.M):
    others.append(tool.with_name(f"{name}.py"))
  for other in others:
    if other != tool and other.exists():
      text += _with_imports(other)
  return text


COMMANDS = [(page, line) for page in KEPT for line in commands(page)]


def test_there_are_commands():
  assert len(COMMANDS) > 20


@pytest.mark.parametrize(
  ("page", "line"), COMMANDS, ids=[f"{p.stem}: {c}" for p, c in COMMANDS]
)
def test_commands_name_files_flags_and_keys_that_exist(page, line):
  words = shlex.split(line)
  if words[0] == "sft-jax":
    module = main.MODULES.get(words[1], words[1]).partition(":")[0]
    assert words[1] in main.COMMANDS, line
    source = _with_imports(ROOT / "sft_jax" / "commands" / f"{module}.py")
    words = words[2:]
  elif words[1] == "-m":
    assert words[2] in ("sft_jax.main", "sft_jax"), line
    source = _with_imports(ROOT / "sft_jax" / "commands" / "train.py")
    words = words[3:]
  else:
    source = _with_imports(ROOT / words[1])
    words = words[2:]
  config = _config("configs/base.py")
  for word in words:
    if not word.startswith("--"):
      continue
    flag, _, value = word.removeprefix("--").partition("=")
    if flag == "config":
      if re.fullmatch(r"configs/\w+(/\w+)*\.py", value):
        assert (ROOT / value).exists(), word
      continue
    if flag.startswith("config."):
      key = flag.removeprefix("config.")
      # Keys below these are the user's own.
      free = re.match(r"data\.(columns|template_kwargs)\.", key)
      assert free or _has(config, key), f"{page.name}: {word}"
      continue
    name = flag.removeprefix("no")
    assert re.search(rf'["\'](--)?({flag}|{name})["\']', source), (
      f"{page.name}: {line}: {words[0] if words else ''} has no --{flag}"
    )


def test_keys_of_the_tables_exist():
  """Every key in the column 'here' of coming_from.md is a key of base.py."""
  config = _config("configs/base.py")
  checked = 0
  for line in (ROOT / "docs" / "coming_from.md").read_text().splitlines():
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if len(cells) == 3 and cells[1].startswith("`"):
      for key in re.findall(r"`([\w.]+)`", cells[1]):
        assert _has(config, key), line
        checked += 1
  assert checked > 60


def test_links_between_pages_lead_somewhere():
  for page in KEPT:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
      assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_site():
  """mkdocs builds what it finds, and a page not in `nav` is not found."""
  named = re.findall(
    r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M
  )
  # The log is for contributors: it stays out of the navigation.
  assert sorted([*named, "log.md"]) == [page.name for page in PAGES]
