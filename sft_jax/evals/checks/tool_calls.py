"""Tool calls judged as BFCL judges them: by their parts, not as text.

The rules are those of the Berkeley Function-Calling Leaderboard's checker (its
"AST" evaluation), with the calls given as JSON. Accepted answers list every
right value of each parameter; '' among them means that it may be left out:

    {"get_weather": {"city": ["Oslo", "Oslo, Norway"], "unit": ["C", ""]}}

One rule is stricter: calls and answers are paired by a true matching, so that
no order of the answers can fail a reply that fits them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sft_jax.data.conversation import ToolCall

# A schema's type: what a JSON value of it is in Python.
TYPES: dict[str, type] = {
  **dict.fromkeys(("string", "String", "char", "any"), str),
  **dict.fromkeys(("integer", "byte", "short", "long", "Bigint"), int),
  **dict.fromkeys(("float", "double", "number"), float),
  **dict.fromkeys(("boolean", "Boolean"), bool),
  **dict.fromkeys(
    ("array", "tuple", "Array", "ArrayList", "Queue", "Stack", "Set"), list
  ),
  **dict.fromkeys(("dict", "object", "HashMap", "Hashtable"), dict),
}

Function = Mapping[str, Any]
Answer = Mapping[str, Mapping[str, Sequence[Any]]]


def match(
  calls: Sequence[ToolCall],
  functions: Sequence[Function],
  answers: Sequence[Answer],
) -> bool:
  """Whether the calls are the accepted ones, in any order, each once; of no
  answers, whether there are none (BFCL's irrelevance)."""
  if len(calls) != len(answers):
    return False
  fit = lambda answer: [_fits(call, functions, answer) for call in calls]
  return _perfect([*map(fit, answers)])


def check_arguments(functions: Sequence[Any], answers: Sequence[Any]) -> None:
  """Raises ValueError unless `match` can judge by them."""
  named: dict[str, Any] = {}
  for function in functions:
    schema = _schema(function)
    properties, name = _parameters(schema)["properties"], schema.get("name")
    if not isinstance(name, str) or not isinstance(properties, dict):
      raise ValueError(
        f"functions: got {function!r}; expected a name and parameters with "
        "properties. Correct the schema."
      )
    named[name] = properties
  for answer in answers:
    alone = isinstance(answer, dict) and len(answer) == 1
    ((name, parameters),) = answer.items() if alone else [("", None)]
    if name not in named or not isinstance(parameters, dict):
      raise ValueError(
        f"answers: got {answer!r}; expected {{function: {{parameter: [values]"
        f"}}}} with a function of {sorted(named)}. Correct it."
      )
    for parameter, values in parameters.items():
      if not isinstance(values, list) or not values:
        raise ValueError(
          f"answers: got {parameter}={values!r}; expected a list of the "
          "accepted values. Wrap it in a list."
        )
      kind = named[name].get(parameter, {"type": "any"}).get("type")
      if kind not in TYPES:
        raise ValueError(
          f"functions: got type {kind!r} of {parameter}; expected one of "
          f"{', '.join(TYPES)}. Correct the schema."
        )


def _fits(
  call: ToolCall, functions: Sequence[Function], answer: Answer
) -> bool:
  ((name, accepted),) = answer.items()
  schema = next(one for one in map(_schema, functions) if one["name"] == name)
  parameters = _parameters(schema)
  # Some services allow no dots in names.
  if call.name not in (name, name.replace(".", "_")):
    return False
  given = call.arguments
  if any(one not in given for one in parameters.get("required", ())):
    return False
  for parameter, values in accepted.items():
    if parameter not in given and "" not in values:
      return False
  return all(
    parameter in accepted
    and parameter in parameters["properties"]
    and _right(value, accepted[parameter], parameters["properties"][parameter])
    for parameter, value in given.items()
  )


def _right(value: Any, accepted: Sequence[Any], schema: Mapping) -> bool:
  """Whether a value is of its type and among the accepted ones."""
  wanted = TYPES[schema["type"]]
  if wanted is float and type(value) is int:
    value = float(value)
  of_answers = next((type(one) for one in accepted if one != ""), None)
  if type(value) is not wanted and type(value) is not of_answers:
    return False
  if wanted is not of_answers and of_answers is not None:
    # The answers name a variable: its name must be said exactly.
    return any(_equal(value, one) for one in accepted)
  if wanted is list:
    inner = TYPES.get(schema.get("items", {}).get("type", ""))
    if inner is dict:
      return any(_list_of_dicts(value, one) for one in accepted)
    # Of the schema's type, or of that of the accepted lists' items.
    lists = [many for many in accepted if isinstance(many, list)]
    types = {inner, *(type(one) for many in lists for one in many)}
    if inner is not None and not {*map(type, value)} <= types:
      return False
  if wanted is dict:
    return any(_dict(value, one) for one in accepted if one != "")
  return any(_equal(_plain(value), _plain(one)) for one in accepted)


def _list_of_dicts(value: Any, accepted: Any) -> bool:
  if not isinstance(accepted, list) or len(value) != len(accepted):
    return False
  pairs = zip(value, accepted, strict=True)
  return all(isinstance(one, dict) and _dict(one, want) for one, want in pairs)


def _dict(value: Mapping, accepted: Any) -> bool:
  """Each key allowed, its value accepted; no key missing that must be."""
  if not isinstance(accepted, dict) or value.keys() - accepted.keys():
    return False
  fits = lambda one, many: any(_equal(_plain(one), _plain(x)) for x in many)
  return all(
    fits(value[key], many) if key in value else "" in many
    for key, many in accepted.items()
  )


def _plain(value: Any) -> Any:
  """Strings without spaces, case and , . / - _ * ^, and quotes all double:
  'April 1, 2024' and 'april 1 2024' are the same answer."""
  if isinstance(value, str):
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')
  if isinstance(value, list):
    return [_plain(one) for one in value]
  return value


def _equal(one: Any, other: Any) -> bool:
  """Equal values; True is not 1."""
  if isinstance(one, bool) is not isinstance(other, bool):
    return False
  if isinstance(one, list) and isinstance(other, list):
    return len(one) == len(other) and all(map(_equal, one, other))
  return one == other


def _perfect(fits: Sequence[Sequence[bool]]) -> bool:
  """Whether every row can have a column of its own (Kuhn's matching)."""
  owner: dict[int, int] = {}

  def place(row: int, seen: set[int]) -> bool:
    for column, fit in enumerate(fits[row]):
      if fit and column not in seen:
        seen.add(column)
        if column not in owner or place(owner[column], seen):
          owner[column] = row
          return True
    return False

  return all(place(row, set()) for row in range(len(fits)))


def _schema(function: Any) -> Mapping[str, Any]:
  """A function's schema, bare or in OpenAI's {'type', 'function'}."""
  if not isinstance(function, Mapping):
    raise ValueError(
      f"functions: got {function!r}; expected a JSON schema. Correct it."
    )
  return function.get("function", function)


def _parameters(schema: Mapping[str, Any]) -> Mapping[str, Any]:
  return {"properties": {}, **(schema.get("parameters") or {})}
