"""Python's own way in: rows in memory, a loss and an optimizer of one's own."""

import json
import shutil
import threading

import jax
import numpy as np
import optax
import pytest

import sft_jax
import tiny
from sft_jax.common import trees
from sft_jax.reporting.metrics import read_jsonl


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A run from a file, and the model it starts from."""
  folder = tmp_path_factory.mktemp("train")
  model = tiny.model_folder(folder / "model")
  choices = {"steps": 4, "log__every": 2, "export": False}
  config = tiny.config(
    folder, model, tiny.rows_file(folder / "rows.jsonl"), **choices
  )
  return config, sft_jax.train(config)


def other(made, tmp_path, **choices):
  config = made[0].copy_and_resolve_references()
  config.workdir = str(tmp_path / "run")
  for key, value in choices.items():
    setattr(config, key, value)
  return config


def assert_same(a, b):
  jax.tree.map(
    np.testing.assert_array_equal, trees.flatten(a), trees.flatten(b)
  )


def test_rows_in_memory_train_as_from_a_file_in_a_thread(made, tmp_path):
  """Also resumed, in the same process; each step's record comes once."""
  config, found, seen = other(made, tmp_path, seed=0), [], []

  def call():
    rows = iter(tiny.ROWS)
    found.append(sft_jax.train(config, rows=rows, on_record=seen.append))

  def in_thread():
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return found[-1]

  assert_same(in_thread().params, made[1].params)
  workdir = tmp_path / "run"
  assert [one["step"] for one in seen] == [2, 4]
  written = read_jsonl(workdir / "metrics.jsonl")
  assert all(one.pop("time/at") for one in written)  # The file's alone.
  assert json.loads(json.dumps(seen)) == written
  shutil.rmtree(workdir / "checkpoints" / "4")
  (workdir / "result.json").unlink()
  assert_same(in_thread().params, made[1].params)
  assert [one["step"] for one in seen] == [2, 4, 4]
  assert sft_jax.read_run(workdir)["result"]["time"]["run_s"] > 0
  with pytest.raises(ValueError, match="made from other data"):
    sft_jax.train(config, rows=tiny.ROWS[1:])


def test_a_loss_and_an_optimizer_of_ones_own(made, tmp_path):
  """Cross-entropy by hand and optax's SGD: the config's own, step by step."""

  def nats(hidden, head, targets, weights, segment_ids):
    logits = hidden.astype("float32") @ head.astype("float32").T
    each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (each * weights).sum(), {}

  config = other(made, tmp_path, steps=2)
  config.optim.name, config.optim.schedule = "sgd", "constant"
  config.optim.b1 = config.optim.weight_decay = config.optim.clip_norm = 0.0
  config.optim.warmup_steps = 0
  want = sft_jax.train(config).params
  config.workdir = str(tmp_path / "own")
  got = sft_jax.train(
    config, loss=nats, optimizer=optax.sgd(config.optim.learning_rate)
  ).params
  for path, x in trees.flatten(want).items():
    np.testing.assert_allclose(
      trees.flatten(got)[path], x, rtol=1e-4, atol=1e-6, err_msg=path
    )


def test_a_dry_run_and_a_run_as_the_model(made, tmp_path, capsys):
  """It warns of few steps; a run without an export is no model."""
  config = other(made, tmp_path, steps=0)
  config.optim.warmup_steps = -1
  assert sft_jax.train(config, dry_run=True).metrics == {}
  shown = " ".join(capsys.readouterr().out.split())
  assert "4 steps are few to learn from. batch_size=1 gives about 32" in shown
  assert "learning rate" in shown
  assert not (tmp_path / "run" / "config.json").exists()
  config.model.path = str(made[1].workdir)
  with pytest.raises(
    ValueError, match=r"model\.path: got .* without an export"
  ):
    sft_jax.train(config, dry_run=True)
  shutil.copytree(made[0].model.path, made[1].workdir / "export")
  sft_jax.train(config, dry_run=True)
