"""Whole runs on a tiny model: they learn, resume, refuse and export."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import sft_jax
import tiny
from sft_jax.checkpointing import digests
from sft_jax.common import trees
from sft_jax.models.hf import load_save
from sft_jax.models.lora import lora
from sft_jax.reporting import terminal
from sft_jax.reporting.metrics import read_jsonl
from sft_jax.training.build import data
from sft_jax.training.build.outputs import save_adapters

# What may differ between two runs of the same steps.
CLOCK = ("time/", "speed/", "memory/")


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
  # In NumPy: JAX compiles a program per shape.
  return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


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
    export_check=True,
  )
  result = sft_jax.train(config)
  served = {(v["tool"], v["state"]) for v in result.metrics["served"]}
  assert ("sft_jax", "same") in served
  assert {state for _, state in served} <= {"same", "skipped"}
  page = (tmp_path / "run" / "report.html").read_text()
  assert "Served as trained" in page
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
  config = tiny.config(
    *(tmp_path, model, rows),
    data__holdout=0.2,
    eval__every=2,
    eval__samples=3,
    checkpoint__keep=1,
    checkpoint__keep_best="held_out/nats_per_token",
    # Of a model that learns, the highest loss is the first: it is kept.
    checkpoint__best_is="highest",
  )
  result = sft_jax.train(config, command="what was typed")
  workdir = tmp_path / "run"
  assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"2", "6"}
  assert {p.name for p in workdir.iterdir()} >= {
    "checkpoints",
    "config.json",
    "evals",
    "export",
    "ledger.json",
    "metrics.jsonl",
    "report.html",
    "result.json",
    "samples.json",
    "start.json",
  }
  ledger = json.loads((workdir / "ledger.json").read_text())
  (source,) = ledger["sources"].values()
  assert source["rows_in"] == 16
  assert source["rows_in"] == (
    source["rows_trained"]
    + source["rows_held_out"]
    + sum(source["dropped"].values())
  )
  of_steps = [r for r in records(workdir) if "loss/nats_per_token" in r]
  assert len(of_steps) > 1
  for record in of_steps:
    parts = [name for name in record if name.startswith("loss/role/")]
    assert parts == ["loss/role/answer"]
    assert record["loss/source/rows.jsonl"] == record["loss/nats_per_token"]
    assert record["loss/first_token"] > 0
    assert 0 <= record["acc/stop_token"] <= 1
    assert 0 < record["entropy/nats"] < 6  # The log of 400.
  loss = result.metrics["losses"][0]
  assert loss["name"] == "held_out/nats_per_token"
  page = (workdir / "report.html").read_text()
  for said in ("what was typed", "Reading ", "orbax-checkpoint", "(cosine)"):
    assert said in page
  # Each held-out row by its loss; together they are the measured loss.
  held_out = read_jsonl(workdir / "evals" / "held_out_rows.jsonl")
  assert len(held_out) == 3
  nats, tokens = (
    sum(row[name] for row in held_out) for name in ("nats", "trained_tokens")
  )
  assert nats / tokens == pytest.approx(loss["after"], rel=1e-5)
  assert held_out[0]["place"] in page
  shown = capsys.readouterr().out
  for word in ("parameters", "held out", "expected time", "devices", "fill"):
    assert word in shown
  for word in ("learning rate", "Memory per device", "Sharding", "of peak"):
    assert word in shown
  account = result.metrics["time"]
  run = account.pop("run_s")
  assert sum(account.values()) == pytest.approx(run)
  assert min(account["compute_s"], account["save_s"]) > 0
  assert f"Took {terminal.duration(run)}: " in shown
  assert "Best checkpoint: step 2" in shown
  # The record names the rows that the stream of this config gives.
  tokenizer = sft_jax.load_tokenizer(model)
  stores = data.load_stores(config, tokenizer, print)
  stream = data.make_train_stream(config, stores.train)
  batches = itertools.islice(stream.batches(), 6)
  chain = digests.extend_chain("", map(digests.digest_rows, batches))
  assert of_steps[-1]["data/chain"] == chain
  capsys.readouterr()
  again = sft_jax.train(config)
  assert "is finished" in capsys.readouterr().out
  assert same(again.params, result.params)


def test_the_gap_is_measured_after_each_epoch(tmp_path, model, rows):
  """Of rows as long as their slots, in two passes over 12 of 16 rows."""
  config = tiny.config(
    *(tmp_path, model, rows),
    steps=0,
    epochs=2,
    batch_size=8,
    data__holdout=0.25,
    data__packing=False,
    export=False,
    optim__warmup_steps=0,
    log__every=100,
  )
  result = sft_jax.train(config)
  found = [
    row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")
    if "held_out/gap" in row
  ]  # fmt: skip
  assert [row["step"] for row in found] == [2, 3]
  for row in found:
    gap = row["held_out/nats_per_token"] - row["train_rows/nats_per_token"]
    assert row["held_out/gap"] == pytest.approx(gap)
  # What is shown after training is of the same parameters as the last.
  gap = result.metrics["gap"]
  assert gap["gap"] == pytest.approx(found[-1]["held_out/gap"], abs=1e-5)
  # Before training held-out rows are as new as the others.
  assert abs(gap["before"]) < 0.2
  left = {one["name"]: one for one in result.metrics["forgetting"]}
  assert left["held_out/kl"]["before"] == 0
  assert left["held_out/kl"]["after"] > 1e-3
  assert left["held_out/top1_agreement"]["before"] == 1
  # The base is read again, and is the folder's.
  assert not (tmp_path / "run" / "export").exists()
  assert set(result.params) == {"embed", "layers", "final_norm"}


def test_kl_to_the_base_in_a_run(tmp_path, model, rows, capsys):
  """Held near the base by a copy, which neither export nor checkpoint hold."""
  lost = {}
  for kl in (0.0, 10.0):
    config = tiny.config(
      *(tmp_path, model, rows),
      workdir=str(tmp_path / f"run_{kl}"),
      steps=24,
      checkpoint__every=22,
      data__holdout=0.25,
      loss__kl=kl,
    )
    result = sft_jax.train(config)
    left = {one["name"]: one["after"] for one in result.metrics["forgetting"]}
    lost[kl] = left["held_out/kl"]
    rows_ = records(tmp_path / f"run_{kl}")
    assert ("loss/kl" in rows_[0]) == bool(kl)
  assert lost[10.0] < 0.5 * lost[0.0]
  shown = " ".join(capsys.readouterr().out.split())
  assert "parameters are held twice" in shown
  workdir = tmp_path / "run_10.0"
  _, exported = sft_jax.load_pretrained(workdir / "export")
  assert same(exported, result.params)
  # Taken up from a checkpoint: the copy is the folder's, not the trained one.
  before = records(workdir)
  shutil.rmtree(workdir / "checkpoints" / "24")
  (workdir / "result.json").unlink()
  again = sft_jax.train(config)
  assert records(workdir) == before
  assert same(again.params, result.params)


def test_a_changed_config_is_refused(tmp_path, model, rows):
  sft_jax.train(tiny.config(tmp_path, model, rows, steps=3))
  changed = tiny.config(
    tmp_path, model, rows, steps=3, optim__learning_rate=1e-5
  )
  with pytest.raises(ValueError, match=r"optim\.learning_rate: .* -> 1e-05"):
    sft_jax.train(changed)
  with changed.unlocked():
    changed.data.train = str(
      tiny.rows_file(tmp_path / "rows.jsonl", tiny.ROWS[1:])
    )
    changed.steps = 5
  result = sft_jax.train(changed, force=True)
  assert [row["step"] for row in records(result.workdir)] == [1, 2, 3, 4, 5]
  forced = [
    line["message"]
    for line in read_jsonl(result.workdir / "incidents.jsonl")
    if line["kind"] == "forced"
  ]
  assert "steps: 3 -> 5" in forced
  assert any("optim.learning_rate" in line for line in forced)
  assert any("file 1 (rows.jsonl): changed" in line for line in forced)
  page = (result.workdir / "report.html").read_text()
  assert "steps: 3 -&gt; 5" in page


def test_a_resumed_run_is_the_run(tmp_path, model, rows):
  """Its last checkpoint taken away: the same steps again, to the bit."""
  config = tiny.config(tmp_path, model, rows, export=False)
  whole, workdir = sft_jax.train(config), tmp_path / "run"
  before = records(workdir)
  lived = read_jsonl(workdir / "metrics.jsonl")[-1]["time/run_s"]
  shutil.rmtree(workdir / "checkpoints" / "6")
  (workdir / "result.json").unlink()
  again = sft_jax.train(config)
  assert [row["step"] for row in before] == [1, 2, 3, 4, 5, 6]
  assert records(workdir) == before
  assert same(again.params, whole.params)
  # Both lives count, and the steps that were taken twice are no good.
  last = read_jsonl(workdir / "metrics.jsonl")[-1]
  assert last["time/run_s"] > lived
  (note,) = read_jsonl(workdir / "incidents.jsonl")
  lost = json.loads((workdir / "result.json").read_text())["interruptions"]
  assert lost == {name: note[name] for name in lost}
  assert (lost["times"], lost["steps"]) == (1, 2)
  assert lost["again_s"] > 0
  assert lost["start_s"] > 0
  assert "2 steps taken again" in (workdir / "report.html").read_text()
  assert 0 < last["speed/goodput"] < 1


def test_who_looks_on_may_change_when_a_run_is_resumed(tmp_path, model, rows):
  """The new writer is given everything, also what was before it came."""
  choices = {"export": False, "log__writers": ()}
  sft_jax.train(tiny.config(tmp_path, model, rows, **choices))
  workdir = tmp_path / "run"
  assert not (workdir / "tensorboard").exists()
  shutil.rmtree(workdir / "checkpoints" / "6")
  (workdir / "result.json").unlink()
  choices |= {"log__writers": ("tensorboard",), "profile__start": 99}
  sft_jax.train(tiny.config(tmp_path, model, rows, **choices))
  (path,) = (workdir / "tensorboard").iterdir()
  assert path.read_bytes().count(b"loss/nats_per_token") == 6


def test_changed_data_is_refused_by_name(tmp_path, model):
  path = tiny.rows_file(tmp_path / "rows.jsonl")
  folder = Path(shutil.copytree(model, tmp_path / "model"))
  config = tiny.config(tmp_path, folder, path, steps=3)
  sft_jax.train(config)
  tiny.rows_file(path, tiny.ROWS[:-1])
  with pytest.raises(ValueError, match=r"file 1 \(rows\.jsonl\): changed"):
    sft_jax.train(config)
  tiny.rows_file(path)
  template = folder / "chat_template.jinja"
  template.write_text(template.read_text() + "{# A comment. #}")
  with pytest.raises(ValueError, match=r"tokenizer, chat template: changed"):
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
  again = sft_jax.train(config)  # From the checkpoint and the model's folder.
  assert same(again.params, result.params)


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
  with pytest.raises(FloatingPointError, match=r"step \d+: the loss") as caught:
    sft_jax.train(config)
  step = int(str(caught.value).split(":")[0].removeprefix("step "))
  workdir = tmp_path / "run"
  bad = read_jsonl(workdir / "bad_batch.jsonl")
  assert {row["step"] for row in bad} == {step}
  assert all(row["place"].startswith("rows.jsonl:") for row in bad)
  assert [i["kind"] for i in read_jsonl(workdir / "incidents.jsonl")] == [
    "halted"
  ]
  page = (workdir / "report.html").read_text()
  assert "Incidents: 1 halted." in page
  # What was reached is saved, and recorded up to there.
  assert records(workdir)[-1]["step"] == step - 1
  assert str(step - 1) in {p.name for p in (workdir / "checkpoints").iterdir()}


def test_what_peft_has_no_form_for_does_not_end_the_run(tmp_path):
  golden = Path(__file__).parents[1] / "models" / "goldens" / "qwen3_moe"
  adapters = lora.LoraConfig(
    rank=2, alpha=4, targets="attention", also_train=("moe/",)
  )
  model, params = load_save.load_pretrained(golden, lora=adapters)
  config = SimpleNamespace(
    export_dtype="",
    model=SimpleNamespace(path=str(golden), param_dtype="float32"),
  )
  said = save_adapters(
    config,
    SimpleNamespace(model=model),  # pyright: ignore[reportArgumentType]
    params,
    tmp_path / "adapter",
  )
  assert "not written (save_adapter: " in said
  assert "experts" in said
  assert not (tmp_path / "adapter").exists()
