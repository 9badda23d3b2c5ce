"""A row's fields, or what is wrong with them."""

from collections.abc import Mapping
from typing import Any

from sft_jax.data import rows
from sft_jax.data.conversation import RowError, ToolCall

Row = Mapping[str, Any]

# A message's own weight, under the names that data sets give it.
WEIGHTS = ("weight", "loss_weight", "train")


def present(value: Any, where: str) -> dict[str, Any]:
  """An object's keys; null is a key left out."""
  if not isinstance(value, Mapping):
    raise RowError(where, kind(value), "an object", "Write it as {...}.")
  return {key: held for key, held in value.items() if held is not None}


def only(row: Row, keys: Any, where: str) -> str:
  """The one of `keys` that the row has."""
  found = [key for key in keys if key in row]
  if len(found) != 1:
    raise RowError(
      where,
      f"keys {found or sorted(row)}",
      f"exactly one of {', '.join(keys)}",
      "Rename or drop keys so that one is left.",
    )
  return found[0]


def text(row: Any, key: str, where: str) -> str:
  """row[key] as a string; '' where it is absent."""
  value = present(row, where).get(key, "")
  if not isinstance(value, str):
    raise RowError(
      where, f"{key} of {kind(value)}", "a string", "Make it a string."
    )
  return value


def items(row: Row, key: str, where: str) -> list[Any]:
  """row[key] as a list, which must not be empty (but for tool_calls)."""
  value = row.get(key)
  if not isinstance(value, list) or (not value and key != "tool_calls"):
    raise RowError(
      where,
      f"{key} of {kind(value)}" if value else f"no {key}",
      f"a list of {key}",
      "Fill it or drop the row.",
    )
  return value


def kind(value: Any) -> str:
  """What a value is, in words for an error."""
  return f"type {type(value).__name__}"


def content(value: Any, where: str) -> str:
  """Content as one string; a list of text parts is joined."""
  if isinstance(value, str):
    return value
  if not isinstance(value, list):
    raise RowError(
      where,
      f"content of {kind(value)}",
      "a string",
      "Make it a string.",
    )
  parts = []
  for part in value:
    is_text = isinstance(part, Mapping) and part.get("type") == "text"
    said = part.get("text", part.get("value")) if is_text else None
    if not isinstance(said, str):
      raise RowError(
        where,
        f"a content part {str(part)[:80]!r}",
        "parts {'type': 'text', 'text': ...}",
        "Only text can be trained on: drop the row.",
      )
    parts.append(said)
  return "".join(parts)


def tool_call(call: Any, where: str) -> ToolCall:
  """{'function': {'name', 'arguments'}, 'id'?} or the same without wrapping.

  Arguments may be an object or that object as a JSON string; both become the
  object, since templates differ in which of them they can print.
  """
  inner = call.get("function", call) if isinstance(call, Mapping) else None
  if not isinstance(inner, Mapping) or "name" not in inner:
    raise RowError(
      where,
      f"a tool call {str(call)[:80]!r}",
      "an object with name and arguments",
      "Write {'function': {'name': ..., 'arguments': {...}}}.",
    )
  arguments = inner.get("arguments")
  if isinstance(arguments, str) and arguments.strip():
    arguments = rows.loads(arguments, where)
  if not arguments and not isinstance(arguments, list):
    arguments = {}
  if not isinstance(arguments, dict):
    raise RowError(
      where,
      f"tool call arguments of {kind(arguments)}",
      "an object",
      "Name every argument: {'city': 'Paris'}.",
    )
  call_id = text(call, "id", where) or None
  return ToolCall(text(inner, "name", where), arguments, call_id)


def tools(row: Row, where: str) -> tuple[dict[str, Any], ...]:
  """The row's tool schemas; a JSON string of them is read, not rewritten."""
  value = row.get("tools") or []
  if isinstance(value, str):
    value = rows.loads(value, where) if value.strip() else []
  listed = isinstance(value, list)
  if not listed or not all(isinstance(tool, dict) for tool in value):
    raise RowError(
      where,
      f"tools {str(value)[:80]!r}",
      "a list of JSON schemas",
      "Wrap the schemas in a list.",
    )
  return tuple(value)


def weight(item: Row, where: str) -> float | None:
  found = [key for key in WEIGHTS if item.get(key) is not None]
  if not found:
    return None
  value = item[only(item, found, where)]
  if not isinstance(value, bool | int | float):
    raise RowError(
      where, f"weight {value!r}", "a number or a boolean", "Correct it."
    )
  return float(value)
