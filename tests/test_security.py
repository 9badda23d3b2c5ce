"""Nothing that comes with data or models is run; see docs/reliability.md."""

import ast
import re
import shutil
import sys
from pathlib import Path

import pytest

import tiny_tokenizers
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from sft_jax.models.hf import load_save

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sft_jax"
# Readers that run or build what a file says, or unpack it where it says; and
# a format in whose cells spreadsheets see programs.
READERS = {
  *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
  *("yaml", "torch", "tarfile", "zipfile", "xml", "code", "runpy"),
}
# Own processes tell one another of rows and faults in pickles, by pipes.
BY_PIPE = {
  "shards.py imports pickle",
  "workers.py imports pickle",
  # To the child that renders; back come marshalled texts, which run nothing.
  "child.py imports pickle",
  "child.py imports marshal",
  # An export as transformers serves it, where that is installed.
  "serving.py imports torch",
}
CALLS = {"eval", "exec", "__import__"}


def calls(tree):
  """(full name, keywords) of every call: 'np.load', {'allow_pickle': ...}."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
      yield ast.unparse(node.func), keywords


def test_the_package_has_no_reader_that_runs_what_it_reads():
  found = []
  for path in sorted(PACKAGE.rglob("*.py")):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
      found += [
        f"{path.name} imports {name}"
        for name in names
        if name.split(".")[0] in READERS
      ]
    for name, keywords in calls(tree):
      if name in CALLS or keywords.get("shell") == "True":
        found.append(f"{path.name} calls {name}")
      pickles = keywords.get("allow_pickle") != "False"
      if name.endswith(("np.load", "numpy.load")) and pickles:
        found.append(f"{path.name} loads arrays that may be pickles")
      if keywords.get("trust_remote_code", "False") != "False":
        found.append(f"{path.name} trusts code of others")
  assert set(found) == BY_PIPE


def test_the_search_finds_what_it_searches():
  source = (
    "eval('1'); np.load(p, allow_pickle=True); subprocess.run(c, shell=True)"
  )
  found = dict(calls(ast.parse(source)))
  assert set(found) == {"eval", "np.load", "subprocess.run"}
  assert found["np.load"] == {"allow_pickle": "True"}


def test_code_that_comes_with_a_model_is_not_run(tmp_path, monkeypatch):
  """Modules under every name that might be looked for, in the folder we are
  in, too."""
  golden = ROOT / "tests" / "models" / "goldens" / "qwen3"
  folder = Path(shutil.copytree(golden, tmp_path / "model"))
  for file in tiny_tokenizers.byte_level(tmp_path / "tokens").iterdir():
    shutil.copyfile(file, folder / file.name)
  marker = tmp_path / "it ran"
  names = ("modeling_qwen3", "configuration_qwen3", "tokenizer", "handler")
  for name in (*names, "tokenization_qwen3", "setup", "conftest", "config"):
    code = f"open({str(marker)!r}, 'w').write('x')"
    (folder / f"{name}.py").write_text(code)
  monkeypatch.chdir(folder)
  monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
  load_save.load_pretrained(folder)
  assert load_tokenizer(folder).encode("the cat")
  assert not marker.exists()


def test_a_config_file_is_run_only_where_the_user_names_one():
  """By the flag, and nowhere else: no path of data or a model reaches it."""
  for path in sorted(PACKAGE.rglob("*.py")):
    text = path.read_text(encoding="utf-8")
    if re.search(r"config_flags|spec_from_file", text):
      assert path.name in ("train.py", "command.py"), path
    # Modules that are imported late have names of ours.
    assert not re.search(r'import_module\((?!\s*f?"sft_jax\.|\s*")', text), path


@pytest.mark.parametrize("name", ["docs/reliability.md"])
def test_every_threat_has_tests_that_exist(name):
  """The tests that the tables name: files, and functions in them."""
  text = (ROOT / name).read_text(encoding="utf-8")
  named = re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", text)
  assert len(named) > 20
  for file, function in named:
    source = (ROOT / file).read_text(encoding="utf-8")
    assert not function or f"def {function}(" in source, (file, function)
