"""The main job on the bundled demo, and on real rows where they are at hand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import sft_jax
from configs import base
from sft_jax.reporting.metrics import read_jsonl
from tiny_tokenizers import SHARED

ROOT = Path(__file__).parents[1]
STORIES = SHARED / "pretrained" / "stories260k_hf"
ALPACA = SHARED / "instruction" / "alpaca_5000.json"
needs_shared = pytest.mark.skipif(
  not STORIES.is_dir(), reason="needs the shared data folder"
)


def test_the_demo_is_small():
  demo = ROOT / "sft_jax"
  size = sum(p.stat().st_size for p in demo.rglob("*") if p.is_file())
  assert size < 12e6


@pytest.mark.slow
def test_the_main_job_elicits_what_the_base_model_knows(tmp_path):
  """`configs/base.py` as it stands, in another workdir, on one device."""
  done = subprocess.run(
    [
      sys.executable,
      *("-m", "sft_jax.main", "--config=configs/base.py"),
      f"--config.workdir={tmp_path}",
    ],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    check=True,
  )
  print(done.stdout)
  rows = sft_jax.train(_again(tmp_path)).metrics
  assert len(rows["behaviors"]) >= 8
  for row in rows["behaviors"]:
    assert row["n"] >= 40, row
    assert row["before"][0] <= 0.15, row
    assert row["after"][0] >= 0.85, row
  losses = {row["name"]: row for row in rows["losses"]}
  assert losses["general_text/perplexity"]["change"] < 0.10
  held_out = losses["held_out/nats_per_token"]
  assert held_out["after"] < 0.5 * held_out["before"]


def _again(workdir: Path):
  """The finished run's config: it is reported, not run again."""
  config = base.get_config()
  config.workdir = str(workdir)
  return config


@needs_shared
@pytest.mark.slow
def test_a_genuine_model_on_genuine_rows(tmp_path):
  """Alpaca on stories260k: the loss falls, empty outputs are reported."""
  config = base.get_config()
  config.workdir = str(tmp_path)
  config.model.path = str(STORIES)
  config.data.train = str(ALPACA)
  config.data.seq_len = 512
  config.steps = 100
  result = sft_jax.train(config)
  losses = {row["name"]: row for row in result.metrics["losses"]}
  assert losses["held_out/nats_per_token"]["change"] < -0.05
  ledger = (tmp_path / "ledger.json").read_text()
  assert re.search(r'"empty answer": 2', ledger)
  assert "alpaca_5000.json[2335]" in ledger
  steps = [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")]
  assert steps[-1] == 100

  torch = pytest.importorskip("torch", reason="live oracle: needs torch")
  transformers = pytest.importorskip("transformers")
  model, params = sft_jax.load_pretrained(tmp_path / "export")
  tokens = np.random.default_rng(0).integers(0, 512, (2, 100))
  logits = jax.jit(lambda p, t: model.logits(p, model.hidden(p, t)))(
    params, tokens.astype(np.int32)
  )
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "export"
  )
  with torch.no_grad():
    want = theirs(torch.asarray(tokens)).logits.numpy()
  np.testing.assert_allclose(logits, want, atol=1e-4)
