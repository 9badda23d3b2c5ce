"""A JSON array read value by value, so that memory does not grow with it."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from sft_jax.data.conversation import RowError
from sft_jax.data.readers import strict_json


def read_array(
  texts: Iterator[str], name: str, on_bad_row: Callable[[RowError], None]
) -> Iterator[tuple[str, Any]]:
  """Yields ('rows.json[3]', value) for each value of an array.

  Args:
    texts: the pieces of the text, cut anywhere, none of them empty.
    name: of the file, for errors.
    on_bad_row: called with the fault of a value that is well formed but
      refused (a key given twice, NaN, ...); where it returns, the value is
      stepped over.

  Raises:
    RowError: text that is not a JSON array, with line and column. What comes
      after such a place cannot be told into values.
  """
  window = _Window(texts, name)
  window.skip("[")
  index = 0
  while not window.skip("]", required=False):
    if index:
      window.skip(",")
    where = f"{name}[{index}]"
    try:
      value = window.value(where)
    except strict_json.Fault as fault:
      window.skip_value(where)
      on_bad_row(RowError(where, *fault.args))
    else:
      yield where, value
    index += 1
  window.end()


class _Window:
  """What is held of a text, and how far it has been read."""

  def __init__(self, texts: Iterator[str], name: str):
    self._texts = texts
    self._name = name
    self._text = ""
    self._at = 0
    # Of the first character held, for errors.
    self._line, self._column = 1, 1

  def skip(self, mark: str, *, required: bool = True) -> bool:
    """Steps over spaces, and over `mark` if it comes next."""
    self._skip_space()
    if self._text.startswith(mark, self._at):
      self._at += 1
      return True
    if required:
      raise self._fault(f"expecting {mark!r}", self._at)
    return False

  def value(self, where: str) -> Any:
    """Reads the next value; a Fault leaves it to `skip_value`."""
    self._skip_space()
    while True:
      try:
        value, end = strict_json.decode(self._text, self._at)
      except json.JSONDecodeError as error:
        self._check_length(where)
        if not self._read_on():
          raise self._fault(error.msg, error.pos) from None
        continue
      # At the edge of what is held, 12 may be the beginning of 123.
      if end < len(self._text) or not self._read_on():
        self._at = end
        return value

  def skip_value(self, where: str) -> None:
    """Steps over a value that was refused."""
    while True:
      end = strict_json.find_end(self._text, self._at)
      if end is not None and (end < len(self._text) or not self._read_on()):
        self._at = end
        return
      if end is None:
        self._check_length(where)
        if not self._read_on():
          raise self._fault("a value that does not end", self._at)

  def end(self) -> None:
    """Refuses anything but spaces after the array."""
    self._skip_space()
    if self._at < len(self._text):
      raise self._fault("extra data", self._at)

  def _skip_space(self) -> None:
    self._at = strict_json.skip_space(self._text, self._at)
    while self._at == len(self._text) and self._read_on():
      self._at = strict_json.skip_space(self._text, self._at)

  def _read_on(self) -> bool:
    """Doubles what is held, having dropped what was read; False at the end."""
    pieces, length = [], 0
    while length <= len(self._text) - self._at:
      if not (piece := next(self._texts, "")):
        break
      pieces.append(piece)
      length += len(piece)
    if pieces:
      self._line, self._column = self._position(self._at)
      self._text = self._text[self._at :] + "".join(pieces)
      self._at = 0
    return bool(pieces)

  def _check_length(self, where: str) -> None:
    # In characters, which take a byte at least.
    if len(self._text) - self._at > strict_json.MAX_ROW_BYTES:
      raise strict_json.too_long(where)

  def _position(self, at: int) -> tuple[int, int]:
    lines = self._text.count("\n", 0, at)
    if not lines:
      return self._line, self._column + at
    return self._line + lines, at - self._text.rfind("\n", 0, at)

  def _fault(self, message: str, at: int) -> RowError:
    line, column = self._position(at)
    return strict_json.syntax_error(
      json.JSONDecodeError(message, self._text, at),
      f"{self._name} line {line} column {column}",
    )
