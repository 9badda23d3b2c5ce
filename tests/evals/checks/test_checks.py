"""Each check, against a table of replies that must pass and that must not."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_jax.data.conversation import Message, ToolCall
from sft_jax.evals.checks import checks, ifeval, json_schema
from sft_jax.inference.generate import Reply


def said(text: str) -> Reply:
  return Reply(text, [], True, Message("assistant", text))


SCHEMA = {
  "type": "object",
  "properties": {
    "name": {"type": "string"},
    "age": {"type": "integer"},
    "tags": {"type": "array", "items": {"enum": ["a", "b", 1]}},
  },
  "required": ["name"],
  "additionalProperties": False,
}

# (check, arguments, replies that pass, replies that do not)
TABLE = [
  ("exact", {"text": "A cat."}, ["A cat.", " A cat.\n"], ["a cat.", "A cat"]),
  (
    "normalised",
    {"text": "A cat."},
    ["a  CAT", "A cat!"],
    ["A cat is", "", "a-cat b"],
  ),
  (
    "contains",
    {"text": "7"},
    ["7", "Ben has 7 cups.", "7, 8"],
    ["17 cups", "7th", "seven", ""],
  ),
  (
    "contains",
    {"text": "red cup"},
    ["The Red Cup."],
    ["red cups", "red  cup", "cup red"],
  ),
  ("not_contains", {"text": "boat"}, ["vessel", "boats"], ["A Boat."]),
  ("regex", {"pattern": r"^\d+$"}, ["12"], ["12 cups", ""]),
  (
    "number",
    {"value": 12},
    ["12", "7 + 5 = 12.", "It is 12.0", "so 5-12"],
    ["12 - 3 = 9", "-12", "", "112", "1.2"],
  ),
  ("number", {"value": 1012}, ["1,012 cups"], ["1, 012"]),
  ("number", {"value": -2.5}, ["It is -2.5."], ["2.5", "3 -25"]),
  (
    "json_schema",
    {"schema": SCHEMA},
    [
      '{"name": "Ben"}',
      ' {"age": 3, "name": ""} ',
      '{"name": "x", "tags": ["a", 1.0]}',
    ],
    [
      '{"age": 3}',
      '{"name": "x", "age": true}',
      '{"name": "x", "age": 3.5}',
      '{"name": "x", "more": 1}',
      '{"name": "x", "tags": ["c"]}',
      '{"name": "x", "tags": [true]}',
      '[{"name": "x"}]',
      'Here: {"name": "x"}',
      '{"name": "x"',
      "",
      "[" * 100_000,
    ],
  ),
  (
    "json_equals",
    {"value": {"a": 1, "b": [True, None]}},
    ['{"b": [true, null], "a": 1.0}'],
    ['{"a": 1, "b": [1, null]}', '{"a": 1}', '{"a": "1", "b": [true, null]}'],
  ),
  ("json_equals", {"value": None}, ["null"], ["", "NaN", "0"]),
  (
    "refusal",
    {},
    ["I cannot help with that.", "I can’t do that.", " Sorry, no.", "No."],
    ["", "You cannot refuse.", "Now then.", "I can help."],
  ),
  (
    "not_refusal",
    {},
    ["Mix flour and honey.", "Nothing is forbidden."],
    ["I’m sorry", "", "  \n"],
  ),
  ("starts_with", {"text": "Ahoy."}, [" Ahoy. You."], ["You. Ahoy.", "ahoy."]),
  ("ends_with", {"text": "winds."}, ["Fair winds. "], ["Fair winds. Bye"]),
  ("contains_any", {"texts": ["a", "b"]}, ["so b."], ["ab", ""]),
  ("contains_all", {"texts": ["a", "b"]}, ["b a"], ["b", "ab"]),
  ("contains_none", {"texts": ["a", "b"]}, ["ab", ""], ["b", "A!"]),
  (
    "gsm8k",
    {"answer": "6 * 3 = 18\n#### 1,018"},
    ["So\n#### 1018.", "#### 1,018 or #### 3"],
    ["1018", "#### $1018", "#### 1018.0", "####1018", ""],
  ),
  (
    "gsm8k",
    {"answer": "#### 18", "strict": False},
    ["18", "$18.", "It is 3, no, 18."],
    ["18.0", "18 of 20", "eighteen", ""],
  ),
  (
    "partial_refusal",
    {},
    ["Here is some. I’m sorry, the rest no.", "First. As an AI, I stop."],
    ["I'm sorry. I can't.", "Is it? No. It is not.", "Sure.", ""],
  ),
  ("complies", {}, ["Sure. No."], ["Sorry.", "So. I cannot.", ""]),
  ("min_words", {"count": 2}, ["a b"], ["a-b", ""]),
  (
    "punctuation:no_comma",
    {"loose": True},
    ["Sure, then\na b", "a"],
    ["a,\nb,\nc,", ""],
  ),
  ("max_words", {"count": 2}, ["", "two  words"], ["these three words"]),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), TABLE)
def test_table(name, arguments, good, bad):
  check = {"check": name, **arguments}
  checks.validate(check, "here")
  for text in good:
    assert checks.passes(said(text), check), text
  for text in bad:
    assert not checks.passes(said(text), check), text


def _calls(*calls: ToolCall, reasoning: str | None = None) -> Reply:
  return Reply("", [], True, Message("assistant", "", reasoning, calls))


def test_tool_call():
  check = {"check": "tool_call", "name": "tide", "arguments": {"town": "X"}}
  checks.validate(check, "here")
  good = ToolCall("tide", {"town": "X"})
  assert checks.passes(_calls(good), check)
  for reply in (
    _calls(),
    _calls(good, good),
    _calls(ToolCall("ebb", {"town": "X"})),
    _calls(ToolCall("tide", {"town": "Y"})),
    _calls(ToolCall("tide", {"town": "X", "hour": 1})),
  ):
    assert not checks.passes(reply, check)


def test_has_reasoning():
  check = {"check": "has_reasoning"}
  assert checks.passes(_calls(reasoning="7 + 5 = 12."), check)
  assert not checks.passes(_calls(reasoning=" "), check)
  assert not checks.passes(_calls(), check)


def test_every_check_has_a_case():
  covered = {row[0] for row in TABLE} | {"tool_call", "has_reasoning"}
  elsewhere = {"tool_calls", *ifeval.INSTRUCTIONS}
  assert covered | elsewhere == checks.CHECKS.keys()


def test_tool_calls_by_their_parts():
  check = {
    "check": "tool_calls",
    "functions": [{
      "name": "add",
      "parameters": {"properties": {"a": {"type": "integer"}}},
    }],
    "answers": [{"add": {"a": [1, 2]}}, {"add": {"a": [3]}}],
  }  # fmt: skip
  checks.validate(check, "here")
  one, three = ToolCall("add", {"a": 1}), ToolCall("add", {"a": 3})
  assert checks.passes(_calls(three, one), check)
  assert not checks.passes(_calls(one), check)


@pytest.mark.parametrize(
  "check",
  [
    "contains",
    {"text": "no name"},
    {"check": "contain", "text": "x"},
    {"check": "contains"},
    {"check": "contains", "text": 7},
    {"check": "contains", "text": "x", "extra": 1},
    {"check": "max_words", "count": True},
    {"check": "refusal", "text": "x"},
    {"check": "gsm8k", "answer": "18"},
    {"check": "gsm8k", "answer": "#### 18", "strict": 1},
    {"check": "tool_calls", "functions": [3], "answers": []},
    {"check": "keywords:existence", "keyword": ["a"]},
    {"check": "keywords:existence", "keywords": ["a", "("]},
    {
      "check": "length_constraints:number_words",
      "num_words": 3,
      "relation": "more",
    },
    {
      "check": "keywords:letter_frequency",
      "letter": "ab",
      "let_frequency": 1,
      "let_relation": "at least",
    },
    {"check": "regex", "pattern": "("},
    {"check": "json_schema", "schema": {"minimum": "3"}},
    {"check": "json_schema", "schema": {"type": "int"}},
    {"check": "json_schema", "schema": {"type": ["string", {}]}},
    {"check": "json_schema", "schema": {"required": "name"}},
    {"check": "json_schema", "schema": {"enum": 1}},
    {"check": "json_schema", "schema": {"additionalProperties": 1}},
    {"check": "json_schema", "schema": {"items": {"colour": "red"}}},
    {"check": "json_schema", "schema": {"not": {"$ref": "http://localhost/x"}}},
    {"check": "json_schema", "schema": {"not": {"$ref": "#/$defs/none"}}},
    {"check": "json_schema", "schema": {"properties": {"a": {"oneOf": []}}}},
    {"check": "json_schema", "schema": {"items": []}},
  ],
)
def test_bad_checks_are_refused_with_their_place(check: Any):
  with pytest.raises(ValueError, match=r"rows\.jsonl:3.*got.*expected"):
    checks.validate(check, "rows.jsonl:3")


def test_an_error_names_the_nested_place():
  schema = {"properties": {"a": {"items": {"type": "int"}}}}
  with pytest.raises(ValueError, match=r"schema\.properties\.a\.items\.type"):
    checks.validate({"check": "json_schema", "schema": schema}, "here")


json_values = st.recursive(
  st.none() | st.booleans() | st.integers() | st.text(max_size=3),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=2), inner, max_size=3)
  ),
  max_leaves=6,
)


@given(json_values, json_values)
def test_equality_is_that_of_the_written_json(a, b):
  written = [json.dumps(x, sort_keys=True) for x in (a, b)]
  assert json_schema.equal(a, b) == (written[0] == written[1])


@given(json_values)
def test_what_is_written_is_read_back(value):
  found, read = json_schema.parse(json.dumps(value))
  assert found
  assert json_schema.equal(read, value)
  assert json_schema.satisfies(read, {"enum": [value]})


GSM8K = Path(__file__).parents[4] / "shared/data/reasoning/gsm8k_train.jsonl"


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs the shared data folder")
@pytest.mark.parametrize("strict", [True, False])
def test_the_answers_of_gsm8k_pass_and_perturbed_ones_fail(strict):
  lines = GSM8K.read_text(encoding="utf-8").splitlines()
  for line in lines:
    answer = json.loads(line)["answer"]
    check = {"check": "gsm8k", "answer": answer, "strict": strict}
    work, number = answer.rsplit("#### ", 1)
    bare = int(number.replace(",", ""))
    assert checks.passes(said(answer), check)
    assert checks.passes(said(f"{work}#### {bare:,}."), check)
    assert not checks.passes(said(f"{work}#### {bare + 1}"), check)
    assert not checks.passes(said(f"{work}#### {bare}0"), check)
    # Right, but not in the form that was asked for.
    free = f"{work}The answer is ${bare:,}."
    assert checks.passes(said(free), check) != strict
