"""The planned step is the one that runs: the same shapes, the same program."""

import jax
import numpy as np
import pytest

import tiny
from sft_jax.common import sharding
from sft_jax.models.config import parse_config, read_config
from sft_jax.step.train_step import split_micro_batches
from sft_jax.training import step_runner
from sft_jax.training.build import abstract, build
from sft_jax.training.build import step as setup_step

CHANGES = [
  {},
  {
    "accum_steps": 2,
    "mesh__fsdp": 2,
    "mesh__tensor": 2,
    "model__remat": "full",
  },
  {"lora__rank": 4, "lora__init": "pissa", "lora__dropout": 0.1},
  {"lora__rank": 4, "lora__dora": True, "model__quantize": "nf4"}
  | {"mesh__fsdp": 8, "mesh__data": 1, "model__dtype": "bfloat16"},
  {"loss__kl": 0.1, "mesh__fsdp": 2},
  {"loss__kl": 0.1, "lora__rank": 4, "lora__also_train": ("embed/",)},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  folder = tmp_path_factory.mktemp("world")
  model = tiny.model_folder(folder / "model")
  return folder, model, tiny.rows_file(folder / "rows.jsonl")


def said(tree):
  """Shapes, dtypes and places of all leaves."""
  return jax.tree.map(
    lambda x: (x.shape, x.dtype, x.sharding.devices_indices_map(x.shape)), tree
  )


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_the_planned_step_is_the_one_that_runs(world, changes):
  config = tiny.config(*world, batch_size=16, **changes)
  run = build.build_run(config, lambda line: None)
  outline = abstract.outline(config, read_config(world[1]), run.mesh)
  assert said(outline.state) == said(run.state)
  # The batch, as the loop makes it.
  batch = split_micro_batches(next(run.stream.batches()), config.accum_steps)
  rows = sharding.row_sharding(run.mesh, leading_axes=1)
  batch = sharding.put_rows(batch, rows)
  assert said(outline.batch) == said(batch)
  # But for the names of the data's sources, which a plan does not know.
  step = setup_step.make_step(config, run.model, run.mesh, run.num_steps)
  theirs = step_runner.lower(step.train_step, run.state, batch)
  assert outline.lower().as_text() == theirs.as_text()


def test_nothing_is_allocated(world):
  """A model of 405 B parameters, on a machine that could not hold it."""
  config = tiny.config(*world, model__dtype="bfloat16")
  raw = tiny.SHAPE | {"hidden_size": 16384, "intermediate_size": 53248}
  raw |= {"num_hidden_layers": 126, "num_attention_heads": 128}
  raw |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
  mesh = sharding.make_mesh(**config.mesh)
  outline = abstract.outline(config, parse_config(raw), mesh)
  size = sum(np.prod(x.shape) for x in jax.tree.leaves(outline.params))
  assert 4.0e11 < size < 4.1e11


def test_what_setup_refuses_is_refused(world):
  config = tiny.config(*world, batch_size=12)
  mesh = sharding.make_mesh(**config.mesh)
  with pytest.raises(ValueError, match="batch_size: got 12"):
    abstract.outline(config, read_config(world[1]), mesh)
