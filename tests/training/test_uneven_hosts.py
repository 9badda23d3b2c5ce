"""Rows that two processes cannot share evenly, or do not share at all."""

import json

import numpy as np
import pytest

import sft_jax
import tiny
from host_runs import finish, records, start
from sft_jax.common import distributed
from sft_jax.training.build import host_consistency

# Rows of other lengths, some of which share a pack: of 64 slots.
LONG = [
  {"instruction": f"Say {word} {n} times.", "output": " ".join([word] * n)}
  for word, n in zip(tiny.WORDS, (1, 14, 2, 11, 1, 9, 13, 12, 3), strict=False)
]
MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}


def item(word: str) -> dict:
  prompt = {"role": "user", "content": f"What goes with {word}?"}
  check = {"check": "contains", "text": "The"}
  return {"messages": [prompt], "checks": [check], "group": "pairs"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
  folder = tmp_path_factory.mktemp("uneven") / "model"
  return str(tiny.model_folder(folder))


@pytest.mark.slow
def test_uneven_rows_end_as_in_one_process(tmp_path, model):
  """Of batches, sets and prompts one process has less, and nothing at last."""
  choices = {
    "model__path": model,
    "data__train": str(tiny.rows_file(tmp_path / "rows.jsonl", LONG)),
    "data__eval": str(tiny.rows_file(tmp_path / "one.jsonl", tiny.ROWS[:1])),
    "eval__behaviors": str(
      tiny.rows_file(tmp_path / "behaviors.jsonl", [item("cat")])
    ),
    "eval__every": 1,
    "eval__max_new_tokens": 4,
    "eval__gap": True,
    "steps": 0,
    "epochs": 2,
    "optim__warmup_steps": 1,
    "batch_size": 8,
    "export": False,
    **MESH,
  }
  config = tiny.config(tmp_path, "", "", **choices)
  config.workdir = str(tmp_path / "alone")
  alone = sft_jax.train(config)
  workdir = tmp_path / "two"
  for code, said in finish(start(workdir, choices), workdir, 300):
    assert code == 0, said
  ours, theirs = records(alone.workdir), records(workdir)
  assert [r["step"] for r in ours] == [r["step"] for r in theirs]
  for one, other in zip(ours, theirs, strict=True):
    assert one.keys() == other.keys()
    assert one.get("data/chain") == other.get("data/chain")
    for name, value in one.items():
      if name.split("/")[0] in ("loss", "acc", "optim", "held_out"):
        np.testing.assert_allclose(other[name], value, rtol=2e-4, err_msg=name)
  # Of the last batch's rows all that hold something are the first process's.
  ledger = json.loads((workdir / "ledger.json").read_text())
  assert 0 < choices["epochs"] * ledger["epoch"]["packs"] % 8 <= 4


@pytest.mark.slow
def test_hosts_with_other_rows_end_before_the_first_step(tmp_path, model):
  """Each reads the file of that name which it finds where it runs."""
  folders = [tmp_path / name for name in ("a", "b")]
  for folder, rows in zip(folders, (LONG, LONG[1:]), strict=True):
    folder.mkdir()
    tiny.rows_file(folder / "rows.jsonl", rows)
  choices = {"model__path": model, "data__train": "rows.jsonl", **MESH}
  workdir = tmp_path / "two"
  first, second = finish(start(workdir, choices, folders=folders), workdir, 120)
  assert first[0] not in (0, 75), first[1]
  code, said = second
  assert code == 2, said
  assert "process 1 of 2: what it has read is not that of the first" in said
  assert "train, source 1, file 1 (rows.jsonl): changed" in said
  assert not (workdir / "metrics.jsonl").exists()


def test_alone_nothing_is_compared(tmp_path, model):
  assert distributed.first_says({"a": (1, 2)}) == {"a": [1, 2]}
  host_consistency.check_config(tiny.config(tmp_path, model, "rows.jsonl"))


def test_another_config_is_refused_by_its_keys(tmp_path, monkeypatch):
  def config(**changes):
    auto = {"eval__general_text": "auto"}
    return tiny.config(tmp_path, "", tmp_path / "rows.jsonl", **auto | changes)

  heard = []

  def first_says(mine):
    """What was said first, whoever asks."""
    heard.append(json.loads(json.dumps(mine)))
    return heard[0]

  monkeypatch.setattr(distributed, "first_says", first_says)
  host_consistency.check_config(config())
  # A host may keep its caches where it likes.
  host_consistency.check_config(config(data__cache_dir="/local"))
  (tmp_path / "general_text.jsonl").write_text("")
  with pytest.raises(ValueError, match="the config is not that") as refusal:
    host_consistency.check_config(config(steps=7))
  assert "  eval.general_text: new\n  steps: 6 -> 7\n" in str(refusal.value)
