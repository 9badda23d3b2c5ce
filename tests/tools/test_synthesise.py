"""The tool with a real teacher, tuned to know some of the answers."""

import json

import pytest

import sft_jax
import tiny
from sft_jax.commands import synthesize
from sft_jax.data.formats import formats
from sft_jax.data.readers import files

ITEMS = [
  {
    "group": "known" if i < 8 else "asked elsewhere",
    "messages": [{"role": "user", "content": row["instruction"]}],
    "checks": [{"check": "exact", "text": row["output"]}],
  }
  for i, row in enumerate(tiny.ROWS[:10])
]


def call(monkeypatch, *arguments):
  monkeypatch.setattr("sys.argv", ["synthesise.py", *map(str, arguments)])
  synthesize.main()


@pytest.mark.slow
def test_a_tuned_teacher_writes_rows_that_pass(tmp_path, monkeypatch, capsys):
  model = tiny.model_folder(tmp_path / "model")
  config = tiny.config(
    tmp_path, model, tiny.rows_file(tmp_path / "train.jsonl"),
    steps=150, optim__learning_rate=3e-3, checkpoint__every=0,
  )  # fmt: skip
  teacher = sft_jax.train(config).workdir / "export"
  prompts = tiny.rows_file(tmp_path / "prompts.jsonl", ITEMS)
  against = tiny.rows_file(tmp_path / "eval.jsonl", ITEMS[8:])
  out = tmp_path / "made.jsonl"
  arguments = [
    f"--teacher={teacher}", f"--prompts={prompts}", f"--against={against}",
    f"--out={out}", "--samples=6", "--temperature=0.8", "--seed=3",
    "--max_new_tokens=12", "--keep=all",
  ]  # fmt: skip
  call(monkeypatch, *arguments)
  made = [row for _, row in files.read_rows(out)]
  told = json.loads((tmp_path / "made.jsonl.ledger.json").read_text())
  assert told["asked elsewhere"]["overlapping"] == 2
  assert told["asked elsewhere"]["attempts"] == 0
  assert told["known"]["attempts"] == 48
  assert told["known"]["solved"] >= 6
  wanted = {one["instruction"]: one["output"] for one in tiny.ROWS[:8]}
  for row in made:
    turns = formats.to_conversation(row).messages
    assert turns[-1].content == wanted[turns[0].content]
    assert row["synthetic"]["teacher"] == str(teacher)
  assert "rows in" in capsys.readouterr().out
  before = out.read_bytes()
  call(monkeypatch, *arguments)
  assert out.read_bytes() == before
  # The base knows nothing, and nothing is what it is let write.
  arguments[0] = f"--teacher={model}"
  call(monkeypatch, *arguments)
  assert out.read_bytes() == b""
