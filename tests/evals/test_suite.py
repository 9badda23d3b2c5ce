"""What is measured is a ratio of sums over rows that are each seen once."""

import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from fake_store import fake_store
from sft_jax.data.conversation import Conversation, Message
from sft_jax.data.pipeline import Stream
from sft_jax.evals import suite as suites
from sft_jax.evals.behaviors import Item
from sft_jax.evals.suite import Suite, compare
from sft_jax.inference.generate import Reply
from sft_jax.step.loss import BaseSums
from sft_jax.training.build import build, evals


def suite_of(loss_fn, streams=None, items=(), generate=None, **choices):
  """Rows of so many trained tokens each, by the name of the stream."""
  made = {
    name: Stream(
      fake_store([([7] * n, [0.0] + [1.0] * (n - 1)) for n in lengths]),
      seq_len=10, batch_size=2, epochs=1,
    )
    for name, lengths in (streams or {}).items()
  }  # fmt: skip
  return Suite(
    loss_fn=loss_fn,
    batches=lambda stream: stream.batches(),
    held_out=made.get("held_out"),
    general_text=made.get("general_text"),
    train_rows=made.get("train_rows"),
    items=items,
    generate=generate or (lambda *asked: pytest.fail("no prompts")),
    **choices,
  )


def by_length(params, batch):
  """Every token costs the number of the trained tokens of its row."""
  count = batch.loss_weights.sum(axis=1)
  return tiny.loss_sums(params * (count**2).sum(), count.sum())


def test_the_gap_is_held_out_above_trained():
  """Of rows of their own, each one document to a row."""
  suite = suite_of(by_length, {"held_out": (9, 7), "train_rows": (8, 6)})
  found = suite.losses(jnp.float32(1.0))
  held_out, trained = (8 * 8 + 6 * 6) / 14, (7 * 7 + 5 * 5) / 12
  assert found["train_rows/nats_per_token"] == pytest.approx(trained)
  assert found["held_out/gap"] == pytest.approx(held_out - trained)
  assert "held_out/gap" not in suite_of(by_length, {"held_out": (9,)}).losses(
    jnp.float32(1.0)
  )


def test_what_is_left_of_the_base_is_a_ratio_of_sums():
  def loss_fn(params, batch):
    sums = by_length(params, batch)
    known = batch.loss_weights.sum(axis=1) > 6  # The base has long rows right.
    right = (batch.loss_weights.sum(axis=1) * known).sum()
    left = BaseSums(0.5 * sums.nats, 0.25 * sums.weight, right, right / 2)
    return sums._replace(base=left)

  suite = suite_of(loss_fn, {"held_out": (9, 7, 5), "general_text": (4, 7)})
  found = suite.losses(jnp.float32(1.0))
  assert found["held_out/kl"] == pytest.approx(0.5 * (64 + 36 + 16) / 18)
  assert found["held_out/top1_agreement"] == 0.25
  assert found["held_out/base_correct"] == pytest.approx(8 / 18)
  assert found["held_out/both_correct"] == 0.5
  assert found["general_text/base_correct"] == 0
  assert "general_text/both_correct" not in found  # Of nothing no share.


def knowledge(passed):
  return {"replies": [{"passed": bool(x)} for x in passed]}


def test_two_measurements_side_by_side():
  before = {
    "held_out/nats_per_token": 2.0,
    "held_out/gap": 0.0,
    "knowledge": knowledge([1, 1, 1, 1, 0, 0]),
  }
  after = {
    "held_out/nats_per_token": 1.0,
    "held_out/kl": 0.3,
    "train_rows/nats_per_token": 0.75,
    "held_out/gap": 0.25,
    "knowledge": knowledge([1, 1, 1, 0, 1, 0]),
    "repeats": {"answers": 3},
  }
  found = compare(before, after)
  assert found["forgetting"] == [
    {"name": "held_out/kl", "before": None, "after": 0.3}
  ]
  assert found["gap"] == {
    "train_rows": 0.75,
    "held_out": 1.0,
    "gap": 0.25,
    "before": 0.0,
  }
  known = found["knowledge"]
  assert (known["gained"], known["lost"], known["retained"]) == (1, 1, 3 / 4)
  assert known["n"] == 6
  assert known["before"][0] == known["after"][0] == pytest.approx(4 / 6)
  assert found["memorization"] == {
    "repeats": {"before": None, "after": {"answers": 3}},
    "canaries": None,
  }


def measured(batch_size):
  """The held-out figures of a model that needs token / 1000 nats a token."""
  rows = [(list(range(n, 2 * n)), [0.0] * (n - k) + [1.0] * k)
          for n, k in ((9, 1), (7, 6), (8, 2), (6, 5), (9, 8))]  # fmt: skip
  stream = Stream(fake_store(rows), seq_len=10, batch_size=batch_size, epochs=1)

  def loss_fn(params, batch):
    nats = (batch.loss_weights * batch.targets).sum() * params
    return tiny.loss_sums(nats, batch.loss_weights.sum())

  suite = Suite(
    loss_fn=loss_fn,
    batches=lambda stream: stream.batches(),
    held_out=stream,
    general_text=None,
    items=[],
    generate=lambda *asked: pytest.fail("nothing to generate"),
  )
  nats = sum(t for tokens, w in rows for t, on in zip(tokens, w, strict=True)
             if on) / 1000  # fmt: skip
  return suite.losses(jnp.float32(1e-3)), nats / 22


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_the_held_out_loss_is_of_all_tokens_whatever_the_batch(batch_size):
  found, want = measured(batch_size)
  assert found == {
    "held_out/nats_per_token": pytest.approx(want, rel=1e-5),
    "held_out/perplexity": pytest.approx(np.exp(want), rel=1e-5),
  }


def test_a_model_that_is_its_base_is_measured_once():
  """The program that compares with a base is not run at all."""

  def compared(params, batch):
    raise AssertionError("the base was asked")

  suite = suite_of(
    compared, {"held_out": (9, 7), "general_text": (5,)}, own_loss_fn=by_length
  )
  found = suite.losses(jnp.float32(1.0), is_base=True)
  for name in ("held_out", "general_text"):
    assert found[f"{name}/kl"] == 0
    assert found[f"{name}/top1_agreement"] == 1
    # `by_length` says that nothing is predicted rightly.
    assert found[f"{name}/base_correct"] == 0
  with pytest.raises(AssertionError, match="the base was asked"):
    suite.losses(jnp.float32(1.0))


def prompts(groups):
  return [
    Item(
      group,
      Conversation((Message("user", f"{group} {i}"),)),
      ({"check": "contains", "text": "yes"},),
      f"b.jsonl:{i}",
    )
    for i, group in enumerate(groups)
  ]


def test_what_does_not_fit_is_left_out_now_and_later(monkeypatch):
  """Two sets share 10 s; each batch takes 2 s, each prompt 1 s, by the clock.

  The first part of each is free: it compiles.
  """
  clock = [0.0]
  monkeypatch.setattr(suites.time, "perf_counter", lambda: clock[0])
  asked, reports = [], []

  def loss_fn(params, batch):
    return tiny.loss_sums(params * 3, batch.loss_weights.sum())

  def generate(params, conversations, progress):
    progress(1)
    asked.append([one.messages[0].content for one in conversations])
    clock[0] += len(conversations)
    return [
      Reply("yes", [1], True, Message("assistant", "yes"))
      for _ in conversations
    ]

  suite = suite_of(
    loss_fn,
    {"held_out": (9,) * 20},
    prompts("aaaaaaaabbbb"),
    generate,
    max_seconds=10.0,
    prompts_at_once=2,
    progress=lambda *report: reports.append(report),
  )

  def slow_loss(params, batch):
    clock[0] += 2
    return loss_fn(params, batch)

  suite.loss_fn = slow_loss
  first = suite(jnp.float32(1.0))
  # Of 10 batches one is free, two fit into 5 s, and a third would not.
  assert suite.measured == {"held_out": (3, 10), "behaviors": (6, 12)}
  assert first["measured"] == suite.measured
  assert reports[2] == ("held_out", 3, 3)
  # While replies grow, and after each group of prompts.
  assert reports[5:7] == [("behaviors", 3, 12), ("behaviors", 4, 12)]
  # One of each group in turn.
  assert asked == [["a 0", "b 8"], ["a 1", "b 9"], ["a 2", "b 10"]]
  assert len(suite.left_out()) == 2
  later = suite(jnp.float32(2.0))
  assert asked[3] == [prompt for some in asked[:3] for prompt in some]
  places = [
    [reply["where"] for reply in one["behaviors"]["replies"]]
    for one in (first, later)
  ]
  assert places[0] == places[1] == [f"b.jsonl:{i}" for i in (0, 1, 2, 8, 9, 10)]
  assert later["held_out/nats_per_token"] == pytest.approx(
    2 * first["held_out/nats_per_token"]
  )
  # Another process that resumes measures the same.
  other = suite_of(loss_fn, {"held_out": (9,) * 20}, max_seconds=10.0)
  other.measured = {"held_out": (3, 10)}
  other.losses(jnp.float32(1.0))
  assert other.measured == {"held_out": (3, 10)}


def test_on_a_cpu_bfloat16_is_measured_in_float32(tmp_path):
  model = tiny.model_folder(tmp_path / "model")
  rows = tiny.rows_file(tmp_path / "rows.jsonl", tiny.ROWS)
  found = []
  for dtype in ("float32", "bfloat16"):
    config = tiny.config(
      tmp_path, model, rows, model__dtype=dtype, data__eval=str(rows)
    )
    config.data.allow = ("overlap",)
    run = build.build_run(config, lambda line: None)
    params = {**run.state.params, **run.state.frozen}
    found.append(evals.make_suite(config, run).losses(params, is_base=True))
  assert found[0] == found[1]
