"""JSON read strictly: what Python's reader lets through is a fault here.

A key given twice, NaN, a number beyond every float, half a surrogate pair and
very deep nesting all pass `json.loads`, and end as a row that is not the one
that was written, or as a crash further down.
"""

import json
import re
from typing import Any

from sft_jax.data.conversation import RowError

# The longest row, in bytes of its file: some four million tokens. Parsed JSON
# may take thirty times its text, so that this bounds memory too.
MAX_ROW_BYTES = 16 * 2**20
# Levels of lists and objects: tool schemas take about twenty.
MAX_DEPTH = 100

# A lone half of a surrogate pair can only come from an escape.
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class Fault(Exception):
  """(got, expected, cure) of JSON that is well formed and still refused."""


def loads(text: str, where: str) -> Any:
  """The value of a JSON text.

  Raises:
    RowError: text that is not JSON, with its column (and line, where it has
      several); a key given twice; NaN or infinity; half a surrogate pair;
      integers of thousands of digits; more than `MAX_DEPTH` levels.
  """
  try:
    value, end = decode(text, skip_space(text, 0))
    if skip_space(text, end) != len(text):
      raise json.JSONDecodeError("extra data", text, skip_space(text, end))
  except json.JSONDecodeError as error:
    line = f" line {error.lineno}" if "\n" in text else ""
    raise syntax_error(error, f"{where}{line} column {error.colno}") from None
  except Fault as fault:
    raise RowError(where, *fault.args) from None
  return value


def decode(text: str, start: int) -> tuple[Any, int]:
  """The value that begins at `start`, and where it ends.

  Raises:
    json.JSONDecodeError: no value is complete there.
    Fault: it is complete, or breaks off too deep, and is refused.
  """
  try:
    value, end = _DECODER.raw_decode(text, start)
  except RecursionError:
    raise _TOO_DEEP from None
  except json.JSONDecodeError:
    raise
  except ValueError:
    # Of Python's limit on digits, which keeps conversion from hanging.
    raise Fault(
      "an integer of thousands of digits",
      "a number of ordinary size",
      "Write it as a string, or drop the row.",
    ) from None
  nested = text.count("[", start, end) + text.count("{", start, end)
  if nested > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
    raise _TOO_DEEP
  if _SURROGATE_ESCAPE.search(text, start, end):
    _refuse_half_pairs(value)
  return value, end


def find_end(text: str, start: int) -> int | None:
  """Where the value that `decode` refused ends; None if not in this text.

  It counts brackets and does not recurse, so that any depth is stepped over.
  """
  depth = 0
  for token in _TOKEN.finditer(text, start):
    if token[0] == '"':
      return None  # A string that is not closed.
    depth += (token[0] in "[{") - (token[0] in "]}")
    if depth <= 0:
      return token.end()
  return None


def skip_space(text: str, start: int) -> int:
  """The first position from `start` on that holds no space."""
  return _SPACE.match(text, start).end()  # pyright: ignore[reportOptionalMemberAccess]


def too_long(where: str) -> RowError:
  """What is wrong with a row of more than `MAX_ROW_BYTES`."""
  return RowError(
    where,
    f"a row of more than {MAX_ROW_BYTES // 2**20} MiB",
    f"rows of at most {MAX_ROW_BYTES // 2**20} MiB",
    "Cut it into several rows.",
  )


def syntax_error(error: json.JSONDecodeError, where: str) -> RowError:
  """What is wrong with a text that is not JSON, as a RowError."""
  near = error.doc[max(0, error.pos - 10) : error.pos + 20]
  return RowError(
    where,
    f"{error.msg.lower()} at {near!r}",
    "valid JSON",
    "Mend or drop the row.",
  )


_TOO_DEEP = Fault(
  "JSON nested too deep", f"at most {MAX_DEPTH} levels", "Drop the row."
)
_SPACE = re.compile(r"[ \t\n\r]*+")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}"]|[^\s"\[\]{},:]++', re.DOTALL)


def _is_deeper(value: Any, levels: int) -> bool:
  containers = [value] if isinstance(value, dict | list) else []
  while containers and levels > 0:
    levels -= 1
    containers = [
      inner
      for held in containers
      for inner in (held.values() if isinstance(held, dict) else held)
      if isinstance(inner, dict | list)
    ]
  return bool(containers)


def _refuse_half_pairs(value: Any) -> None:
  # Whole pairs became one character in reading; halves cannot be encoded.
  try:
    json.dumps(value, ensure_ascii=False).encode()
  except UnicodeEncodeError as error:
    raise Fault(
      f"half a surrogate pair ({error.object[error.start]!r})",
      "whole characters",
      "Mend the escape or drop the row.",
    ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  made = dict(pairs)
  if len(made) != len(pairs):
    seen = set()
    for key, _ in pairs:
      if key in seen:
        raise Fault(
          f"the key {key!r} twice in one object",
          "each key once",
          "Keep one of the two values.",
        )
      seen.add(key)
  return made


def _no_constant(name: str) -> Any:
  raise Fault(name, "a JSON number", "Replace it: JSON has no such value.")


def _float(text: str) -> float:
  value = float(text)
  if value in (float("inf"), float("-inf")):
    raise Fault(
      f"the number {text[:40]}", "a number that fits a float", "Correct it."
    )
  return value


# Made once: making a decoder takes longer than reading a short row.
_DECODER = json.JSONDecoder(
  object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_float
)
