"""Windows divide once; the record survives a resume without doubles."""

import jax.numpy as jnp
import pytest

from sft_jax.metrics import JsonlWriter, Window, read_jsonl


def pairs(nats, weight, nonfinite=0.0):
  one = jnp.ones(())
  return {
    "loss/nats_per_token": (jnp.asarray(nats), jnp.asarray(weight)),
    "optim/nonfinite": (jnp.asarray(nonfinite), one),
  }


def test_a_window_is_a_ratio_of_sums():
  window = Window()
  window.add(1, pairs(1.0, 1.0))
  window.add(2, pairs(27.0, 9.0))
  values = window.take()
  assert values == {
    "loss/nats_per_token": pytest.approx(2.8),
    "loss/trained_tokens": 10.0,
  }


def test_a_nonfinite_step_is_named():
  window = Window()
  window.add(6, pairs(1.0, 1.0))
  window.add(7, pairs(float("nan"), 1.0, nonfinite=1.0))
  with pytest.raises(FloatingPointError, match="step 7"):
    window.take()


def test_resume_forgets_later_records_and_half_lines(tmp_path):
  path = tmp_path / "metrics.jsonl"
  writer = JsonlWriter(path, resume_step=0)
  for step in (1, 2, 3):
    writer.write(step, {"loss": step / 2, "bad": float("nan")})
  writer.close()
  with path.open("a") as file:
    file.write('{"step": 4, "lo')
  writer = JsonlWriter(path, resume_step=2)
  writer.write(3, {"loss": 9.0})
  writer.close()
  assert read_jsonl(path) == [
    {"step": 1, "loss": 0.5, "bad": None},
    {"step": 2, "loss": 1.0, "bad": None},
    {"step": 3, "loss": 9.0},
  ]
