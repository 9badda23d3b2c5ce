"""Whole runs on a tiny model: they learn, resume, refuse and export."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import sft_jax
import tiny
from sft_jax import trees
from sft_jax.metrics import read_jsonl

ROOT = Path(__file__).parents[1]
# What may differ between two runs of the same steps.
CLOCK = ("time/", "speed/")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
  return tiny.model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
  return tiny.rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def records(workdir: Path) -> list[dict]:
  return [
    {k: v for k, v in row.items() if not k.startswith(CLOCK)}
    for row in read_jsonl(workdir / "metrics.jsonl")
  ]


def same(a, b) -> bool:
  equal = jax.tree.map(lambda x, y: bool((x == y).all()), a, b)
  return all(jax.tree.leaves(equal))


def test_overfits_and_answers_and_stops(tmp_path, model, rows):
  """Trained on 16 rows, greedy decoding gives their answers and ends."""
  config = tiny.config(
    tmp_path,
    model,
    rows,
    steps=240,
    checkpoint__every=0,
    log__every=80,
    optim__learning_rate=5e-3,
    optim__warmup_steps=10,
    optim__weight_decay=0.0,
  )
  result = sft_jax.train(config)
  record = records(tmp_path / "run")[-1]
  assert record["loss/nats_per_token"] < 0.02
  assert record["acc/token"] == 1.0
  # From the export alone, as a stranger would.
  export = tmp_path / "run" / "export"
  model, params = sft_jax.load_pretrained(export)
  assert same(params, result.params)
  conversations = [
    sft_jax.Conversation((sft_jax.Message("user", row["instruction"]),))
    for row in tiny.ROWS
  ]
  replies = sft_jax.generate(
    model,
    params,
    sft_jax.load_tokenizer(export),
    conversations,
    max_new_tokens=24,
  )
  assert [r.text for r in replies] == [row["output"] for row in tiny.ROWS]
  assert all(r.stopped for r in replies)


def test_a_run_leaves_what_it_says(tmp_path, model, rows, capsys):
  config = tiny.config(tmp_path, model, rows, data__holdout=0.2)
  result = sft_jax.train(config)
  workdir = tmp_path / "run"
  assert {p.name for p in workdir.iterdir()} >= {
    "checkpoints",
    "config.json",
    "evals",
    "export",
    "ledger.json",
    "metrics.jsonl",
    "report.html",
    "result.json",
  }
  ledger = json.loads((workdir / "ledger.json").read_text())
  (source,) = ledger["sources"].values()
  assert source["rows_in"] == 16
  assert source["rows_in"] == source["rows_trained"] + sum(
    source["dropped"].values()
  )
  loss = result.metrics["losses"][0]
  assert loss["name"] == "held_out/nats_per_token"
  shown = capsys.readouterr().out
  for word in ("parameters", "held out", "expected time", "devices", "fill"):
    assert word in shown
  again = sft_jax.train(config)
  assert "is finished" in capsys.readouterr().out
  assert same(again.params, result.params)


def test_a_changed_config_is_refused(tmp_path, model, rows):
  sft_jax.train(tiny.config(tmp_path, model, rows, steps=3))
  changed = tiny.config(
    tmp_path, model, rows, steps=3, optim__learning_rate=1e-5
  )
  with pytest.raises(ValueError, match=r"optim\.learning_rate: .* -> 1e-05"):
    sft_jax.train(changed)


def test_changed_rows_are_refused(tmp_path, model):
  path = tiny.rows_file(tmp_path / "rows.jsonl")
  config = tiny.config(tmp_path, model, path, steps=3)
  sft_jax.train(config)
  tiny.rows_file(path, tiny.ROWS[:-1])
  with pytest.raises(ValueError, match="made from data"):
    sft_jax.train(config)


def test_lora_trains_adapters_only(tmp_path, model, rows):
  config = tiny.config(
    tmp_path, model, rows, lora__rank=4, export=False, checkpoint__every=0
  )
  result = sft_jax.train(config)
  _, base = sft_jax.load_pretrained(model)
  flat = trees.flatten(result.params)
  for path, leaf in trees.flatten(base).items():
    np.testing.assert_array_equal(flat[path], leaf, err_msg=path)
  moved = [p for p in flat if p.endswith("lora_b") and flat[p].any()]
  assert len(moved) == 7


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, model, rows):
  """Every update is far too large; the run says where it broke."""
  config = tiny.config(
    tmp_path,
    model,
    rows,
    steps=20,
    optim__learning_rate=1e30,
    optim__clip_norm=0.0,
  )
  with pytest.raises(FloatingPointError, match=r"step \d+: the loss"):
    sft_jax.train(config)


WORKER = """
import sys
sys.path[:0] = [{tests!r}, {data!r}]
from pathlib import Path
import tiny, sft_jax
sft_jax.train(tiny.config(Path(sys.argv[1]), Path(sys.argv[2]),
                          Path(sys.argv[3]), steps=40))
"""


# One device, and compiled in a hurry: see conftest.py.
QUICK = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)


def spawn(folder: Path, model: Path, rows: Path) -> subprocess.Popen:
  code = WORKER.format(tests=str(ROOT / "tests"), data=str(ROOT / "tests/data"))
  return subprocess.Popen(
    [sys.executable, "-c", code, str(folder), str(model), str(rows)],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT)},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for_step(process: subprocess.Popen, path: Path, step: int) -> None:
  """Returns once the record of `step` is on disk; fails if the run ended."""
  while True:
    lines = path.read_text().splitlines() if path.exists() else []
    if any(
      json.loads(line)["step"] >= step for line in lines if line[-1:] == "}"
    ):
      return
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.01)


def finish(process: subprocess.Popen) -> None:
  _, error = process.communicate()
  assert process.returncode == 0, error


def test_killed_and_resumed_equals_uninterrupted(tmp_path, model, rows):
  """kill -9 twice: the same records and the same bytes of the export."""
  whole = tmp_path / "whole"
  finish(spawn(whole, model, rows))
  killed = tmp_path / "killed"
  for step in (5, 17):
    process = spawn(killed, model, rows)
    wait_for_step(process, killed / "run" / "metrics.jsonl", step)
    process.kill()
    process.communicate()
  assert not (killed / "run" / "export").exists()
  finish(spawn(killed, model, rows))
  assert records(killed / "run") == records(whole / "run")
  assert len(records(whole / "run")) == 40
  weights = [
    (folder / "run" / "export" / "model.safetensors").read_bytes()
    for folder in (whole, killed)
  ]
  assert weights[0] == weights[1]


def test_sigterm_saves_and_says_how_to_go_on(tmp_path, model, rows):
  process = spawn(tmp_path, model, rows)
  wait_for_step(process, tmp_path / "run" / "metrics.jsonl", 3)
  process.send_signal(signal.SIGTERM)
  _, error = process.communicate()
  assert "stopped by signal after step" in error
  step = int(error.split("after step ")[1].split(",")[0])
  saved = [
    int(p.name)
    for p in (tmp_path / "run/checkpoints").iterdir()
    if p.name.isdigit()
  ]
  assert max(saved) == step
  finish(spawn(tmp_path, model, rows))
  assert [r["step"] for r in records(tmp_path / "run")] == list(range(1, 41))
