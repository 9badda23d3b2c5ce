"""A row's fields, or what is wrong with them; and a data set's own names."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sft_jax.data.conversation import RowError, ToolCall
from sft_jax.data.readers.json import loads

Row = Mapping[str, Any]

# A message's own weight, under the names that data sets give it.
WEIGHTS = ("weight", "loss_weight", "train", "training")
# The ledger's note of a field that holds text and that no format reads.
NOT_READ = "field not read: {}"
# How a column is renamed that is no weight; see `sources.settle_weights`.
NO_WEIGHT = "not read as a weight: "
# Text that says what a row or turn is, not what anybody said.
_ABOUT = re.compile(
  r"(.*[_-])?(ids?|uuid|hash|md5|sha\d*|url|uri|lang(uage)?|source|origin|dataset"
  r"|split|categor(y|ies)|topics?|tags?|task|type|kind|model|licen[cs]e|version"
  r"|date|time|timestamp|created(_at)?|status|name|author|index|idx|domain"
  r"|difficulty|level|role|channel|(finish|stop)_reason|object|signature|rejected)",
  re.IGNORECASE,
)


class Fields(dict[str, Any]):
  """An object's keys and values, which remembers the keys that were read."""

  def __init__(self, held: Mapping[str, Any]):
    super().__init__(held)
    self.read: set[str] = set()

  def __getitem__(self, key: str) -> Any:
    self.read.add(key)
    return super().__getitem__(key)

  def get(self, key: str, default: Any = None) -> Any:
    self.read.add(key)
    return super().get(key, default)


def unread(row: Fields) -> list[str]:
  """Keys under which a row or turn has text that nothing has read."""
  names = [key for key in row.keys() - row.read if isinstance(key, str)]
  told = [key for key in names if not _ABOUT.fullmatch(key)]
  return [key for key in told if _holds_text(dict.get(row, key))]


def _holds_text(value: Any, levels: int = 10) -> bool:
  if isinstance(value, Mapping):
    value = list(value.values())
  if isinstance(value, list):
    return levels > 0 and any(_holds_text(one, levels - 1) for one in value)
  return isinstance(value, str) and any(map(str.isalpha, value))


def present(value: Any, where: str) -> Fields:
  """An object's keys; null is a key left out."""
  if not isinstance(value, Mapping):
    raise RowError(where, kind(value), "an object", "Write it as {...}.")
  return Fields({key: held for key, held in value.items() if held is not None})


def only(row: Row, keys: Sequence[str], where: str) -> str:
  """The one of `keys` that the row has; equal values under several are one."""
  found = [key for key in keys if key in row]
  found = found[:1] + [key for key in found[1:] if row[key] != row[found[0]]]
  if len(found) != 1:
    raise RowError(
      where,
      f"{' and '.join(found) or 'none of them'} in {shown(row)}",
      f"exactly one of {', '.join(keys)}" if len(keys) > 1 else f"a {keys[0]}",
      "Rename or drop keys (data.columns) until one is left.",
    )
  return found[0]


def one_of(row: Row, keys: Sequence[str], where: str, default: Any) -> Any:
  """What is under the one of `keys` that the row has; else the default."""
  found = [key for key in keys if key in row]
  return row[only(row, found, where)] if found else default


def text(row: Row, key: str, where: str) -> str:
  """row[key] as a string; '' where it is absent or null."""
  value = row.get(key)
  if value is None:
    return ""
  if not isinstance(value, str):
    got = f"{key} of {kind(value)}"
    raise RowError(where, got, "a string", "Make it a string.")
  return value


def items(row: Row, key: str, where: str) -> list[Any]:
  """row[key] as a list, or as JSON text of one; it must not be empty."""
  value = row.get(key)
  if isinstance(value, str) and value.lstrip().startswith("["):
    value = loads(value, f"{where} {key}")
  if not isinstance(value, list) or not value:
    got = f"{key} of {kind(value)}" if value else f"no {key}"
    raise RowError(where, got, f"a list of {key}", "Fill it or drop the row.")
  return value


def kind(value: Any) -> str:
  return f"type {type(value).__name__}"


def shown(value: Any) -> str:
  """A value for an error: short, in ASCII, without control characters.

  >>> shown({"prompt": "Wie groß?", "history": [["a", "b"]]})
  "{'prompt': 'Wie gro\\\\xdf?', 'history': [1 items]}"
  """
  if isinstance(value, str):
    return ascii(value[:40]) + ("..." if len(value) > 40 else "")
  if isinstance(value, Mapping):
    inner = lambda x: "{...}" if isinstance(x, Mapping) else shown(x)
    first = itertools.islice(value.items(), 12)
    pairs = [f"{shown(key)}: {inner(held)}" for key, held in first]
    return "{" + ", ".join(pairs) + (", ...}" if len(value) > 12 else "}")
  if isinstance(value, list | tuple):
    return f"[{len(value)} items]"
  if value is None or isinstance(value, bool | int | float):
    return repr(value)[:40]
  return kind(value)


def tool_calls(value: Any, where: str) -> tuple[ToolCall, ...]:
  """The calls in a list, in one object, or in either as JSON text."""
  if isinstance(value, str):
    value = loads(value, where) if value.strip() else []
  value = value if isinstance(value, list) else [value]
  return tuple(tool_call(call, where) for call in value)


def tool_call(call: Any, where: str) -> ToolCall:
  """{'function': {'name', 'arguments'}, 'id'?} or the same without wrapping.

  Arguments may be an object or that object as a JSON string; both become the
  object, since templates differ in which of them they can print.
  """
  outer = as_json(call, where) if isinstance(call, Mapping) else {}
  inner = outer.get("function") or outer
  if not isinstance(inner, Mapping) or inner.get("name") is None:
    got = f"a tool call {shown(call)}"
    cure = "Write {'function': {'name': ..., 'arguments': {...}}}."
    raise RowError(where, got, "an object with name and arguments", cure)
  arguments = one_of(inner, ("arguments", "parameters"), where, None)
  if isinstance(arguments, str) and arguments.strip():
    arguments = loads(arguments, where)
  if arguments is None or arguments == "":
    arguments = {}
  if not isinstance(arguments, dict):
    got = f"tool call arguments of {kind(arguments)}"
    cure = "Name every argument: {'city': 'Paris'}."
    raise RowError(where, got, "an object", cure)
  call_id = text(outer, "id", where) or None
  return ToolCall(text(inner, "name", where), arguments, call_id)


def tools(row: Row, where: str) -> tuple[dict[str, Any], ...]:
  """The row's tool schemas; a JSON string of them is read, not rewritten."""
  found = [key for key in ("tools", "functions") if row.get(key)]
  if not found:
    return ()
  value, where_tools = row[only(row, found, where)], f"{where} tools"
  if not isinstance(value, str):
    value = as_json(value, where)
  else:
    absent = value.strip() in ("", "None")
    value = [] if absent else loads(value, where_tools)
  made: list[Any] = []
  for tool in value if isinstance(value, list) else [value] if value else []:
    if isinstance(tool, str) and tool.startswith("{"):
      tool = loads(tool, where_tools)
    declared = isinstance(tool, dict) and tool.get("functionDeclarations")
    made += declared or [tool]
  named = {"name", "function", "type"}
  if not all(isinstance(tool, dict) and named & tool.keys() for tool in made):
    expected = "a list of JSON schemas, each with the name of its function"
    cure = "Write [{'type': 'function', 'function': {'name': ...}}]."
    raise RowError(where, f"tools {shown(made)}", expected, cure)
  return tuple(made)


def as_json(value: Any, where: str) -> Any:
  """The value, if it is what JSON can hold: templates print it as JSON."""
  try:
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
  except (TypeError, ValueError, RecursionError) as error:
    got = f"a value that JSON cannot hold ({error})"
    expected = "objects, lists, strings, numbers, booleans and null"
    raise RowError(
      where, got, expected, "Write it as JSON text, or drop the row."
    ) from None
  return value


def json_text(value: Any, where: str) -> str:
  """A value as JSON text, for where only text can stand."""
  return json.dumps(as_json(value, where), ensure_ascii=False)


def weight(item: Row, where: str) -> float | None:
  """The item's own weight, under any of its names; None where it has none."""
  found = [key for key in WEIGHTS if item.get(key) is not None]
  if not found:
    return None
  value = item[only(item, found, where)]
  # An integer beyond every float is no weight either.
  if isinstance(value, bool | int | float) and value <= 1e308:
    return float(value)
  got = f"weight {shown(value)}"
  raise RowError(where, got, "a number or a boolean", "Correct it.")


def row_weight(row: Row, where: str, names: "Names") -> float | None:
  """A row's own weight; None where it has none.

  A column is a weight for sure under the name loss_weight, or where
  `Source.columns` makes it one. One that happens to be called weight, train or
  training is read within [0, 1] alone, and noted otherwise.
  """
  asked = {"loss_weight", *names.columns.values()}
  read = {}
  for key in WEIGHTS:
    value = row.get(key)
    if key in asked or value is None or in_unit_interval(value):
      read[key] = value
    else:
      names.notes.add(f"{key} not read: not a weight in [0, 1]")
  names.notes.update(key for key in row if str(key).startswith(NO_WEIGHT))
  return weight(read, where)


def in_unit_interval(value: Any) -> bool:
  return isinstance(value, bool | int | float) and 0 <= value <= 1


def spans(item: Row, where: str) -> tuple[tuple[int, int], ...] | None:
  """The characters of content that are trained; None where none are named.

      {"spans": [[0, 5], [7, 9]]}                              [start, end)
      {"train_detail": [{"begin_offset": 0, "end_offset": 4, "train": true},
                        {"begin_offset": 5, "end_offset": 6, "train": false}]}

  The second form is Axolotl's, whose `end_offset` is the last character.
  """
  if "spans" not in item and "train_detail" not in item:
    return None
  key = only(item, ("spans", "train_detail"), where)
  made = []
  listed = item[key] if isinstance(item[key], list) else [item[key]]
  for one in listed:
    if key == "train_detail" and isinstance(one, Mapping):
      start, end, train = map(one.get, ("begin_offset", "end_offset", "train"))
      end = end + 1 if isinstance(end, int) else end
    else:
      start, end = one if isinstance(one, list) and len(one) == 2 else (0, None)
      train = True
    if (type(start), type(end), type(train)) != (int, int, bool):
      expected = "[start, end], or {begin_offset, end_offset, train}"
      cure = "Correct it: both count characters of content."
      raise RowError(where, f"{key} {shown(one)}", expected, cure)
    if train:
      made.append((start, end))
  return tuple(sorted(made))


class Names(NamedTuple):
  """Each maps names of a data set to ours."""

  columns: Mapping[str, str]  # Of a row.
  keys: Mapping[str, str]  # Of a turn.
  roles: Mapping[str, str]  # The values of a turn's role.
  notes: set[str]  # What the ledger says of the row that is read with them.


def to_names(columns: Mapping[str, Any]) -> Names:
  """`Source.columns`, sorted by what they rename.

  >>> to_names({"query": "prompt", "role": {"bot": "assistant"}})[:3]
  ({'query': 'prompt'}, {}, {'bot': 'assistant'})

  `columns`: new names by old ones; under 'messages' those of a turn's keys, and
  under 'role' those of roles.

  Raises ValueError: a new name that is no string, or that two columns share.
  """
  named = [
    x for x in ("messages", "role") if isinstance(columns.get(x), Mapping)
  ]
  inner = {key: dict(columns[key]) for key in named}
  own = {key: new for key, new in columns.items() if key not in inner}
  made = Names(own, inner.get("messages", {}), inner.get("role", {}), set())
  for part in made[:3]:
    news = list(part.values())
    shared = part is not made.roles and len(set(map(str, news))) < len(news)
    if shared or not all(isinstance(new, str) for new in news):
      raise ValueError(
        f"columns of the source: got {dict(columns)!r}; expected new names by "
        "old ones, each once: {'query': 'prompt', 'messages': {'speaker': "
        "'role'}, 'role': {'bot': 'assistant'}}. Correct it."
      )
  return made


def renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
  """A row under our names; a renamed column displaces one of its new name.

  >>> renamed({"q": "2 + 2?", "answer": 4}, {"q": "prompt"})
  {'answer': 4, 'prompt': '2 + 2?'}
  """
  gone = {*names, *names.values()}
  kept = {key: held for key, held in row.items() if key not in gone}
  return kept | {new: row[old] for old, new in names.items() if old in row}
