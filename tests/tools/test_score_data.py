"""The tool writes scores that training reads, and shows rows without harm."""

import json
from pathlib import Path

import pytest

import tiny
from sft_jax.commands import score
from sft_jax.data import selection
from sft_jax.data.tokenizers import tokenizer as tokenizers
from sft_jax.reporting import terminal
from sft_jax.training.build import data

HOSTILE = "\x1b[31m [bold]x[/bold] \u202e"


def quiet(line):
  del line


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
  return tiny.model_folder(tmp_path_factory.mktemp("model") / "tiny")


def test_scores_of_a_glob_are_read_by_a_run(tmp_path, model, capsys):
  rows = [
    *tiny.ROWS,
    {"instruction": HOSTILE, "output": HOSTILE},
    {"instruction": "Unanswered?", "output": ""},
  ]
  tiny.rows_file(tmp_path / "a.jsonl", rows)
  tiny.rows_file(tmp_path / "b.jsonl", tiny.ROWS[:4])
  glob = str(tmp_path / "?.jsonl")
  config = tiny.config(
    tmp_path, model, glob, data__workers=1, data__seq_len=128
  )
  found = score.score(config, quiet)
  path = tmp_path / "a.jsonl.scores.jsonl"
  lines = path.read_text().splitlines()
  assert json.loads(lines[0])["model"] == str(model)
  assert len(lines) == 1 + 17  # A head; of the unanswered row nothing.
  before = path.read_bytes()
  assert score.score(config, quiet) == found
  assert path.read_bytes() == before

  cut = sorted(row.values[0] for row in found[str(tmp_path / "a.jsonl")])[8]
  config.data.filter = (("nats", "<=", cut),)
  # A wider glob finds the same rows: scores are none.
  config.data.train = str(tmp_path / "*.jsonl")
  tokenizer = tokenizers.load_tokenizer(model)
  train = data.load_stores(config, tokenizer, quiet).train
  entry = train.stats.sources[str(tmp_path / "a.jsonl")]
  assert (entry.rows_in, entry.rows_trained) == (18, 9)
  assert entry.dropped == {
    "empty answer": 1, f"fails nats <= {cut}": 8
  }  # fmt: skip

  score.show(terminal.console(), config, found, shown=30)
  out = capsys.readouterr().out
  assert "\x1b[31m" not in out
  assert "\u202e" not in out
  assert "[bold]x[/bold]" in out
  assert out.count("a.jsonl:17") >= 2


def test_one_file_in_two_ways_or_two_of_one_name(tmp_path, model):
  one = tiny.rows_file(tmp_path / "a.jsonl")
  (tmp_path / "other").mkdir()
  two = tiny.rows_file(tmp_path / "other" / "a.jsonl")
  config = tiny.config(tmp_path, model, one)
  config.data.train = (str(one), {"path": str(one), "name": "again"})
  assert len(score.files_of(config)) == 1
  way = {"path": str(one), "name": "again", "format": "alpaca"}
  config.data.train = (str(one), way)
  with pytest.raises(ValueError, match="two sources that read it in two ways"):
    score.files_of(config)
  config.data.train = (str(one), str(two))
  assert len(score.files_of(config)) == 2
  config.data.scores = str(tmp_path / "scores")
  with pytest.raises(ValueError, match="expected one file each"):
    score.files_of(config)


def test_scores_may_lie_elsewhere(tmp_path, model):
  file = tiny.rows_file(tmp_path / "a.jsonl", tiny.ROWS[:4])
  folder = tmp_path / "scores"
  config = tiny.config(
    tmp_path, model, file, data__workers=1, data__scores=str(folder)
  )
  score.score(config, quiet)
  assert selection.scores_path(file, folder).is_file()
  assert not selection.scores_path(file).exists()
  config.data.filter = ("nats", "<", 100.0)
  tokenizer = tokenizers.load_tokenizer(model)
  train = data.load_stores(config, tokenizer, quiet).train
  assert len(train.index) == 4
