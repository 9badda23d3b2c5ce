"""Patience: against a count by hand, and whole runs that stop, and resume."""

import json
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sft_jax
import tiny
from sft_jax.common import trees
from sft_jax.reporting.metrics import read_jsonl
from sft_jax.training.loop import Patience


def vars_of(patience) -> dict:
  return {"best": patience.best, "since_best": patience.since_best}


@given(
  st.lists(st.integers(0, 5), max_size=12),
  st.integers(0, 4),
  st.booleans(),
  st.integers(0, 12),
)
def test_it_ends_where_a_count_by_hand_does(scores, limit, lowest, cut):
  """Also when what was remembered goes through JSON in between."""
  sign = 1 if lowest else -1
  ends = None
  for i in range(len(scores)):
    seen = [sign * x for x in scores[: i + 1]]
    first_best = seen.index(min(seen))
    if limit and i - first_best >= limit:
      ends = i
      break
  patience, got = Patience(limit, lowest=lowest), None
  for i, score in enumerate(scores):
    if i == cut:
      kept = json.loads(json.dumps(vars_of(patience)))
      patience = Patience(limit, lowest=lowest, **kept)
    patience.add(float(score))
    if patience.exhausted:
      got = i
      break
  assert got == ends


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A run far too hot for its few rows: the held-out loss rises."""
  folder = tmp_path_factory.mktemp("early")
  config = tiny.config(
    folder,
    tiny.model_folder(folder / "model"),
    tiny.rows_file(folder / "rows.jsonl"),
    steps=40,
    data__holdout=0.25,
    optim__learning_rate=2e-2,
    eval__every=2,
    eval__patience=2,
    eval__gap=False,  # Its epochs are of a step.
    export=True,
    export_dtype="float32",
  )
  return config, sft_jax.train(config)


def held_out(workdir) -> dict[int, float]:
  return {
    record["step"]: record["held_out/nats_per_token"]
    for record in read_jsonl(workdir / "metrics.jsonl")
    if "held_out/nats_per_token" in record
  }


def test_it_stops_and_the_best_is_exported(made, capsys):
  config, result = made
  found = result.metrics["early_stop"]
  assert found["stopped"]
  assert found["figure"] == "held_out/nats_per_token"
  losses = {s: x for s, x in held_out(result.workdir).items() if s % 2 == 0}
  best = min(losses, key=lambda step: losses[step])
  assert found["step"] == best < found["last_step"] == max(losses) < 40
  assert found["last_step"] == best + 2 * 2
  assert found["best"] == losses[best]
  # What is measured, returned and exported is the model of that step.
  after = {x["name"]: x["after"] for x in result.metrics["losses"]}
  np.testing.assert_allclose(
    after["held_out/nats_per_token"], losses[best], rtol=1e-5
  )
  _, exported = sft_jax.load_pretrained(result.workdir / "export")
  same(exported, result.params)
  incidents = read_jsonl(result.workdir / "incidents.jsonl")
  assert [one["kind"] for one in incidents] == ["stopped early"]
  again = sft_jax.train(config)
  assert "is finished" in capsys.readouterr().out
  same(again.params, result.params)


def same(a, b):
  jax.tree.map(
    np.testing.assert_array_equal, trees.flatten(a), trees.flatten(b)
  )


def test_a_resumed_run_stops_where_the_run_did(made, tmp_path):
  """Taken up at the best, and again where nothing is left but to stop."""
  config, result = made
  for lost in (True, False):
    workdir = tmp_path / str(lost)
    shutil.copytree(result.workdir, workdir)
    (workdir / "result.json").unlink()
    if lost:
      last = result.metrics["early_stop"]["last_step"]
      shutil.rmtree(workdir / "checkpoints" / str(last))
    other = config.copy_and_resolve_references()
    other.workdir = str(workdir)
    again = sft_jax.train(other)
    assert again.metrics["early_stop"] == result.metrics["early_stop"]
    assert held_out(workdir) == held_out(result.workdir)
    same(again.params, result.params)


def test_patience_needs_no_divisibility(tmp_path, made):
  """Evaluations between checkpoints are saved; without any, epochs count."""
  config = made[0].copy_and_resolve_references()
  config.workdir = str(tmp_path / "run")
  config.eval.every, config.checkpoint.every = 3, 4
  config.steps, config.export = 12, False
  found = sft_jax.train(config).metrics["early_stop"]
  assert found["step"] % 3 == 0
  config.workdir = str(tmp_path / "epochs")
  config.eval.every = config.checkpoint.every = 0
  config.steps = 4
  found = sft_jax.train(config).metrics["early_stop"]
  assert found["figure"] == "held_out/nats_per_token"
