"""Windows divide once; the record survives a resume without doubles."""

import math

import jax.numpy as jnp
import pytest

from sft_jax.reporting.metrics import JsonlWriter, Window, read_jsonl


def pairs(nats, weight, nonfinite=0.0):
  one = jnp.ones(())
  return {
    "loss/nats_per_token": (jnp.asarray(nats), jnp.asarray(weight)),
    "optim/nonfinite": (jnp.asarray(nonfinite), one),
  }


def test_a_window_is_a_ratio_of_sums():
  window = Window()
  window.add(pairs(1.0, 1.0))
  window.add(pairs(27.0, 9.0))
  values = window.take()
  assert values == {
    "loss/nats_per_token": pytest.approx(2.8),
    "loss/perplexity": pytest.approx(math.exp(2.8)),
    "loss/trained_weight": 10.0,
  }


def test_tokens_are_counted_over_the_window():
  """3 of 12, then 9 of 12 tokens are trained; of 16 slots each."""
  window = Window()
  for trained in (3, 9):
    counts = {
      "data/trained_fraction": (jnp.asarray(trained), jnp.asarray(12)),
      "data/fill": (jnp.asarray(12), jnp.asarray(16)),
    }
    window.add(pairs(1.0, 1.0) | counts)
  values = window.take()
  assert (values["data/tokens"], values["data/trained_tokens"]) == (24, 12)
  assert (values["data/trained_fraction"], values["data/fill"]) == (0.5, 0.75)


def test_the_perplexity_of_a_loss_that_has_none_is_infinite():
  window = Window()
  window.add(pairs(1000.0, 1.0))
  assert window.take()["loss/perplexity"] == math.inf


def test_what_no_token_belongs_to_has_no_mean():
  window = Window()
  for _ in (1, 2):
    empty = {"loss/source/b": (jnp.zeros(()), jnp.zeros(()))}
    window.add(pairs(0.0, 0.0) | empty)
  assert window.take() == {
    "loss/nats_per_token": 0.0,
    "loss/perplexity": 1.0,
    "loss/trained_weight": 0.0,
  }


def test_a_window_in_which_every_step_was_left_out_has_no_loss():
  values = Window().take()
  assert math.isnan(values.pop("loss/nats_per_token"))
  assert math.isnan(values.pop("loss/perplexity"))
  assert values == {
    "loss/trained_weight": 0.0,
    "data/tokens": 0.0,
    "data/trained_tokens": 0.0,
  }


def test_resume_forgets_later_records_and_half_lines(tmp_path):
  path = tmp_path / "metrics.jsonl"
  writer = JsonlWriter(path, resume_step=0)
  for step in (1, 2, 3):
    writer.write(step, {"loss": step / 2, "bad": float("nan")})
  writer.close()
  with path.open("a") as file:
    file.write('{"step": 4, "lo')
  writer = JsonlWriter(path, resume_step=2)
  assert [record["step"] for record in writer.kept] == [1, 2]
  assert [record["step"] for record in writer.forgotten] == [3]
  writer.write(3, {"loss": 9.0})
  writer.close()
  found = read_jsonl(path)
  assert all("+00:00" in record.pop("time/at") for record in found)
  assert found == [
    {"step": 1, "loss": 0.5, "bad": None},
    {"step": 2, "loss": 1.0, "bad": None},
    {"step": 3, "loss": 9.0},
  ]
