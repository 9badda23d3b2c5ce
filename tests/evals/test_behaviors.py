"""Behavior scores: counts conserved, intervals and tests against tables."""

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_jax.data.conversation import Message, RowError
from sft_jax.evals import behaviors
from sft_jax.evals.behaviors import Share
from sft_jax.inference.generate import Reply

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


def test_a_raw_text_is_gone_on_from(tmp_path):
  """As base models are asked: no end is wanted of it."""
  row = {"text": "It is", "checks": ROW["checks"], "group": "known"}
  items = behaviors.load(_write(tmp_path / "b.jsonl", [row, row, ROW]))
  assert items[0].prompt.text == "It is"
  assert not items[0].prompt.messages
  said = [_say("here", stopped=False), _say("there"), _say("here")]
  scores = behaviors.run(items, lambda prompts: said)
  assert [reply["passed"] for reply in scores.replies] == [True, False, True]
  assert scores.replies[0]["prompt"] == [{"role": "text", "content": "It is"}]
  for wrong in ({**row, "messages": ROW["messages"]}, {**row, "tools": []}):
    with pytest.raises(ValueError, match=r"expected messages \(or text\)"):
      behaviors.load(_write(tmp_path / "w.jsonl", [wrong]))


def test_scores_count_every_item_once(tmp_path):
  rows = [
    ROW,
    {**ROW, "group": "style"},
    ROW,
    ROW,
    {**ROW, "checks": [*ROW["checks"], {"check": "max_words", "count": 1}]},
  ]
  items = behaviors.load(_write(tmp_path / "b.jsonl", rows))
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

  scores = behaviors.run(items, generate)
  assert [p.messages[0].content for p in asked] == ["Where?"] * 5
  assert scores.groups == {
    "facts": behaviors.Score(4, 1, 3, format=Share(0, 1), content=Share(3, 4)),
    "style": behaviors.Score(1, 1, 1, content=Share(1, 1)),
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
  (item,) = behaviors.load(path)
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
    behaviors.load(path)


IFEVAL = {
  "key": 1000,
  "prompt": "Write two sentences without commas.",
  "instruction_id_list": [
    "punctuation:no_comma",
    "length_constraints:number_sentences",
  ],
  "kwargs": [
    {"num_words": None, "relation": None},
    {"num_sentences": 2, "relation": "at least", "num_words": None},
  ],
}


def test_published_rows_of_ifeval_and_their_four_figures(tmp_path):
  path = _write(tmp_path / "b.jsonl", [IFEVAL, IFEVAL, ROW])
  items = behaviors.load(path)
  assert [item.group for item in items] == ["ifeval", "ifeval", "facts"]
  said = [_say("Sure, this:\nOne. Two."), _say("One, two"), _say("here")]
  scores = behaviors.run(items, lambda prompts: said)
  # The first is wrong by its preamble alone; of the second nothing is right.
  assert [r["passed"] for r in scores.replies] == [False, False, True]
  assert scores.replies[0]["instructions"] == [
    ("punctuation:no_comma", False, True),
    ("length_constraints:number_sentences", True, True),
  ]
  assert behaviors.ifeval_accuracy(scores) == {
    "prompt_strict": 0,
    "instruction_strict": 1 / 4,
    "prompt_loose": 1 / 2,
    "instruction_loose": 2 / 4,
  }
  mine = behaviors.load(_write(tmp_path / "c.jsonl", [ROW]))
  scores = behaviors.run(mine, lambda prompts: said[2:])
  assert behaviors.ifeval_accuracy(scores) is None


def test_a_group_may_be_left_out(tmp_path):
  row = {key: value for key, value in ROW.items() if key != "group"}
  (item,) = behaviors.load(_write(tmp_path / "b.jsonl", [row]))
  assert item.group == "all"


@pytest.mark.parametrize(
  "change", [{"kwargs": []}, {"kwargs": None}, {"instruction_id_list": ["x"]}]
)
def test_a_bad_row_of_ifeval_is_refused(tmp_path, change):
  path = _write(tmp_path / "b.jsonl", [IFEVAL | change])
  with pytest.raises(ValueError, match=r"b\.jsonl:1.*expected"):
    behaviors.load(path)


def test_an_empty_file_is_refused(tmp_path):
  with pytest.raises(ValueError, match="expected at least one prompt"):
    behaviors.load(_write(tmp_path / "b.jsonl", []))


def _scores(passed: list[bool], group: str = "facts") -> behaviors.Scores:
  return behaviors.Scores(
    [
      {"where": f"b:{i}", "group": group, "passed": p, "stopped": p}
      for i, p in enumerate(passed)
    ]
  )


def test_comparison_is_paired_by_item():
  before = _scores([True, False, False, False, True])
  after = _scores([False, True, True, True, True])
  (found,) = behaviors.compare(before, after)
  assert (found.gained, found.lost) == (3, 1)
  assert found.p == 2 * (1 + 4) / 2**4
  assert (found.before.passed, found.after.passed) == (2, 4)
  header, row = behaviors.summary_table(after, before)
  assert len(header) == len(row)
  assert row[:2] == ("facts", "5")
  assert row[2].startswith("40%")
  assert row[3].startswith("80%")
  assert row[4:7] == ("80%", "- / -", "3 / 1")


def test_different_items_are_not_compared():
  with pytest.raises(ValueError, match="expected the same items"):
    behaviors.compare(_scores([True]), _scores([True, False]))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_gains_and_losses_account_for_the_change(pairs):
  before, after = (_scores(list(side)) for side in zip(*pairs, strict=True))
  (found,) = behaviors.compare(before, after)
  change = found.after.passed - found.before.passed
  assert found.gained - found.lost == change
  assert 0 < found.p <= 1


def test_scores_survive_json():
  scores = _scores([True, False, True])
  value = json.loads(json.dumps(scores.to_json()))
  assert behaviors.Scores.from_json(value) == scores
  assert value["groups"]["facts"]["passed"] == 2
  assert value["groups"]["facts"]["rate"] == 2 / 3


def test_form_and_matter_are_scored_apart(tmp_path):
  checks = [
    {"check": "contains", "text": "here"},
    {"check": "max_words", "count": 2},
    # A set may say that a check of words is one of form.
    {"check": "not_contains", "text": "um", "kind": "format"},
  ]
  items = behaviors.load(
    _write(tmp_path / "b.jsonl", [{**ROW, "checks": checks}] * 4)
  )
  said = [
    _say("here"),
    _say("nowhere"),  # The form alone.
    _say("um, it is here"),  # The matter alone.
    _say("here", stopped=False),  # Both; but it never ended.
  ]
  scores = behaviors.run(items, lambda prompts: said)
  (score,) = scores.groups.values()
  assert (score.format, score.content) == (Share(3, 4), Share(3, 4))
  assert (score.passed, score.stopped) == (1, 3)
  assert score.format.interval == behaviors.Score(4, 3, 0).interval
  want = {"pass_rate": 0.25, "stopped": 0.75, "format": 0.75, "content": 0.75}
  assert scores.metrics() == {
    f"behavior/{group}/{name}": value
    for group in ("all", "facts")
    for name, value in want.items()
  }
  _, row = behaviors.summary_table(scores)
  assert row == ("facts", "4", "25% [5%, 70%]", "75%", "75% / 75%")


def test_an_unknown_kind_is_refused(tmp_path):
  row = {**ROW, "checks": [ROW["checks"][0] | {"kind": "tone"}]}
  with pytest.raises(ValueError, match="got kind 'tone'; expected one of"):
    behaviors.load(_write(tmp_path / "b.jsonl", [row]))


def test_sets_by_path_glob_and_name(tmp_path):
  one = _write(tmp_path / "one.jsonl", [ROW])
  _write(tmp_path / "two.jsonl", [ROW, {**ROW, "group": "style"}])
  sets = behaviors.load_sets({"a": str(one), "b": str(tmp_path / "t*.jsonl")})
  assert [item.group for item in sets] == ["a/facts", "b/facts", "b/style"]
  whole = behaviors.load_sets(str(tmp_path / "*.jsonl"))
  assert [item.group for item in whole] == ["facts", "facts", "style"]
  assert len({item.where for item in whole}) == 3


def test_replies_are_written_a_line_each(tmp_path):
  items = behaviors.load(_write(tmp_path / "b.jsonl", [ROW, ROW]))
  scores = behaviors.run(items, lambda prompts: [_say("here"), _say("é")])
  scores.write(tmp_path / "evals" / "step_4.jsonl")
  lines = (tmp_path / "evals" / "step_4.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == scores.replies


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
  assert behaviors.wilson(passed, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500), st.data())
def test_wilson_solves_its_own_equation(n, data):
  """Each bound is a proportion just 1.96 standard errors from the observed."""
  passed = data.draw(st.integers(0, n))
  share = passed / n
  low, high = behaviors.wilson(passed, n)
  assert 0 <= low <= share <= high <= 1
  for bound in (low, high):
    error = math.sqrt(bound * (1 - bound) / n)
    assert abs(share - bound) == pytest.approx(1.959963985 * error, abs=1e-6)


@pytest.mark.parametrize(
  ("gained", "lost", "p"),
  [(0, 0, 1), (5, 0, 0.0625), (10, 0, 2**-9), (3, 3, 1), (8, 2, 0.109375)],
)
def test_mcnemar_against_binomial_tails(gained, lost, p):
  assert behaviors.mcnemar(gained, lost) == pytest.approx(p)
  assert behaviors.mcnemar(lost, gained) == pytest.approx(p)


@given(st.integers(0, 9), st.data())
def test_mcnemar_counts_every_way_the_pairs_could_have_fallen(n, data):
  """Under no difference each changed pair is gained or lost by a fair coin."""
  gained = data.draw(st.integers(0, n))
  seen = abs(gained - (n - gained))
  ways = [abs(sum(signs)) for signs in itertools.product((1, -1), repeat=n)]
  share = sum(way >= seen for way in ways) / len(ways)
  assert behaviors.mcnemar(gained, n - gained) == pytest.approx(share)
