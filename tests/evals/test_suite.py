"""What is measured is a ratio of sums over rows that are each seen once."""

import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from fake_store import fake_store
from sft_jax.data.pipeline import Stream
from sft_jax.evals.suite import Suite, compare
from sft_jax.step.loss import BaseSums


def suite_of(loss_fn, **streams):
  """Rows of so many trained tokens each, by the name of the stream."""
  made = {
    name: Stream(
      fake_store([([7] * n, [0.0] + [1.0] * (n - 1)) for n in lengths]),
      seq_len=10, batch_size=2, epochs=1,
    )
    for name, lengths in streams.items()
  }  # fmt: skip
  return Suite(
    loss_fn=loss_fn,
    batches=lambda stream: stream.batches(),
    held_out=made["held_out"],
    general_text=made.get("general_text"),
    train_rows=made.get("train_rows"),
    items=[],
    generate=lambda params, prompts: pytest.fail("nothing to generate"),
  )


def by_length(params, batch):
  """Every token costs the number of the trained tokens of its row."""
  count = batch.loss_weights.sum(axis=1)
  return tiny.loss_sums(params * (count**2).sum(), count.sum())


def test_the_gap_is_held_out_above_trained():
  """Of rows of their own, each one document to a row."""
  suite = suite_of(by_length, held_out=(9, 7), train_rows=(8, 6))
  found = suite.losses(jnp.float32(1.0))
  held_out, trained = (8 * 8 + 6 * 6) / 14, (7 * 7 + 5 * 5) / 12
  assert found["train_rows/nats_per_token"] == pytest.approx(trained)
  assert found["held_out/gap"] == pytest.approx(held_out - trained)
  assert "held_out/gap" not in suite_of(by_length, held_out=(9,)).losses(
    jnp.float32(1.0)
  )


def test_what_is_left_of_the_base_is_a_ratio_of_sums():
  def loss_fn(params, batch):
    sums = by_length(params, batch)
    known = batch.loss_weights.sum(axis=1) > 6  # The base has long rows right.
    right = (batch.loss_weights.sum(axis=1) * known).sum()
    left = BaseSums(0.5 * sums.nats, 0.25 * sums.weight, right, right / 2)
    return sums._replace(base=left)

  suite = suite_of(loss_fn, held_out=(9, 7, 5), general_text=(4, 7))
  found = suite.losses(jnp.float32(1.0))
  assert found["held_out/kl"] == pytest.approx(0.5 * (64 + 36 + 16) / 18)
  assert found["held_out/kept"] == 0.25
  assert found["held_out/base_right"] == pytest.approx(8 / 18)
  assert found["held_out/still_right"] == 0.5
  assert found["general_text/base_right"] == 0
  assert "general_text/still_right" not in found  # Of nothing no share.


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
  assert found["memorisation"] == {
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
    generate=lambda params, prompts: pytest.fail("nothing to generate"),
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
