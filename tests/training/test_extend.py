"""--extend: a finished run goes on, under the schedule that was asked for."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import optax
import pytest

import sft_jax
import tiny
from sft_jax.common import trees
from sft_jax.reporting.metrics import read_jsonl
from sft_jax.training.interrupts import Stopped

PEAK, OLD, NEW = 2e-2, 4, 10


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(config of a finished run of `OLD` steps, its result)."""
  folder = tmp_path_factory.mktemp("extend")
  config = tiny.config(
    *(folder, tiny.model_folder(folder / "model")),
    tiny.rows_file(folder / "rows.jsonl"),
    steps=OLD, optim__learning_rate=PEAK, optim__warmup_steps=1,
    eval__kl=False, export=False,
  )  # fmt: skip
  config.log.writers = ()
  config.compile_cache = str(folder / "compiled")
  return config, sft_jax.train(config)


def longer(made, folder, steps=NEW, **changes):
  config = made[0].copy_and_resolve_references()
  config.steps = steps
  for key, value in changes.items():
    config.optim[key] = value
  config.workdir = str(folder / "run")
  shutil.copytree(made[1].workdir, config.workdir)
  return config


def rates(result):
  records = read_jsonl(result.workdir / "metrics.jsonl")
  return [r["optim/learning_rate"] for r in records]


def equal(one, other):
  jax.tree.map(
    np.testing.assert_array_equal, trees.flatten(one), trees.flatten(other)
  )


def test_the_rate_continues_as_asked(made, tmp_path):
  """Against optax's schedules; the old steps keep their records."""

  def cosine(n):  # One step of warm-up, which is at the peak already.
    falling = optax.cosine_decay_schedule(PEAK, n - 1, 0.05)
    return [PEAK, *(float(falling(step)) for step in range(n - 1))]

  old = cosine(OLD)
  np.testing.assert_allclose(rates(made[1]), old, rtol=1e-5)
  for how, later in (
    ("constant", [old[-1]] * (NEW - OLD)),
    ("rewarm", cosine(NEW - OLD)),
    ("stretch", cosine(NEW)[OLD:]),
  ):
    config = longer(made, tmp_path / how)
    result = sft_jax.train(config, extend=how)
    np.testing.assert_allclose(rates(result), old + later, rtol=1e-5)
    (note,) = [
      line
      for line in read_jsonl(result.workdir / "incidents.jsonl")
      if line["kind"] == "extended"
    ]
    assert f"Extended at step {OLD} to {NEW}" in json.dumps(note)
    # Nothing was interrupted.
    assert "interruptions" not in sft_jax.read_run(result.workdir)["result"]


def test_constant_is_the_uninterrupted_run(made, tmp_path):
  """Where the rate is constant anyway, but for how programs round it."""
  config = made[0].copy_and_resolve_references()
  config.optim.schedule, config.optim.warmup_steps = "constant", 0
  config.steps, config.workdir = NEW, str(tmp_path / "whole")
  whole = sft_jax.train(config)
  config.workdir = str(tmp_path / "parts")
  for steps, how in ((3, ""), (6, "constant"), (NEW, "rewarm")):
    config.steps = steps
    parts = sft_jax.train(config, extend=how)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    trees.flatten(parts.params),
    trees.flatten(whole.params),
  )
  chains = [
    read_jsonl(result.workdir / "metrics.jsonl")[-1]["data/chain"]
    for result in (parts, whole)
  ]
  assert chains[0] == chains[1]


def test_a_killed_extension_resumes_to_the_bit(made, tmp_path):
  whole = sft_jax.train(longer(made, tmp_path / "whole"), extend="rewarm")
  config = longer(made, tmp_path / "cut")

  def cut(record):
    if record["step"] == 7:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.raises(Stopped):
    sft_jax.train(config, extend="rewarm", on_record=cut)
  config.optim.extended = ()  # As the command line gives it.
  equal(sft_jax.train(config, extend="rewarm").params, whole.params)
  config.optim.extended = ()
  equal(sft_jax.train(config).params, whole.params)  # Finished.


def test_what_cannot_be_extended_is_refused(made, tmp_path):
  config = longer(made, tmp_path / "same", steps=OLD)
  with pytest.raises(ValueError, match=r"steps=4, epochs=2 .* Raise epochs"):
    sft_jax.train(config, extend="constant")
  config = longer(made, tmp_path / "less", steps=3)
  with pytest.raises(ValueError, match="got 3 steps for a run at step 4"):
    sft_jax.train(config, extend="constant")
  config = longer(made, tmp_path / "rate", learning_rate=1e-3)
  with pytest.raises(
    ValueError, match=r"optim\.learning_rate: 0\.02 -> 0\.001"
  ):
    sft_jax.train(config, extend="constant")
  config = made[0].copy_and_resolve_references()
  config.workdir = str(tmp_path / "none")
  with pytest.raises(ValueError, match="which holds no run"):
    sft_jax.train(config, extend="stretch")
  config.optim.extended = ((3, "faster"),)
  with pytest.raises(ValueError, match=r"optim\.extended: got \(\(3, 'faster'"):
    sft_jax.train(config)
