"""The ledger adds up, says when it does not, and survives JSON."""

import json

import pytest

from sft_jax.data.ledger import EpochLedger, Ledger


def _ledger():
  ledger = Ledger()
  entry = ledger.source("rows.jsonl")
  entry.rows_in, entry.rows_trained, entry.rows_text = 10, 3, 1
  entry.examples, entry.tokens_prompt, entry.tokens_trained = 4, 1200, 300
  for i in range(7):
    entry.drop("empty answer", f"rows.jsonl:{i}")
  entry.drop_turns("over long", 2, "rows.jsonl:9")
  ledger.epoch = EpochLedger(
    packs=2,
    slots=2000,
    tokens_prompt=1200,
    tokens_trained=300,
    tokens_padding=500,
  )
  return ledger


def test_sums():
  ledger = _ledger()
  ledger.check()
  assert ledger.dropped("empty answer") == 7
  assert ledger.epoch.fill == 0.75
  assert ledger.total("tokens_trained") == 300


@pytest.mark.parametrize("field", ["rows_in", "rows_trained"])
def test_a_lost_row_is_noticed(field):
  ledger = _ledger()
  entry = ledger.source("rows.jsonl")
  setattr(entry, field, getattr(entry, field) + 1)
  with pytest.raises(ValueError, match=r"rows\.jsonl: rows"):
    ledger.check()


def test_a_lost_token_is_noticed():
  ledger = _ledger()
  ledger.epoch.tokens_padding -= 1
  with pytest.raises(ValueError, match=r"epoch: slots: got 1999 .*2000"):
    ledger.check()


def test_json_round_trip():
  ledger = _ledger()
  assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger
  ledger.epoch = None
  assert Ledger.from_json(ledger.to_json()) == ledger


def test_table_names_what_was_dropped_and_where():
  assert _ledger().lines() == [
    "source      rows  trained  dropped     prompt  trained",
    "rows.jsonl    10        3        7  1,200 tok  300 tok",
    "rows.jsonl: 1 rows are raw text",
    "rows.jsonl: 7 rows dropped, empty answer: rows.jsonl:0, rows.jsonl:1, "
    "rows.jsonl:2, rows.jsonl:3, rows.jsonl:4, ...",
    "rows.jsonl: 2 turns dropped, over long: rows.jsonl:9",
    "one epoch: 2 packs of 1,000 slots, 75.00% full: 1,200 prompt + "
    "300 trained + 500 padding",
  ]
