"""Every key has its place in configs/base.py, its bounds, and its own line."""

import dataclasses
import importlib.util
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sft_jax
from configs import base
from sft_jax.common import trees
from sft_jax.training import config_check
from sft_jax.training.config import RunConfig

ROOT = Path(__file__).parents[2]


def with_values(values: dict):
  config = sft_jax.default_config()
  with config.unlocked():
    for key, value in values.items():
      section, _, name = key.rpartition(".")
      owner = config[section] if section else config
      with owner.ignore_type():
        owner[name] = value
  return config


def lines_of(**values) -> list[str]:
  values = {key.replace("__", "."): x for key, x in values.items()}
  with pytest.raises(ValueError) as caught:
    config_check.check(with_values(values))
  return str(caught.value).splitlines()


def test_base_is_the_default_and_says_every_key():
  spec = importlib.util.spec_from_file_location(
    "write_base_config", ROOT / "tools/dev/write_base_config.py"
  )
  assert spec
  assert spec.loader
  tool = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(tool)
  cure = "run python tools/dev/write_base_config.py"
  assert tool.text() == tool.PATH.read_text(encoding="utf-8"), cure
  assert base.get_config().to_dict() == sft_jax.default_config().to_dict()


def test_a_right_config_is_typed():
  typed = config_check.check(base.get_config())
  assert isinstance(typed, RunConfig)
  assert typed.optim.learning_rate == 2e-3
  with pytest.raises(dataclasses.FrozenInstanceError):
    typed.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_all_that_is_wrong_is_in_one_message():
  said = lines_of(
    seed=2**70,
    model__dtype="bf16",
    optim__learning_rate=-1.0,
    faults__hang_seconds=1e30,
    optim__lr=1,
  )
  assert said[0] == "config: 5 keys are wrong:"
  assert [line.split(":")[0].strip() for line in said[1:]] == [
    *("seed", "model.dtype", "optim.lr", "optim.learning_rate"),
    "faults.hang_seconds",
  ]


def test_an_unknown_key_names_near_ones():
  (line,) = lines_of(data__max_seq_len=1)
  assert "no such key; did you mean data.seq_len?" in line
  (line,) = lines_of(learning_rate=1)
  assert "did you mean optim.learning_rate?" in line


@pytest.mark.parametrize(
  ("values", "key"),
  [
    ({"steps": 10, "optim__warmup_steps": 10}, "optim.warmup_steps"),
    ({"mesh__fsdp": -1}, "mesh"),
    ({"mesh__context": 3}, "data.seq_len"),
    ({"accum_steps": 3}, "batch_size"),
    ({"lora__path": "x", "lora__rank": 1}, "lora.path"),
    ({"model__quantize": "nf4"}, "model.quantize"),
    ({"loss__kl": 1.0, "model__from_scratch": True}, "loss.kl"),
    ({"faults__spike_factor": 0.5}, "faults.spike_factor"),
    ({"checkpoint__keep_best": "x"}, "checkpoint.keep_best"),
    ({"eval__patience": 1, "data__holdout": 0.0}, "eval.patience"),
    ({"data__train": ""}, "data.train"),
    ({"optim__freeze": ("(",)}, "optim.freeze"),
    ({"optim__rates": (("embed", "fast"),)}, "optim.rates"),
    ({"lora__targets": "a(b"}, "lora.targets"),
    ({"workdir": " "}, "workdir"),
    ({"batch_size": 2**20, "data__seq_len": 2**11}, "batch_size"),
    ({"data__template_kwargs": {"tools": []}}, "data.template_kwargs"),
  ],
)
def test_pairs_that_cannot_be(values, key):
  (line,) = lines_of(**values)
  assert line.startswith(f"config: {key}: got ")


WRONG = ("a text", "", -5, -0.5, math.nan, math.inf, 1e40, 2**70, None, [{}])
KEYS = trees.flatten(sft_jax.default_config().to_dict())


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_wrong_value_of_any_key_is_its_own_line(key):
  """A wrong value is refused under its own name, or of the key's type."""
  default, name = KEYS[key], key.replace("/", ".")
  refused = 0
  for value in WRONG:
    began = time.perf_counter()
    said = refusal({name: value})
    assert time.perf_counter() - began < 1
    if said:
      refused += 1
      assert name in said
      assert said.startswith("config: ")
      assert "\n" not in said
      continue
    loose = name.startswith(("data.", "eval.")) and isinstance(
      value, str | list | None
    )
    right = type(value) is type(default) or isinstance(value, int | float)
    assert loose or right, (name, value)
    assert not isinstance(value, float) or math.isfinite(value)
  assert refused >= 5


def refusal(values: dict) -> str:
  try:
    config_check.check(with_values(values))
  except ValueError as error:
    return str(error)
  return ""


@pytest.mark.parametrize(
  "flag",
  ["model.dtype=bf16", "optim.learning_rate=-1", f"seed={2**70}", "no.key=1"],
)
def test_a_wrong_flag_is_one_line_and_exit_2(flag, tmp_path):
  config = tmp_path / "own.py"  # Of one's own, outside the repository.
  config.write_text(
    "import sft_jax\n\ndef get_config():\n  return sft_jax.default_config()\n"
  )
  command = [sys.executable, "-m", "sft_jax.main", f"--config={config}"]
  done = subprocess.run(
    [*command, f"--config.workdir={tmp_path / 'run'}", f"--config.{flag}"],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.stderr.startswith("error: ")
  assert flag.split("=")[0].split(".")[0] in done.stderr
  assert "Traceback" not in done.stderr
  assert done.returncode != 0
  assert not (tmp_path / "run").exists()
