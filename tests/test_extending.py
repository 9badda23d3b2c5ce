"""The code of docs/extending.md is run, and its losses are their formulas."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fake_runs
import sft_jax
import tiny
from configs import base
from sft_jax.common import sharding, trees
from sft_jax.data.conversation import Message
from sft_jax.evals.checks import checks
from sft_jax.inference.generate import Reply
from sft_jax.models import transformer
from sft_jax.reporting import trackers
from sft_jax.step.loss import linear_cross_entropy
from sft_jax.step.train_step import init_state, split_micro_batches
from sft_jax.training import selfcheck
from sft_jax.training.build import state as build_state
from sft_jax.training.build import step as build_step

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
B, T, D, V = 2, 9, 8, 13


@pytest.fixture(scope="module")
def page():
  names = {}
  text = PAGE.read_text(encoding="utf-8")
  for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
    exec(compile(block, str(PAGE), "exec"), names)
  return names


@pytest.mark.parametrize("name", ["focal", "unlikelihood", "distill"])
def test_losses_of_the_page_are_their_formulas(page, name):
  """Value and both gradients, in chunks of 4, against all logits at once."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  hidden, head, teacher = draw(B, T, D), draw(V, D), draw(B, T, V)
  targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
  weights = jnp.asarray(rng.choice([0, 0.5, 1], (B, T)), jnp.float32)
  sources = jnp.asarray(rng.integers(0, 2, (B, T)), jnp.int32)
  loss = {
    "focal": page["focal"],
    "unlikelihood": page["unlikelihood"],
    "distill": page["Distill"](lambda batch: teacher),
  }[name]
  extras = {"sources": sources, "teacher_logits": teacher}

  def whole(hidden, head):
    log_q = jax.nn.log_softmax(hidden @ head.T)
    nll = -jnp.take_along_axis(log_q, targets[..., None], -1)[..., 0]
    p = jnp.exp(-nll)
    each = {
      "focal": (1 - p) ** 2 * nll,
      "unlikelihood": jnp.where(sources == 1, -jnp.log1p(-p), nll),
      "distill": (
        jax.nn.softmax(teacher) * (jax.nn.log_softmax(teacher) - log_q)
      ).sum(-1),
    }[name]
    return (weights * each).sum()

  def chunked(hidden, head):
    return linear_cross_entropy(
      *(hidden, head, targets, weights),
      objective=loss,
      extras=extras,
      chunk_tokens=4,
    ).objective

  got, want = (
    jax.value_and_grad(f, (0, 1))(hidden, head) for f in (chunked, whole)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want
  )


def test_the_step_takes_a_loss_and_an_optimizer_of_ones_own(page):
  config = base.get_config()
  model = transformer.build(tiny.SPECK)
  mesh = sharding.make_mesh(2, 2, 2)
  params = jax.jit(model.init)(jax.random.key(0))
  step = build_step.make_step(
    config, model, mesh, 100, loss=page["focal"], tx=page["mine"]
  )
  where = build_state.state_shardings(step, params, mesh)
  state = jax.jit(
    lambda p: init_state(p, step.trained, step.tx), out_shardings=where
  )(params)
  batch = selfcheck.toy_batch(8, 16, tiny.SPECK.vocab_size)
  after, metrics = jax.jit(step.train_step)(
    state, split_micro_batches(batch, 2)
  )
  nats, weight = metrics["loss/nats_per_token"]
  assert float(nats / weight) == pytest.approx(
    np.log(tiny.SPECK.vocab_size), 0.3
  )
  assert metrics["loss/easy"][0] <= weight
  assert "optim/learning_rate" not in metrics  # The transformation's own.
  moved = jax.tree.map(lambda a, b: (a != b).any(), after.params, params)
  assert all(jax.tree.leaves(moved))


def test_a_run_of_ones_own_rows_loss_optimizer_and_callback(page, tmp_path):
  folder = tiny.model_folder(tmp_path / "model")
  config = tiny.config(
    tmp_path, folder, "", steps=4, log__every=2, data__holdout=0.0
  )
  result = page["run_mine"](config)
  assert [step for step, _ in page["curve"]] == [2, 4]
  assert all(0 <= easy <= 1 for _, easy in page["curve"])
  assert (result.workdir / "export" / "model.safetensors").exists()


def test_rates_and_freeze_choose_parameters_by_pattern(page):
  config = page["config"]
  model = transformer.build(tiny.SPECK)
  params = jax.eval_shape(model.init, jax.random.key(0))
  step = build_step.make_step(config, model, None, 100)
  build_state.hold_base(config, step, params, lambda x: x)
  frozen = [p for p in trees.flatten(params) if not step.trained(p)]
  assert frozen
  assert all("norm/scale" in path for path in frozen)
  for key, value in (
    ("rates", (("emb/", 0.1),)),
    ("freeze", ("emb/",)),
    ("decay", ("kernel$", "emb/")),
  ):
    with config.unlocked():
      wrong = config.copy_and_resolve_references()
      wrong.optim[key] = value
    with pytest.raises(ValueError, match=rf"optim\.{key}: 'emb/' matches noth"):
      build_state.hold_base(
        wrong, build_step.make_step(wrong, model, None, 100), params, None
      )


def test_a_check_of_ones_own(page):
  reply = Reply("Tower and tower", [1], True, Message("assistant", ""))
  row = {"check": "mentions", "word": "tower", "times": 2}
  checks.validate(row, "here")
  assert checks.passes(reply, row)
  assert not checks.passes(reply, row | {"times": 3})
  assert checks.kind(row) == "content"
  for wrong in ({"times": 1}, {"word": 3}, {"word": "a", "more": 1}):
    with pytest.raises(ValueError, match="here: got mentions"):
      checks.validate({"check": "mentions"} | wrong, "here")
  with pytest.raises(ValueError, match="name that is free"):
    sft_jax.register_check("exact", page["mentions"])
  with pytest.raises(ValueError, match="kind 'other'"):
    sft_jax.register_check("mine", page["mentions"], kind="other")


def test_a_writer_of_ones_own(page, tmp_path, capsys):
  about = trackers.About(tmp_path / "run", "project", {})
  about.workdir.mkdir()
  records = [{"step": 1, "loss/nats_per_token": 2.5}]
  for _ in range(2):  # A record is copied once, also over a restart.
    copies = trackers.Copies(["printer"], about, kept=records, log=print)
  copies.close(done=True)
  assert capsys.readouterr().out == "run 1 2.5\nrun is done\n"
  with pytest.raises(ValueError, match="taken are"):
    sft_jax.register_writer("wandb", page["Printer"])


def test_runs_as_plain_tables(tmp_path):
  runs = [fake_runs.finished("x"), fake_runs.finished("x")]
  runs[1]["config"]["optim"]["learning_rate"] = 2e-05
  replies = runs[1]["after"]["behaviors"]["replies"]
  replies[0] |= {"passed": False}
  replies[2] |= {"passed": True}
  a, b = (
    str(fake_runs.write(tmp_path / name, run))
    for name, run in zip("ab", runs, strict=True)
  )
  found = sft_jax.compare([a, b])
  assert json.loads(json.dumps(found)) == found
  rates = {row["run"]: row["rate"] for row in found["behaviors"]}
  assert rates == {a: 2 / 3, b: 2 / 3}
  assert found["paired"] == [
    {"run": b, "group": "x", "gained": 1, "lost": 1, "p": 1.0}
  ]
  assert [(row["run"], row["after"]) for row in found["losses"]] == [
    (a, 1.125), (b, 1.125)
  ]  # fmt: skip
  assert found["config"] == [{"key": "optim.learning_rate", a: 1e-05, b: 2e-05}]
  loss = {"run": a, "name": "loss/nats_per_token", "last": 1.5, "median": 1.75}
  assert loss in found["metrics"]
