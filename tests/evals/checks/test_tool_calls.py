"""Tool calls by BFCL's rules: worked examples, and its own answers."""

import itertools
import json
from pathlib import Path

import pytest

from sft_jax.data.conversation import ToolCall
from sft_jax.evals.checks import tool_calls

SHARED = Path(__file__).parents[4] / "shared" / "data" / "tools"
WEATHER = {
  "name": "geo.weather",
  "parameters": {
    "type": "dict",
    "properties": {
      "city": {"type": "string"},
      "days": {"type": "integer"},
      "scale": {"type": "float"},
      "tags": {"type": "array", "items": {"type": "string"}},
      "where": {"type": "dict"},
      "stops": {"type": "array", "items": {"type": "dict"}},
    },
    "required": ["city"],
  },
}


def right(arguments, accepted, name="geo.weather"):
  answer = {"geo.weather": {"city": ["Oslo, Norway"], **accepted}}
  tool_calls.check_arguments([WEATHER], [answer])
  call = ToolCall(name, {"city": "oslo norway", **arguments})
  return tool_calls.match([call], [WEATHER], [answer])


@pytest.mark.parametrize(
  ("arguments", "accepted", "expected"),
  [
    ({}, {}, True),
    ({"city": "Bergen"}, {}, False),
    ({"days": 3}, {"days": [3, 4]}, True),
    ({"days": 5}, {"days": [3, 4]}, False),
    ({"days": "3"}, {"days": [3]}, False),
    ({"days": True}, {"days": [1]}, False),
    ({"days": 3.0}, {"days": [3]}, False),
    ({}, {"days": [3]}, False),
    ({}, {"days": [3, ""]}, True),
    ({"days": 3}, {}, False),
    ({"hours": 3}, {}, False),
    ({"scale": 2}, {"scale": [2.0]}, True),
    ({"scale": "2"}, {"scale": [2.0]}, False),
    ({"days": "n_days"}, {"days": ["n_days"]}, True),
    ({"days": "N days"}, {"days": ["n_days"]}, False),
    ({"tags": ["A-b", "c"]}, {"tags": [["ab", "C"]]}, True),
    ({"tags": ["c", "ab"]}, {"tags": [["ab", "c"]]}, False),
    ({"tags": [1, 2]}, {"tags": [["ab", "c"]]}, False),
    ({"where": {"x": 1}}, {"where": [{"x": [1, 2], "y": [3, ""]}]}, True),
    ({"where": {"x": 3}}, {"where": [{"x": [1, 2]}]}, False),
    ({"where": {}}, {"where": [{"x": [1, 2]}]}, False),
    ({"where": {"x": 1, "z": 1}}, {"where": [{"x": [1]}]}, False),
    ({"stops": [{"x": 1}, {"x": 2}]},
     {"stops": [[{"x": [1]}, {"x": [2, 3]}]]}, True),
    ({"stops": [{"x": 2}, {"x": 1}]},
     {"stops": [[{"x": [1]}, {"x": [2, 3]}]]}, False),
    ({"stops": [{"x": 1}]}, {"stops": [[{"x": [1]}, {"x": [2]}]]}, False),
  ],
)  # fmt: skip
def test_one_call(arguments, accepted, expected):
  assert right(arguments, accepted) is expected


def test_names():
  assert right({}, {}, name="geo_weather")
  assert not right({}, {}, name="weather")


def test_parallel_calls_are_matched_in_any_order():
  # The first answer fits both calls; taking the first call would leave the
  # second answer without one.
  answers = [
    {"geo.weather": {"city": ["Oslo", "Rome"]}},
    {"geo.weather": {"city": ["Oslo"]}},
    {"geo.weather": {"city": ["Bonn"]}},
  ]
  cities = ("Oslo", "Rome", "Bonn")
  for order in itertools.permutations(cities):
    made = [ToolCall("geo.weather", {"city": city}) for city in order]
    assert tool_calls.match(made, [WEATHER], answers)
    assert not tool_calls.match(made[:2], [WEATHER], answers)
  twice = [
    ToolCall("geo.weather", {"city": city}) for city in ["Rome", "Rome", "Bonn"]
  ]
  assert not tool_calls.match(twice, [WEATHER], answers)
  assert tool_calls.match([], [WEATHER], [])
  assert not tool_calls.match([ToolCall("geo.weather", {})], [WEATHER], [])


def test_what_cannot_judge_is_refused():
  good = {"geo.weather": {"city": ["Oslo"]}}
  for functions, answers, names in (
    (["x"], [good], "functions: got 'x'"),
    ([{"name": 3}], [], "functions: got {'name': 3}"),
    ([WEATHER], [{"rain": {}}], "answers: got {'rain'"),
    ([WEATHER], [good | {"b": {}}], "answers: got"),
    ([WEATHER], [{"geo.weather": {"city": "Oslo"}}], "city='Oslo'"),
  ):
    with pytest.raises(ValueError, match="got") as caught:
      tool_calls.check_arguments(functions, answers)
    assert names in str(caught.value)


def accepted_calls(answer):
  """Every accepted call of an answer, varying one parameter at a time."""
  ((name, parameters),) = answer.items()

  def value_of(one):
    if isinstance(one, dict):
      return {
        k: value_of(next(v for v in vs if v != ""))
        for k, vs in one.items()
        if any(v != "" for v in vs)
      }
    if isinstance(one, list):
      return [value_of(item) for item in one]
    return one

  first = {
    key: value_of(next(v for v in values if v != ""))
    for key, values in parameters.items()
    if any(v != "" for v in values)
  }
  yield ToolCall(name, first)
  for key, values in parameters.items():
    for value in values:
      rest = {k: v for k, v in first.items() if k != key}
      made = rest if value == "" else rest | {key: value_of(value)}
      yield ToolCall(name, made)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")
@pytest.mark.parametrize("language", ["java", "javascript"])
def test_the_answers_of_bfcl_pass_and_perturbed_ones_fail(language):
  def read(folder):
    path = folder / f"BFCL_v4_simple_{language}.json"
    return [json.loads(line) for line in path.read_text().splitlines()]

  questions = read(SHARED)
  truths = read(SHARED / "possible_answer")
  tried = wrong = 0
  for question, truth in zip(questions, truths, strict=True):
    functions, answers = question["function"], truth["ground_truth"]
    tool_calls.check_arguments(functions, answers)
    (parameters,) = answers[0].values()
    required = functions[0]["parameters"]["required"]
    for call in accepted_calls(answers[0]):
      if not set(required) <= call.arguments.keys():
        continue
      tried += 1
      assert tool_calls.match([call], functions, answers), (
        question["id"],
        call,
      )
      for key, value in call.arguments.items():
        bent = [f"{value}x", {"no": "such"}, None, ["x", value]]
        for bad in bent:
          arguments = call.arguments | {key: bad}
          made = [ToolCall(call.name, arguments)]
          wrong += 1
          assert not tool_calls.match(made, functions, answers), (made, answers)
        if "" not in parameters[key]:
          arguments = {k: v for k, v in call.arguments.items() if k != key}
          made = [ToolCall(call.name, arguments)]
          assert not tool_calls.match(made, functions, answers)
      more = ToolCall(call.name, call.arguments | {"more": 1})
      other = ToolCall(call.name + "s", call.arguments)
      for made in ([more], [other], [call, call], []):
        assert not tool_calls.match(made, functions, answers)
  assert tried > 100
  assert wrong > 500
