"""JSON values: strict parsing, equality, and a subset of JSON Schema.

The subset: type, properties, required, additionalProperties (true or false),
enum, items (one schema), and the annotations title and description.
"""

import json
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
  "object": (dict,),
  "array": (list,),
  "string": (str,),
  "integer": (int,),
  "number": (int, float),
  "boolean": (bool,),
  "null": (type(None),),
}


def parse(text: str) -> tuple[bool, Any]:
  """(whether the whole text is one JSON value, that value)."""

  def refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN and Infinity are no JSON.

  try:
    return True, json.loads(text, parse_constant=refuse)
  # A model may nest brackets deeper than the parser's stack.
  except (ValueError, RecursionError):
    return False, None


def same(a: Any, b: Any) -> bool:
  """JSON equality: 1 is 1.0, but true is not 1."""
  if isinstance(a, bool) or isinstance(b, bool):
    return a is b
  if isinstance(a, dict) and isinstance(b, dict):
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
  if isinstance(a, list) and isinstance(b, list):
    return len(a) == len(b) and all(map(same, a, b))
  return a == b


def satisfies(value: Any, schema: dict[str, Any]) -> bool:
  """Whether a value satisfies a schema that `check_schema` accepts."""
  if "type" in schema:
    names = schema["type"]
    names = [names] if isinstance(names, str) else names
    if not any(_is(value, name) for name in names):
      return False
  if "enum" in schema and not any(same(value, x) for x in schema["enum"]):
    return False
  if isinstance(value, list) and "items" in schema:
    return all(satisfies(item, schema["items"]) for item in value)
  if isinstance(value, dict):
    known = schema.get("properties", {})
    if not value.keys() >= set(schema.get("required", ())):
      return False
    if schema.get("additionalProperties") is False and value.keys() - known:
      return False
    return all(
      satisfies(value[key], known[key]) for key in known if key in value
    )
  return True


def check_schema(schema: Any, where: str) -> None:
  """Raises a ValueError for a schema outside the subset."""

  def need(good: bool, got: Any, expected: str, at: str = where) -> None:
    if not good:
      raise ValueError(
        f"{at}: got {got!r}; expected {expected}. "
        "Keep to the subset named in json_subset."
      )

  need(isinstance(schema, dict), schema, "an object")
  for key, part in schema.items():
    at = f"{where}.{key}"
    match key:
      case "title" | "description":
        pass
      case "type":
        names = [part] if isinstance(part, str) else part
        good = isinstance(names, list) and all(
          isinstance(n, str) and n in _TYPES for n in names
        )
        need(good, part, f"names of {', '.join(_TYPES)}", at)
      case "properties":
        need(isinstance(part, dict), part, "an object of schemas", at)
        for name, inner in part.items():
          check_schema(inner, f"{at}.{name}")
      case "items":
        check_schema(part, at)
      case "required":
        good = isinstance(part, list) and all(isinstance(n, str) for n in part)
        need(good, part, "a list of names", at)
      case "enum":
        need(isinstance(part, list), part, "a list of values", at)
      case "additionalProperties":
        need(isinstance(part, bool), part, "true or false", at)
      case _:
        need(False, key, "a keyword of the subset")


def _is(value: Any, name: str) -> bool:
  if isinstance(value, bool):
    return name == "boolean"
  if name == "integer" and isinstance(value, float):
    return value.is_integer()
  return isinstance(value, _TYPES[name])
