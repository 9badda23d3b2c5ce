"""Every file of configs/ builds a run and traces one step of it."""

import importlib
import re
from pathlib import Path

import jax
import pytest

import tiny
from configs import base
from sft_jax.step.train_step import split_micro_batches
from sft_jax.training.build import build

ROOT = Path(__file__).parents[1]
NAMES = sorted(
  path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
  for folder in ("configs", "examples/lessons")
  for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("name", NAMES)
def test_config_traces_a_step(name, tmp_path):
  config = importlib.import_module(name).get_config()
  # Shapes, rows and paths of a stranger's machine do not matter here.
  config.workdir = str(tmp_path)
  config.batch_size = 8 * config.accum_steps
  config.steps = 1000
  config.model.path = str(tiny.model_folder(tmp_path / "model"))
  config.data.train = str(tiny.rows_file(tmp_path / "rows.jsonl"))
  config.data.eval, config.data.holdout = "", 0.0
  config.eval.behaviors = config.eval.general_text = ""
  config.eval.knowledge = ""
  run = build.build_run(config, lambda line: None)
  batch = split_micro_batches(next(run.stream.batches()), config.accum_steps)
  state, metrics = jax.eval_shape(run.train_step, run.state, batch)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
    lambda x: (x.shape, x.dtype), run.state
  )
  assert "loss/nats_per_token" in metrics


@pytest.mark.parametrize(
  "name", [n for n in NAMES if "_demo" not in n and "lessons" not in n]
)
def test_its_docstring_says_what_it_takes(name):
  """The command, the hardware, the memory, and whose figures these are."""
  said = " ".join((importlib.import_module(name).__doc__ or "").split())
  file = name.replace(".", "/") + ".py"
  assert f"python -m sft_jax.main --config={file}" in said
  assert "Hardware: " in said
  if name != "configs.base":
    assert "sft-jax plan --config=... --topology=" in said
    assert re.search(r"[Pp]redicted|[Mm]easured", said)
    assert re.search(r"\d GB", said)
    assert "tokens/s" in said


def test_an_unknown_key_is_an_error():
  config = base.get_config()
  with pytest.raises(AttributeError, match="learning_rat"):
    config.optim.learning_rat = 1.0


def test_every_config_is_found():
  assert {"configs.base", "examples.lessons.quality"} <= set(NAMES)
