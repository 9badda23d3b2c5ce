"""Behaviour scores: counts conserved, intervals and tests against tables."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_jax.data.conversation import Message, RowError
from sft_jax.evals import behaviours
from sft_jax.evals.replies import Reply

ROW = {
  "group": "facts",
  "messages": [{"role": "user", "content": "Where?"}],
  "checks": [{"check": "contains", "text": "here"}],
}


def _write(path, rows: list[Any]):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def _say(text: str, *, stopped: bool = True) -> Reply:
  return Reply(text, [1], stopped, Message("assistant", text))


def test_scores_count_every_item_once(tmp_path):
  rows = [
    ROW,
    {**ROW, "group": "style"},
    ROW,
    ROW,
    {**ROW, "checks": [*ROW["checks"], {"check": "max_words", "count": 1}]},
  ]
  items = behaviours.load(_write(tmp_path / "b.jsonl", rows))
  said = [
    _say("here"),
    _say("it is here"),
    _say("there"),
    _say("here", stopped=False),
    _say("it is here"),
  ]
  asked = []

  def generate(prompts):
    asked.extend(prompts)
    return said

  scores = behaviours.run(items, generate)
  assert [p.messages[0].content for p in asked] == ["Where?"] * 5
  assert scores.groups == {
    "facts": behaviours.Score(n=4, passed=1, stopped=3),
    "style": behaviours.Score(n=1, passed=1, stopped=1),
  }
  assert [r["failed"] for r in scores.replies] == [
    [],
    [],
    ["contains"],
    [],
    ["max_words"],
  ]
  assert [r["reply"] for r in scores.replies] == [r.text for r in said]
  assert sum(s.n for s in scores.groups.values()) == len(items)


def test_a_tool_turn_may_come_last(tmp_path):
  call = {"function": {"name": "tide", "arguments": {"town": "X"}}}
  messages = [
    *ROW["messages"],
    {"role": "assistant", "content": "", "tool_calls": [call]},
    {"role": "tool", "content": "low"},
  ]
  path = _write(tmp_path / "b.jsonl", [{**ROW, "messages": messages}])
  (item,) = behaviours.load(path)
  assert item.where.endswith("b.jsonl:1")
  assert [m.role for m in item.prompt.messages] == ["user", "assistant", "tool"]


@pytest.mark.parametrize(
  "row",
  [
    {},
    {**ROW, "check": []},
    {**ROW, "checks": []},
    {**ROW, "checks": [{"check": "nonesuch"}]},
    {**ROW, "group": ""},
    {**ROW, "messages": [{"role": "wizard", "content": "x"}]},
    {**ROW, "messages": []},
    {
      **ROW,
      "messages": [*ROW["messages"], {"role": "assistant", "content": "x"}],
    },
  ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path, row):
  path = _write(tmp_path / "b.jsonl", [ROW, row])
  with pytest.raises((ValueError, RowError), match=r"b\.jsonl:2.*expected"):
    behaviours.load(path)


def test_an_empty_file_is_refused(tmp_path):
  with pytest.raises(ValueError, match="expected at least one prompt"):
    behaviours.load(_write(tmp_path / "b.jsonl", []))


def _scores(passed: list[bool], group: str = "facts") -> behaviours.Scores:
  return behaviours.Scores(
    [
      {"where": f"b:{i}", "group": group, "passed": p, "stopped": p}
      for i, p in enumerate(passed)
    ]
  )


def test_comparison_is_paired_by_item():
  before = _scores([True, False, False, False, True])
  after = _scores([False, True, True, True, True])
  (found,) = behaviours.compare(before, after)
  assert (found.gained, found.lost) == (3, 1)
  assert found.p == 2 * (1 + 4) / 2**4
  assert (found.before.passed, found.after.passed) == (2, 4)
  header, row = behaviours.table([found])
  assert len(header) == len(row)
  assert row[:2] == ("facts", "5")
  assert row[2].startswith("40%")
  assert row[3].startswith("80%")


def test_different_items_are_not_compared():
  with pytest.raises(ValueError, match="expected the same items"):
    behaviours.compare(_scores([True]), _scores([True, False]))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_gains_and_losses_account_for_the_change(pairs):
  before, after = (_scores(list(side)) for side in zip(*pairs, strict=True))
  (found,) = behaviours.compare(before, after)
  change = found.after.passed - found.before.passed
  assert found.gained - found.lost == change
  assert 0 < found.p <= 1


def test_scores_survive_json():
  scores = _scores([True, False, True])
  value = json.loads(json.dumps(scores.to_json()))
  assert behaviours.Scores.from_json(value) == scores
  assert value["groups"]["facts"]["passed"] == 2
  assert value["groups"]["facts"]["rate"] == 2 / 3


@pytest.mark.parametrize(
  ("passed", "n", "low", "high"),
  [
    # Published examples: Newcombe 1998, table I (method 3), to four places.
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
  ],
)
def test_wilson_against_published_values(passed, n, low, high):
  assert behaviours.wilson(passed, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500), st.data())
def test_wilson_solves_its_own_equation(n, data):
  """Each bound is a proportion just 1.96 standard errors from the observed."""
  passed = data.draw(st.integers(0, n))
  share = passed / n
  low, high = behaviours.wilson(passed, n)
  assert 0 <= low <= share <= high <= 1
  for bound in (low, high):
    error = math.sqrt(bound * (1 - bound) / n)
    assert abs(share - bound) == pytest.approx(1.959963985 * error, abs=1e-6)


@pytest.mark.parametrize(
  ("gained", "lost", "p"),
  [(0, 0, 1), (5, 0, 0.0625), (10, 0, 2**-9), (3, 3, 1), (8, 2, 0.109375)],
)
def test_mcnemar_against_binomial_tails(gained, lost, p):
  assert behaviours.mcnemar(gained, lost) == pytest.approx(p)
  assert behaviours.mcnemar(lost, gained) == pytest.approx(p)
