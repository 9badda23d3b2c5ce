"""JSON values of replies: strict parsing, equality, and JSON Schema.

Schemas are those of draft 2020-12, checked by `jsonschema`. Nothing is ever
loaded: a `$ref` leads into the schema itself. What `jsonschema` would ignore,
an unknown keyword or the notes of `format`, is refused.
"""

import json
from typing import Any

import jsonschema
from jsonschema import Draft202012Validator as Validator
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

_NOTES = {"title", "description", "default", "examples", "$defs", "$schema"}
_KEYWORDS = (Validator.VALIDATORS.keys() | _NOTES) - {"format"}
# Where schemas are within a schema: by name, in a list, or by themselves.
_BY_NAME = {"properties", "patternProperties", "$defs", "dependentSchemas"}


def parse(text: str) -> tuple[bool, Any]:
  """(whether the whole text is one JSON value, that value)."""

  def refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN and Infinity are no JSON.

  try:
    return True, json.loads(text, parse_constant=refuse)
  # A model may nest brackets deeper than the parser's stack.
  except (ValueError, RecursionError):
    return False, None


def equal(a: Any, b: Any) -> bool:
  """JSON equality: 1 is 1.0, but true is not 1; the order of keys is free."""
  return satisfies(a, {"const": b})


def satisfies(value: Any, schema: Any) -> bool:
  """Whether a value satisfies a schema that `check_schema` accepts."""
  try:
    # A registry of nobody's: the default one asks the network.
    return Validator(schema, registry=Registry()).is_valid(value)
  except RecursionError:
    return False


def check_schema(schema: Any, where: str) -> None:
  """Raises a ValueError that names the place for a schema that is none."""
  try:
    Validator.check_schema(schema)
  except jsonschema.SchemaError as error:
    place = ".".join([where, *map(str, error.absolute_path)])
    raise ValueError(
      f"{place}: got {error.instance!r}; expected JSON Schema, draft 2020-12 "
      f"({error.message}). Correct the schema."
    ) from None
  whole = Registry().with_resource("", DRAFT202012.create_resource(schema))
  _check_keywords(schema, where, whole.resolver())


def _check_keywords(schema: Any, where: str, resolver: Any) -> None:
  if not isinstance(schema, dict):
    return
  if unknown := sorted(schema.keys() - _KEYWORDS):
    raise ValueError(
      f"{where}: got keyword {unknown[0]!r}; expected those that are "
      "checked. Remove it: it would be ignored."
    )
  if "$ref" in schema:
    try:
      resolver.lookup(schema["$ref"])
    except Unresolvable:
      raise ValueError(
        f"{where}: got a $ref to {schema['$ref']!r}; expected one into the "
        "schema itself, such as '#/$defs/name'. Write the schema out."
      ) from None
  for key, part in schema.items():
    if key in ("enum", "const", "default", "examples"):
      continue
    inner = part.items() if isinstance(part, dict) else ()
    if key in _BY_NAME:
      for name, one in inner:
        _check_keywords(one, f"{where}.{key}.{name}", resolver)
    else:
      for one in part if isinstance(part, list) else [part]:
        _check_keywords(one, f"{where}.{key}", resolver)
