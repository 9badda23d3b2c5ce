"""What a config says of data reaches it, and faults of it stop the run."""

import pytest

import tiny
import tiny_tokenizers
from sft_jax.data.tokenizers import tokenizer as tokenizers
from sft_jax.training.build import data


def test_overlap_refuses_the_run_and_names_the_switch(tmp_path):
  folder = tiny_tokenizers.byte_level(tmp_path / "tokens")
  tokenizer = tokenizers.load_tokenizer(folder)
  train = tiny.rows_file(tmp_path / "train.jsonl")
  held = tiny.rows_file(tmp_path / "held.jsonl", tiny.ROWS[:3])
  config = tiny.config(
    tmp_path, folder, train, data__eval=str(held), data__workers=1
  )
  told = []
  with pytest.raises(ValueError, match="gives away 3 of 3 held-out") as error:
    data.load_data(config, tokenizer, told.append)
  assert "data.allow=('overlap',)" in str(error.value)
  config.data.allow = ("overlap",)
  assert data.load_data(config, tokenizer, told.append).held_out
  assert any("data.allow lets pass: held.jsonl:1" in line for line in told)


def test_columns_of_the_config_are_those_of_sources_without_any(tmp_path):
  folder = tiny_tokenizers.byte_level(tmp_path / "tokens")
  tokenizer = tokenizers.load_tokenizer(folder)
  plain, theirs, odd = (
    tiny.rows_file(
      tmp_path / name,
      [{q: row["instruction"], a: row["output"]} for row in tiny.ROWS],
    )
    for name, q, a in (
      ("plain.jsonl", "prompt", "completion"),
      ("theirs.jsonl", "asked", "told"),
      ("odd.jsonl", "in", "out"),
    )
  )
  config = tiny.config(tmp_path, folder, plain, data__workers=1)
  expected = data.load_stores(config, tokenizer, print).train
  config.data.columns = {"asked": "prompt", "told": "completion"}
  own = {"path": str(odd), "columns": {"in": "prompt", "out": "completion"}}
  config.data.train = (str(theirs), own)
  config.data.eval = str(theirs)
  found = data.load_stores(config, tokenizer, print)
  assert found.train.tokens.tolist() == expected.tokens.tolist() * 2
  assert len(found.held_out.index) == len(tiny.ROWS)
  # It is in the key: the same files under other names are not the same rows.
  config.data.train = str(theirs)
  config.data.columns = {"asked": "completion", "told": "prompt"}
  other = data.load_stores(config, tokenizer, print).train
  assert other.fingerprint_inputs["source 1"]["columns"] == {
    "asked": "completion",
    "told": "prompt",
  }
  assert other.fingerprint != found.held_out.fingerprint


@pytest.mark.parametrize("own_file", [False, True])
def test_held_out_rows_are_measured_and_no_other_trained(tmp_path, own_file):
  folder = tiny_tokenizers.byte_level(tmp_path / "tokens")
  tokenizer = tokenizers.load_tokenizer(folder)
  split = 12 if own_file else len(tiny.ROWS)
  train = tiny.rows_file(tmp_path / "train.jsonl", tiny.ROWS[:split])
  config = tiny.config(tmp_path, folder, train, data__workers=1)
  if own_file:
    held = tiny.rows_file(tmp_path / "held.jsonl", tiny.ROWS[split:])
    config.data.eval = str(held)
  else:
    config.data.holdout = 0.25

  def texts(stream):
    store = stream.store
    made = (store.example(i).tokens for i in range(len(store.index)))
    return {tokenizer.decode(tokens.tolist()) for tokens in made}

  found = data.load_data(config, tokenizer, lambda line: None)
  trained, held_out = texts(found.stream), texts(found.held_out)
  assert (len(trained), len(held_out)) == (12, 4)
  assert not trained & held_out
  # Every one of them once, and in order that ends.
  assert found.held_out.num_steps is not None
  assert found.held_out.stats.epoch.tokens_trained > 0


def test_the_date_of_a_template_is_that_of_the_first_start(tmp_path):
  dated = "{{ strftime_now('%d %b %Y') }}" + tiny_tokenizers.CHATML
  folder = tiny_tokenizers.byte_level(tmp_path / "tokens", dated)
  train = tiny.rows_file(tmp_path / "train.jsonl")
  config = tiny.config(tmp_path, folder, train, data__workers=1)
  lines = []
  tokenizer = data.load_tokenizer(config, folder, lines.append)
  today = config.data.template_kwargs.date
  assert len(today) == len("2026-01-31")
  assert f"pinned as {today}" in lines[0]
  assert len(data.load_stores(config, tokenizer, print).train.index)
  # A later start of the same run takes the date that its record holds.
  written = config.to_dict()
  written["data"]["template_kwargs"]["date"] = "2025-02-03"
  config = tiny.config(tmp_path, folder, train, data__workers=1)
  data.pin(config, written)
  data.load_tokenizer(config, folder, lines.append)
  assert config.data.template_kwargs.date == "2025-02-03"
  assert len(lines) == 1
  # A template without a date pins none: rows stay the same by the day.
  folder = tiny_tokenizers.byte_level(tmp_path / "plain")
  config = tiny.config(tmp_path, folder, train, data__workers=1)
  data.load_tokenizer(config, folder, lines.append)
  assert not config.data.template_kwargs.to_dict()
