"""Losses of single examples against each of them alone, in float64."""

import numpy as np
import pytest

import tiny
from sft_jax.training.build import build, evals, measuring


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> build.BuiltRun:
  folder = tmp_path_factory.mktemp("measuring")
  model = tiny.model_folder(folder / "model")
  rows = tiny.rows_file(folder / "rows.jsonl")
  config = tiny.config(
    folder, model, rows, data__holdout=0.5, data__seq_len=128
  )
  return build.build_run(config, lambda line: None)


def _alone(run: build.BuiltRun, i: int) -> tuple[float, float]:
  """Nats and weight of a held-out example, unpacked."""
  assert run.held_out
  example = run.held_out.store.example(i)
  params = {**run.state.params, **run.state.frozen}
  tokens = example.tokens[None, :]
  hidden = run.model.hidden(params, tokens)
  logits = np.float64(run.model.logits(params, hidden))[0]
  log_z = np.log(np.exp(logits).sum(-1))
  targets = example.tokens[1:]
  nll = log_z[:-1] - logits[np.arange(len(targets)), targets]
  weights = example.loss_weights[1:]
  return float((weights * nll).sum()), float(weights.sum())


@pytest.fixture(scope="module")
def measured(tmp_path_factory, run):
  """By document, beside what the figures of the whole set are made of."""
  folder = tmp_path_factory.mktemp("measuring")
  config = tiny.config(folder, "", "", data__seq_len=128)
  suite = evals.make_suite(config, run)
  figures = suite.losses({**run.state.params, **run.state.frozen})
  return suite.by_document, figures["held_out/nats_per_token"]


def test_each_row_has_the_loss_it_has_alone(run, measured):
  stream, (by_document, mean) = run.held_out, measured
  found = measuring.by_change(stream, run.tokenizer, by_document)
  total = sum(row["nats"] for row in found)
  assert mean == pytest.approx(
    total / sum(row["trained_tokens"] for row in found)
  )
  want = {
    stream.store.place(i): _alone(run, i)
    for i in range(len(stream.store.index))
  }
  assert {row["place"] for row in found} == set(want)
  assert len(found) == len(want) == 8
  for row in found:
    nats, weight = want[row["place"]]
    assert row["nats"] == pytest.approx(nats, rel=1e-5)
    assert row["trained_tokens"] == weight
    assert row["nats_per_token"] == pytest.approx(nats / weight, rel=1e-5)
  losses = [row["nats_per_token"] for row in found]
  assert losses == sorted(losses, reverse=True)
  # Packed, or each document would have a row to itself and prove nothing.
  assert max(len(ids) for ids in stream.rows_of(0)) > 1
  shown = [row for row in found if "spans" in row]
  assert shown == found[:3]
  assert {row["change"] for row in found} == {None}
  text = "".join(span["text"] for span in shown[0]["spans"])
  assert "What goes with" in text


def test_what_rose_most_over_the_base_is_first(run, measured):
  """Not what was hard before: a row's own loss in the base is subtracted."""
  look = lambda before: measuring.by_change(
    run.held_out, run.tokenizer, measured[0], before
  )
  after = look(None)
  rise = {row["row"]: float(i % 5) for i, row in enumerate(after)}
  before = {
    str(row["row"]): row["nats_per_token"] - rise[row["row"]] for row in after
  }
  found = look(before)
  assert [row["change"] for row in found] == pytest.approx(
    sorted(rise.values(), reverse=True)
  )
  assert [row["row"] for row in found] != [row["row"] for row in after]
  assert len([row for row in found if "spans" in row]) == 3
  # Of other rows nothing is known.
  assert [row["row"] for row in look({"999": 1.0})] == [
    row["row"] for row in after
  ]
