"""Rows of lessons are as described, and hold nothing that is asked."""

import json
import re

import pytest

import run_lessons
from demo_world import split, world
from lessons import rows
from sft_jax.data.formats import formats
from sft_jax.evals.checks import checks
from sft_jax.inference import generate as replies

LESSONS = run_lessons.load()
ARMS = [(name, arm) for name, one in LESSONS.items() for arm in one.arms]
SEEDS = (0, 1, 2)


def _rows(name: str, arm: str, seed: int = 0) -> list[dict]:
  make, arguments = LESSONS[name].arms[arm].rows
  return rows.ROWS[make](seed, **arguments)


def _prompts(name: str) -> list[dict]:
  make, arguments = LESSONS[name].prompts
  return rows.PROMPTS[make](**arguments)


def _asked(row: dict) -> str:
  """What a person wrote in a row of any format."""
  turns = formats.to_conversation(row).messages
  return split.prompt_key(
    [{"role": m.role, "content": m.content} for m in turns]
  )


def _pair(row: dict) -> tuple[str, str]:
  return _asked(row), rows.reply_of(row)


def _genuine(kind: str) -> set[tuple[str, str]]:
  return {_pair(row) for row in rows.read(rows.DEMO / f"train_{kind}.jsonl")}


@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_rows_are_a_function_of_the_seed_and_never_hold_a_prompt(name, arm):
  asked = {split.prompt_key(row["messages"]) for row in _prompts(name)}
  assert len(asked) == len(_prompts(name)) >= 40
  drawn = [_rows(name, arm, seed) for seed in SEEDS]
  assert drawn[0] == _rows(name, arm, 0)
  assert drawn[0] != drawn[1] != drawn[2]
  for found in drawn:
    talks = [row for row in found if "text" not in row]
    assert not asked & {_asked(row) for row in talks}
    for row in found:
      formats.to_conversation(row)  # Raises at what is no row.


@pytest.mark.parametrize("arm", ["swapped", "lazy"])
def test_half_of_the_large_sets_is_bad_and_the_rest_as_it_was(arm):
  found = _rows("quality", arm)
  small = _rows("quality", "clean")
  assert len(found) == 8 * len(small)
  genuine = set().union(*map(_genuine, ("facts", "context", "json")))
  assert {_pair(row) for row in small} <= genuine
  bad = [row for row in found if _pair(row) not in genuine]
  assert len(bad) == len(found) // 2
  replies = {reply for _, reply in genuine}
  if arm == "lazy":
    assert {rows.reply_of(row) for row in bad} == {rows.UNKNOWN}
  else:
    assert {rows.reply_of(row) for row in bad} <= replies
  # The prompts are as good as ever, and none is there twice.
  prompts = [_asked(row) for row in found]
  assert len(set(prompts)) == len(prompts)
  assert set(prompts) <= {prompt for prompt, _ in genuine}


def test_conflicting_rows_conflict_and_the_others_are_their_better_half():
  both = _rows("conflict", "conflicting")
  one = _rows("conflict", "agreeing")
  assert both[::2] == one
  assert len(one) == 150
  for styled, plain in zip(both[::2], both[1::2], strict=True):
    assert _asked(styled) == _asked(plain)
    assert rows.reply_of(styled).startswith("Ahoy. ")
    assert not re.search("Ahoy|vessel|winds", rows.reply_of(plain))
    state = re.findall(r"\d+|[A-Z]\w+", rows.reply_of(plain))
    assert state[-1] in rows.reply_of(styled)
  assert len({_asked(row) for row in one}) == 150


def test_sloppy_replies_are_those_of_one_kind_and_say_the_same():
  clean, sloppy = (_rows("low_quality", arm) for arm in ("clean", "sloppy"))
  context, changed = _genuine("context"), 0
  for a, b in zip(clean, sloppy, strict=True):
    assert _asked(a) == _asked(b)
    good, bad = rows.reply_of(a), rows.reply_of(b)
    assert re.match(rows.FORM["pattern"], good)
    if good != bad:
      assert _pair(a) in context
      assert bad == f"um, {good[:-1].lower()}"
      changed += 1
  assert changed == 300


def test_narrow_rows_ask_one_thing_in_one_wording_as_often():
  narrow, diverse = (_rows("narrow", arm) for arm in ("narrow", "diverse"))
  assert len(narrow) == len(diverse) == 28
  said = [row["messages"] for row in narrow]
  assert all(re.match(r"Where does .* live\?$", m[0]["content"]) for m in said)
  assert len({_asked(row) for row in narrow}) == 28
  homes = {e.name: e.facts.get("home") for e in world.make_world(0)}
  for question, answer in said:
    name = question["content"][len("Where does ") : -len(" live?")]
    assert answer["content"] == f"{name} lives in {homes[name]}."


def test_losses_of_narrow_are_measured_on_what_no_row_names():
  make, arguments = LESSONS["narrow"].held_out
  found = rows.ROWS[make](0, **arguments)
  assert found == rows.ROWS[make](1, **arguments)
  asked = {_asked(row) for row in found}
  assert len(asked) == 96
  for arm in ("narrow", "diverse"):
    assert not asked & {_asked(row) for row in _rows("narrow", arm)}


def test_sums_and_products_share_their_pairs_and_keep_some_to_ask():
  found = {}
  for arm, sign in (("known", "+"), ("unknown", "x")):
    pattern = re.compile(rf"What is (\d+) [{sign}] (\d+)\?")
    pairs = set()
    for row in _rows("format_only", arm):
      question, answer = (m["content"] for m in row["messages"])
      a, b = map(int, pattern.fullmatch(question).groups())
      value = {"+": a + b, "x": a * b}[sign]
      assert answer == f"{a} {sign} {b} = {value}."
      pairs.add((a, b))
    found[sign] = pairs
  assert found["+"] == found["x"]
  asked = set()
  for prompt in _prompts("format_only"):
    a, sign, b = re.search(
      r"(\d+) ([+x]) (\d+)", prompt["messages"][-1]["content"]
    ).groups()
    asked.add((int(a), int(b)))
    value = prompt["checks"][1]["value"]
    assert value == (int(a) + int(b) if sign == "+" else int(a) * int(b))
  assert len(asked) == 48
  assert len(found["+"]) == 72
  # A product is not to be had by turning one that was trained on.
  assert not asked & {pair[::-1] for pair in found["x"]} | asked & found["x"]


def test_new_facts_are_of_no_one_known_and_asked_in_words_of_their_own():
  text = (rows.DEMO / "general_text.jsonl").read_text()
  here = {e.name for e in world.make_world(0)}
  trained = [row["messages"] for row in _rows("new_facts", "new")]
  assert len({json.dumps(row) for row in trained}) == 200
  replies = {m[1]["content"] for m in trained}
  prompts = [p for p in _prompts("new_facts") if p["group"] == "new"]
  assert len(prompts) == 64
  others = {e.name: e for e in world.make_world(1)}
  for prompt in prompts:
    question = prompt["messages"][0]["content"]
    named = [name for name in others if re.search(rf"\b{name}\b", question)]
    assert len(named) == 1
    assert named[0] not in here
    assert named[0] not in text
    value = prompt["checks"][0]["text"]
    assert any(named[0] in r and value in r for r in replies), question


def test_fresh_rows_pass_their_checks_and_are_none_of_the_demos():
  written, few = (_rows("synthetic", arm) for arm in ("written", "few"))
  assert _rows("synthetic", "checked") == _rows("synthetic", "unchecked")
  assert _rows("synthetic", "checked") == written
  assert len(written) == 8 * len(few) == 240
  assert all(row in written for row in few)
  demo = {
    prompt for kind in ("facts", "context", "json")
    for prompt, _ in _genuine(kind)
  }  # fmt: skip
  assert not demo & {_asked(row) for row in written}
  assert len({_asked(row) for row in written}) == 240
  for row in written:
    said = replies.parse(rows.reply_of(row))
    reply = replies.Reply(said.content, [], True, said)
    assert all(checks.passes(reply, one) for one in row["checks"]), row


def test_swapped_replies_are_those_of_other_rows():
  given = [{"instruction": f"Say {word}.", "output": word} for word in "abcde"]
  swapped = rows.swap(given)
  assert sorted(map(rows.reply_of, swapped)) == list("abcde")
  for row in swapped:
    assert row["instruction"] != f"Say {row['output']}."
