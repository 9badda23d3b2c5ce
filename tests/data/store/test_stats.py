"""The stats adds up, says when it does not, and survives JSON."""

import json

import pytest

from sft_jax.data.store.stats import DatasetStats, EpochStats, SourceStats


def _stats():
  stats = DatasetStats()
  entry = stats.source("rows.jsonl")
  entry.rows_in, entry.rows_trained, entry.rows_text = 12, 3, 1
  entry.rows_held_out = 2
  entry.examples, entry.tokens_prompt, entry.tokens_trained = 4, 1200, 300
  entry.roles = {"user": (1190, 0), "answer": (310, 300)}
  entry.lengths = {"shortest": 9, "median": 300, "95 %": 410, "longest": 420}
  for i in range(7):
    entry.drop("empty answer", f"rows.jsonl:{i}")
  entry.drop_turns("over long", 2, "rows.jsonl:9")
  entry.note("split history", "rows.jsonl:9")
  stats.epoch = EpochStats(
    packs=2,
    slots=2000,
    tokens_prompt=1200,
    tokens_trained=300,
    tokens_padding=500,
  )
  return stats


def test_sums():
  stats = _stats()
  stats.check()
  assert stats.dropped("empty answer") == 7
  assert stats.epoch.fill == 0.75
  assert stats.total("tokens_trained") == 300


@pytest.mark.parametrize("field", ["rows_in", "rows_trained", "rows_held_out"])
def test_a_lost_row_is_noticed(field):
  stats = _stats()
  entry = stats.source("rows.jsonl")
  setattr(entry, field, getattr(entry, field) + 1)
  with pytest.raises(ValueError, match=r"rows\.jsonl: rows"):
    stats.check()


def test_a_lost_token_is_noticed():
  stats = _stats()
  stats.epoch.tokens_padding -= 1
  with pytest.raises(ValueError, match=r"epoch: slots: got 1999 .*2000"):
    stats.check()


@pytest.mark.parametrize(
  ("answer", "what"), [((309, 300), "tokens"), ((310, 299), "trained tokens")]
)
def test_a_part_that_is_lost_is_noticed(answer, what):
  stats = _stats()
  stats.source("rows.jsonl").roles["answer"] = answer
  with pytest.raises(ValueError, match=f"jsonl: {what} by role"):
    stats.check()


def test_accounts_of_chunks_are_added():
  first, second = SourceStats(), SourceStats()
  for i in range(4):
    first.drop("empty answer", f"rows.jsonl:{i}")
    second.drop("empty answer", f"rows.jsonl:{4 + i}")
  second.note("cut answer", "rows.jsonl:9")
  second.drop_turns("over long", 3, "rows.jsonl:9")
  first.rows_in, second.rows_in = 5, 6
  first.add(second)
  assert first.rows_in == 11
  assert first.dropped == {"empty answer": 8}
  assert first.places["empty answer"] == [f"rows.jsonl:{i}" for i in range(5)]
  assert first.notes == {"cut answer": 1}
  assert first.dropped_turns == {"over long": 3}


def test_json_round_trip():
  stats = _stats()
  assert (
    DatasetStats.from_json(json.loads(json.dumps(stats.to_json()))) == stats
  )
  stats.epoch = None
  assert DatasetStats.from_json(stats.to_json()) == stats


def test_table_names_what_was_dropped_and_where():
  assert _stats().lines() == [
    "source      rows  trained  held out  dropped  prompt tok  trained tok  "
    "of tokens  of trained",
    "rows.jsonl    12        3         2        7       1,200          300  "
    "   100.0%      100.0%",
    "rows.jsonl: 1 rows are raw text",
    "rows.jsonl: 1 rows: split history: rows.jsonl:9",
    "rows.jsonl: 7 rows dropped, empty answer: rows.jsonl:0, rows.jsonl:1, "
    "rows.jsonl:2, rows.jsonl:3, rows.jsonl:4, ...",
    "rows.jsonl: 2 turns dropped, over long: rows.jsonl:9",
    "one epoch: 2 packs of 1,000 slots, 75.00% full: 1,200 prompt + "
    "300 trained + 500 padding",
  ]


def test_details():
  assert _stats().details() == [
    "rows.jsonl: tokens of an example: shortest 9, median 300, 95 % 410, "
    "longest 420",
    "rows.jsonl: tokens by role: user 1,190, answer 310 (300 trained)",
  ]


def test_a_source_is_called_by_its_file_where_no_other_is():
  stats = DatasetStats()
  named = {
    "data/a.jsonl": "a.jsonl",
    "data/b.jsonl": "data/b.jsonl",
    "more/b.jsonl": "more/b.jsonl",
    "data/*.jsonl": "data/*.jsonl",
    "org/name": "org/name",
  }
  for name in named:
    stats.source(name)
  rows = stats.lines()[1:]
  assert [row.split()[0] for row in rows] == list(named.values())
  # Of nothing at all, every share is none.
  assert rows[0].split()[-2:] == ["0.0%", "0.0%"]


def test_shares_of_sources_that_are_seen_once():
  stats = DatasetStats()
  for name, prompt, trained in (("a", 10, 30), ("b", 50, 10)):
    entry = stats.source(name)
    entry.tokens_prompt, entry.tokens_trained = prompt, trained
  shares = [line.split()[-2:] for line in stats.lines()[1:]]
  assert shares == [["40.0%", "75.0%"], ["60.0%", "25.0%"]]
