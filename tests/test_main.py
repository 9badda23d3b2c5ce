"""The door: what a user gets wrong is one line that says what to do."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

import sft_jax
import tiny
from sft_jax.commands import train as main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
  return tiny.model_folder(tmp_path_factory.mktemp("model") / "tiny")


def door(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "sft_jax.main", *arguments],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (
      ["--config=configs/base.py", "--config.optim.learning_rat=1"],
      ["learning_rat", "every key is in configs/base.py"],
    ),
    (["--config=configs/none.py"], ["configs/none.py", "expected"]),
    (["--config=configs/base.py", "now"], ["unexpected argument 'now'"]),
  ],
)
def test_a_wrong_command_line_is_an_error_without_a_trace(arguments, words):
  done = door(*arguments)
  assert done.returncode == 2
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith("error: command line:")
  for word in words:
    assert word in done.stderr


def test_an_error_of_the_data_is_one_line(tmp_path, model):
  rows = tiny.rows_file(tmp_path / "rows.jsonl")
  rows.write_text(rows.read_text() + '{"instruction": "x", "output": \n')
  done = door(
    "--config=configs/base.py",
    f"--config.workdir={tmp_path / 'run'}",
    f"--config.model.path={model}",
    f"--config.data.train={rows}",
  )
  assert done.returncode == 2
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith("error: ")
  assert "rows.jsonl:17" in line


def test_debug_shows_the_trace(tmp_path):
  bad = (f"--config.workdir={tmp_path}", "--config.data.train=none.jsonl")
  done = door("--config=configs/base.py", *bad, "--debug")
  assert done.returncode == 1
  assert "Traceback" in done.stderr
  assert "none.jsonl" in done.stderr
  assert "\nerror: " not in done.stderr


def test_out_of_memory_is_an_error_with_a_cure(monkeypatch, capsys):
  def exhausted(config, **choices):
    raise jax.errors.JaxRuntimeError(
      "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nMore."
    )

  says = lambda value: SimpleNamespace(value=value)
  monkeypatch.setattr(main, "train", exhausted)
  for name, value in (
    ("CONFIG", None),
    ("FORCE", False),
    ("EXTEND", ""),
    ("DRY_RUN", False),
    ("DEBUG", False),
  ):
    monkeypatch.setattr(main, name, says(value))
  with pytest.raises(SystemExit, match=str(main.USER_EXIT)):
    main._run()
  said = capsys.readouterr().err
  assert said.startswith("error: out of memory: RESOURCE_EXHAUSTED: Out of")
  assert "More." not in said
  assert "docs/troubleshooting.md" in said
  monkeypatch.setattr(main, "DEBUG", says(True))
  with pytest.raises(jax.errors.JaxRuntimeError):
    main._run()


ANSWERED = [
  {"role": "user", "content": "Hello there."},
  {"role": "assistant", "content": "Good day."},
]


@pytest.mark.parametrize(
  ("row", "words"),
  [
    (
      {"messages": [{"role": "narrator", "content": "x"}, *ANSWERED]},
      ["rows.jsonl:1", "narrator", "user", "assistant"],
    ),
    (
      {"messages": [ANSWERED[0], {"role": "assistant", "content": ""}]},
      ["rows.jsonl:1", "empty", "expected"],
    ),
    ({"inputs": "x", "label": 3}, ["rows.jsonl:1", "inputs", "expected"]),
  ],
)
def test_a_bad_row_is_named(tmp_path, model, row, words):
  rows = tiny.rows_file(tmp_path / "rows.jsonl", [row])
  with pytest.raises(ValueError) as caught:
    sft_jax.train(tiny.config(tmp_path, model, rows))
  assert "\n" not in str(caught.value)
  for word in words:
    assert word in str(caught.value)


def test_the_command_can_be_typed_again():
  """It parses back to the same words, whatever they hold."""
  words = ["--config=a.py", "--config.data.train=rows/*.jsonl", "it's $x"]
  typed = main._command(words).replace("\\\n", " ")
  assert shlex.split(typed) == ["python", "-m", "sft_jax.main", *words]


def test_a_missing_file_is_named(tmp_path, model):
  with pytest.raises(ValueError, match=r"none\.jsonl.*expected"):
    sft_jax.train(tiny.config(tmp_path, model, tmp_path / "none.jsonl"))


def test_a_pickled_model_is_refused(tmp_path, model):
  rows = tiny.rows_file(tmp_path / "rows.jsonl")
  folder = tmp_path / "pickled"
  folder.mkdir()
  for path in model.iterdir():
    if path.suffix != ".safetensors":
      (folder / path.name).write_bytes(path.read_bytes())
  (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  with pytest.raises(ValueError, match=r"pytorch_model\.bin.*safetensors"):
    sft_jax.train(tiny.config(tmp_path, folder, rows))


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"batch_size": 12}, "batch_size: got 12"),
    ({"mesh__fsdp": 3}, r"mesh\.fsdp=3"),
    ({"optim__schedule": "step"}, r"optim\.schedule: got 'step'"),
    ({"model__dtype": "float16"}, "float16"),
    ({"model__attention": "cudnn"}, "cudnn"),
    ({"lora__rank": 2, "lora__targets": "attn/z"}, "attn/z"),
    ({"data__over_long": "cut"}, "cut"),
    ({"data__on_bad_row": "drop"}, "drop"),
  ],
)
def test_a_setting_that_cannot_be_is_refused(tmp_path, model, change, words):
  rows = tiny.rows_file(tmp_path / "rows.jsonl")
  with pytest.raises(ValueError, match=words):
    sft_jax.train(tiny.config(tmp_path, model, rows, **change))


_NO_HOME = """
import os, pwd, sys
for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
  os.environ.pop(name, None)

def unknown(uid):
  raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = unknown
sys.argv[0] = "sft-jax"
from sft_jax import main
main.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stdout", ["closed", "read a line", "whole"])
def test_no_home_no_user_and_nobody_who_reads(tmp_path, model, stdout):
  """A dry run of a user that the system does not know."""
  rows = tiny.rows_file(tmp_path / "rows.jsonl")
  command = [
    *(sys.executable, "-c", _NO_HOME, "train", "--dry-run"),
    *("--config=configs/base.py", f"--config.workdir={tmp_path / 'run'}"),
    *(f"--config.model.path={model}", f"--config.data.train={rows}"),
  ]
  if stdout == "closed":
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
  with subprocess.Popen(
    command,
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": ""},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout
    assert process.stderr
    if stdout == "read a line":
      assert process.stdout.readline()
      process.stdout.close()
      said = process.stderr.read()
      assert said.startswith("error: stdout was closed"), said
    else:
      shown, said = process.communicate()
      assert not said
      assert bool(shown) == (stdout == "whole")
  assert process.returncode == (2 if stdout == "read a line" else 0)


def test_the_package_is_lazy_and_its_api_is_whole():
  code = (
    "import sys, sft_jax, sft_jax.data.store.shards\n"
    "assert not {'jax', 'flax'} & sys.modules.keys()\n"
    "assert sft_jax.__all__ == sorted(sft_jax._HOME)\n"
    "assert all(getattr(sft_jax, name) for name in sft_jax.__all__)"
  )
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
