"""The learning rate that a run finds: its trials are runs, and it is kept."""

import dataclasses
import json
import math
import os
import signal

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sft_jax
import tiny
from sft_jax.common import sharding
from sft_jax.models.config import read_config
from sft_jax.reporting.metrics import read_jsonl
from sft_jax.training.build import data, model
from sft_jax.training.interrupts import Stopped
from sft_jax.training.planning import suggest

STEPS = 80


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(config with 'auto', its result)."""
  folder = tmp_path_factory.mktemp("suggest")
  model = tiny.model_folder(folder / "model")
  held = tiny.rows_file(folder / "held.jsonl", tiny.ROWS[::3])
  config = tiny.config(
    *(folder, model, tiny.rows_file(folder / "rows.jsonl")),
    **{"data__eval": str(held), "data__allow": ("overlap",)},
    steps=STEPS, optim__learning_rate="auto", eval__kl=False, eval__gap=False,
    optim__warmup_steps=-1, checkpoint__every=40,
    log__every=40, export=False,
  )  # fmt: skip
  config.log.writers = ()

  def stop(record):
    if record["step"] == 40:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.raises(Stopped):
    sft_jax.train(config, on_record=stop)
  return config, sft_jax.train(config)


def test_a_trial_is_the_beginning_of_a_run(made, tmp_path):
  """Its loss is that of a run of so many steps at that rate, measured."""
  config, result = made
  incidents = read_jsonl(result.workdir / "incidents.jsonl")
  (line,) = [x["message"] for x in incidents if x["kind"] == "learning rate"]
  loss = float(line.split("after 1 steps: ")[1].split(" at ")[0])
  shape = read_config(config.model.path)  # The lowest rate comes first.
  rate = suggest.prior_rate(config, shape) / 10**0.5
  config = config.copy_and_resolve_references()
  config.workdir, config.steps = str(tmp_path / "one"), 1
  config.optim.learning_rate, config.eval.every = rate, 1
  config.checkpoint.keep_best = "held_out/nats_per_token"
  config.eval.patience = 5
  sft_jax.train(config)
  records = read_jsonl(tmp_path / "one" / "metrics.jsonl")
  (measured,) = [
    x for record in records if (x := record.get("held_out/nats_per_token"))
  ]
  assert measured == pytest.approx(loss, rel=5e-4)  # Four digits are shown.


def test_the_rate_is_found_once_and_kept(made, monkeypatch):
  config, result = made
  kept = json.loads((result.workdir / "config.json").read_text())
  rate = kept["optim"]["learning_rate"]
  assert 1e-4 < rate < 1
  assert config.optim.learning_rate == "auto"
  monkeypatch.setattr(suggest, "find_rate", None)  # Cannot be called.
  again = sft_jax.train(config)  # Finished: nothing changed.
  assert again.metrics == json.loads(
    (result.workdir / "result.json").read_text()
  )
  records = read_jsonl(result.workdir / "metrics.jsonl")
  peak = max(record.get("optim/learning_rate", 0) for record in records)
  assert rate / 2 < peak <= rate


@given(st.floats(-1.4, 1.4), st.floats(0.1, 3), st.integers(3, 5))
def test_a_parabola_is_found_exactly(at, steep, trials):
  """Within one spacing of the center, whatever the number of trials."""
  best = 1e-3 * 10 ** (at / 2)
  calls = []

  def trial(rate):
    calls.append(rate)
    return 1 + steep * math.log(rate / best) ** 2

  found, table = suggest.search(trial, 1e-3, trials)
  assert len(calls) == len(table) <= trials
  assert [rate for rate, _ in table] == sorted(calls)
  if abs(at) <= 0.5 or len(table) > 3:
    assert found == pytest.approx(best)
  else:  # Seen from outside: the edge itself.
    assert found == pytest.approx(1e-3 * 10 ** (math.copysign(0.5, at)))


def test_what_explodes_is_not_taken():
  found, _ = suggest.search(lambda r: math.inf if r > 2e-3 else 1 / r, 1e-3, 5)
  assert found == pytest.approx(1e-3)


def test_a_step_in_updates_is_steps_of_fewer_packs(tmp_path):
  folder = tiny.model_folder(tmp_path / "model")
  rows = tiny.rows_file(tmp_path / "rows.jsonl")
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])

  def trial(packs, steps, updates):
    config = tiny.config(
      *(tmp_path, folder, rows),
      **{"batch_size": packs, "optim__learning_rate": "auto"},
      **{"mesh__data": 1, "steps": 4},
    )
    tokenizer = data.load_tokenizer(config, config.model.path)
    stream = data.load_data(config, tokenizer, print).stream
    made, params = model.load_model(config, mesh, print)
    return suggest.make_trial(
      *(config, made, mesh, params, stream, None),
      **{"steps": steps, "measured": steps, "updates": updates},
    )(1e-2)

  whole, cut = trial(4, 1, 1), trial(4, 1, 2)
  assert cut == pytest.approx(trial(2, 2, 1), rel=1e-5)
  assert abs(whole - cut) > 1e-3


@pytest.mark.parametrize(
  ("batch_size", "accum", "devices", "updates"),
  [(16, 1, 1, 8), (16, 1, 8, 2), (16, 4, 1, 4), (7, 1, 1, 7), (8, 1, 8, 1)],
)
def test_a_step_is_cut_as_the_mesh_allows(batch_size, accum, devices, updates):
  config = sft_jax.default_config()
  config.batch_size, config.accum_steps = batch_size, accum
  mesh = sharding.make_mesh(devices, 1, 1, devices=jax.devices()[:devices])
  assert suggest._updates(config, mesh) == updates


@given(st.integers(1, 10**6), st.integers(1, 4))
def test_trials_cost_a_twentieth_at_most(num_steps, measured):
  trials, steps = suggest.affordable(num_steps, measured)
  assert trials * (steps + measured / 3) <= 0.05 * num_steps + 1e-9
  assert (trials >= 3 and steps >= 1) or trials == 0


def test_the_prior_is_the_published_one():
  config = sft_jax.default_config()
  llama = dataclasses.replace(tiny.SPECK, family="llama", d_model=4096)
  qwen = dataclasses.replace(llama, family="qwen3")
  assert suggest.prior_rate(config, llama) == pytest.approx(2.856e-5, rel=1e-3)
  config.lora.rank, config.lora.alpha = 64, 32.0
  assert suggest.prior_rate(config, llama) == pytest.approx(2.856e-4, rel=1e-3)
  assert suggest.prior_rate(config, qwen) == pytest.approx(4.730e-4, rel=1e-3)
  config.optim.name = "sgd"
  with pytest.raises(ValueError, match=r"optim\.name='sgd', expected"):
    suggest.prior_rate(config, llama)
