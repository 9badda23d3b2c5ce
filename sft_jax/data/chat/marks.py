"""Where in a rendering stands what the turns say, found by marking it.

A text is rendered a second time with an invisible mark on either side of all
that is said. Where taking the marks out gives the very text again, they have
changed nothing, and they show to the character what the template has put
where; searching for words that may also stand elsewhere could not.
"""

import json
import re
from typing import NamedTuple

# Marks are characters of Unicode's last private plane, which no text uses; in
# JSON that is pure ASCII they are pairs of escaped surrogates.
_FIRST, _LAST = 0x100000, 0x10FFFD
_MARK = re.compile(
  f"[{chr(_FIRST)}-{chr(_LAST)}]"
  r"|\\udb[cdef][0-9a-f]\\ud[cdef][0-9a-f]{2}"
)
_MOST = (_LAST - _FIRST) // 2


class Piece(NamedTuple):
  """Something said, in a rendering.

  Attributes:
    start, end: its characters, without white space around it.
    part: of `token_roles.TOKEN_ROLES`: who says it.
    said: the text as the row has it; the rendering may have escaped it.
  """

  start: int
  end: int
  part: str
  said: str


class Marks:
  """Marks texts, and finds them again in a rendering.

  Equal texts of one part get equal marks, since templates compare messages.
  White space around a text stays outside, since templates strip it.
  """

  def __init__(self) -> None:
    self._numbers: dict[tuple[str, str], int] = {}
    self._keys: list[tuple[str, str]] = []

  def mark(self, part: str, text: str) -> str:
    """The text with its marks; blank text as it is."""
    core = text.strip()
    if not core or len(self._keys) == _MOST:
      return text
    number = self._numbers.setdefault((part, core), len(self._keys))
    if number == len(self._keys):
      self._keys.append((part, core))
    at = text.index(core)
    opening, closing = chr(_FIRST + 2 * number), chr(_FIRST + 2 * number + 1)
    return text[:at] + opening + core + closing + text[at + len(core) :]

  def find(self, marked: str, text: str) -> list[Piece] | None:
    """What is said in `text`, in order, from the marks in `marked`.

    None where that is not certain: the marks have changed the rendering, or
    the text has such characters of its own.
    """
    pieces, opened, removed = [], {}, 0
    for mark in _MARK.finditer(marked):
      number = ord(_character(mark[0])) - _FIRST
      at = mark.start() - removed
      removed += len(mark[0])
      if number % 2 == 0:
        opened[number // 2] = at
      elif number // 2 < len(self._keys) and number // 2 in opened:
        start = opened.pop(number // 2)
        pieces.append(Piece(start, at, *self._keys[number // 2]))
      else:  # Cut off by the template.
        return None
    if opened or _MARK.search(text) or _MARK.sub("", marked) != text:
      return None
    pieces.sort()
    return pieces


def search(said: list[tuple[str, str]], text: str) -> list[Piece]:
  """Pieces for (part, text) pairs that stand in a rendering exactly once.

  The fallback where marks change a template's mind. Good enough to count by,
  not to train by.
  """
  pieces = []
  for part, one in dict.fromkeys(said):
    core = one.strip()
    if core and text.count(core) == 1:
      at = text.index(core)
      pieces.append(Piece(at, at + len(core), part, core))
  pieces.sort()
  apart = []
  for piece in pieces:
    if not apart or piece.start >= apart[-1].end:
      apart.append(piece)
  return apart


def as_written(said: str, shown: str) -> bool:
  """Whether `shown` is `said`, as it is or as the inside of a JSON string."""
  return (
    shown == said
    or shown == in_json(said)
    or shown == in_json(said, ascii_only=True)
  )


def in_json(said: str, *, ascii_only: bool = False) -> str:
  """A text as it stands between the quotes of a JSON string."""
  return json.dumps(said, ensure_ascii=ascii_only)[1:-1]


def _character(mark: str) -> str:
  return mark if len(mark) == 1 else json.loads(f'"{mark}"')
