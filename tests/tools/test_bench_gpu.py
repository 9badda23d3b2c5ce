"""The GPU's table on a CPU, in small."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import bench_gpu  # noqa: E402  # tools/ is no package.

CASE = bench_gpu.Case("0.5B", "full", 16, 64, 2, 1, True)


def test_a_batch_is_what_its_case_says():
  batch, lengths = bench_gpu.batch_of(CASE)
  assert batch.tokens.shape == (2, 64)
  assert (batch.segment_ids > 0).sum() == lengths.sum() > 100
  # Documents of 16 tokens, give or take a third; positions start anew.
  assert 10 <= lengths.min() <= lengths.max() <= 22
  assert (batch.positions == 0).sum() >= len(lengths)
  # A target is the next token of the same document.
  rows, slots = np.nonzero(batch.loss_weights)
  assert (batch.targets == np.roll(batch.tokens, -1, 1))[rows, slots].all()
  same = batch.segment_ids == np.roll(batch.segment_ids, -1, 1)
  assert same[rows, slots].all()
  assert 0.4 < len(rows) / lengths.sum() < 0.6
  whole, lengths = bench_gpu.batch_of(CASE._replace(document=64))
  assert lengths.tolist() == [64, 64]
  assert (whole.segment_ids == 1).all()


def test_shapes_are_the_published_ones():
  """Parameters of every model, by the formula of a Llama."""
  expected = {"0.5B": 494.0e6, "1B": 1235.8e6, "8B": 8030.3e6, "0.6B": 596.0e6}
  for name, c in bench_gpu.MODELS.items():
    d, ff = c["hidden_size"], c["intermediate_size"]
    head = c.get("head_dim", d // c["num_attention_heads"])
    q, kv = (head * c[f"num_{x}_heads"] for x in ("attention", "key_value"))
    layer = 2 * d * (q + kv) + 3 * d * ff + 2 * d
    if c["model_type"] == "qwen3":
      layer += 2 * head  # Norms of q and k.
    if c["model_type"] == "qwen2":
      layer += d + 2 * kv  # Biases of q, k and v.
    tables = 1 if c["tie_word_embeddings"] else 2
    total = tables * c["vocab_size"] * d + c["num_hidden_layers"] * layer + d
    assert abs(total / expected[name] - 1) < 1e-3, name


def test_a_case_that_fails_is_a_line_of_the_table():
  assert "failed: no memory" in bench_gpu.line("x", CASE, "no memory")


@pytest.mark.slow
def test_a_tiny_table():
  script = str(ROOT / "tools" / "bench" / "bench_gpu.py")
  done = subprocess.run(
    [sys.executable, script, "--tiny", "--models", "8B", "--methods", "lora"],
    cwd=ROOT,
    env={"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=True,
  )
  lines = [x for x in done.stdout.splitlines() if x.startswith("sft_jax")]
  assert len(lines) == 2, done.stdout
  assert all("tokens/s" in x and "loss" in x for x in lines), done.stdout


def test_a_lora_of_the_tiny_shape_trains():
  report = bench_gpu.ours(CASE._replace(model="8B", method="lora"), {})
  assert report["tokens_per_s"] > 0
  assert 5.5 < report["loss"] < 7.0  # ln 512 is 6.2: random weights.
  assert report["mfu"] is None  # A CPU has no published peak.
  json.dumps(report)
