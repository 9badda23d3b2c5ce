"""Pages: templates filled with values, all text escaped, written whole.

Text comes from data and models, so it is hostile until escaped: the templates
beside this file, and `tag`, escape every value that is not `Markup`.
"""

import difflib
import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from sft_jax.common import workdir
from sft_jax.reporting.terminal import visible

_LINE = 40  # Letters of a cell that are not broken into lines.
# Below this share of the shorter one's words two texts have nothing to do with
# each other: marks on every word would say less than one line.
_ALIKE = 0.3
# Comparing takes the product of the numbers of words.
_MAX_WORDS = 2000


def text(value: object) -> str:
  """A value as people read it: numbers short, control characters visible."""
  if isinstance(value, Markup):
    return value
  if value is None:
    return ""
  if isinstance(value, float):
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
  if isinstance(value, int) and not isinstance(value, bool):
    return f"{value:,}"
  return visible(value)


def tag(name: str, *children: object, **attributes: object) -> Markup:
  """Makes an element; children that are no Markup are escaped as text.

  >>> tag('p', 'a < b', tag('b', '&'), class_='x')
  Markup('<p class="x">a &lt; b<b>&amp;</b></p>')
  """
  opening = name
  for key, value in attributes.items():
    key = key.rstrip("_").replace("_", "-")
    opening += f' {key}="{escape(visible(value))}"'
  return Markup(f"<{opening}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Markup:
  """Markup as it is and all else as text, one after the other."""
  return Markup("").join(escape(text(child)) for child in children)


def render(template: str, **values: Any) -> Markup:
  """A template of this folder, filled."""
  return Markup(_ENVIRONMENT.get_template(template).render(**values))


def write_page(path: str | os.PathLike, template: str, **values: Any) -> None:
  """Writes a page, whole or not at all."""
  workdir.write_text(path, render(template, **values))


class Table(NamedTuple):
  """A table of a page or of the terminal."""

  title: str  # Above it; '' is none.
  head: Sequence[object]  # Names of the columns.
  # Their cells: numbers, texts or Markup; None is empty.
  rows: Sequence[Sequence[object]]
  note: str = ""  # Below it, in small letters.


def with_classes(
  head: Sequence[object], rows: Iterable[Sequence[object]]
) -> list[list[tuple[str, object]]]:
  """(class, cell) of the head's line and all others: columns of numbers are
  'n'; only long texts, 'long', are broken into lines."""
  body = [list(row) for row in rows]
  number = lambda x: (
    x is None or (isinstance(x, int | float) and not isinstance(x, bool))
  )
  columns = zip(*body, strict=True) if body else [["no rows"]] * len(head)
  numbers = [all(map(number, column)) for column in columns]

  def kind(cell: object, number: bool) -> str:
    long = not isinstance(cell, Markup) and len(str(cell)) > _LINE
    return "n" if number else "long" if long else ""

  pairs = (zip(line, numbers, strict=True) for line in ([*head], *body))
  return [[(kind(cell, number), cell) for cell, number in of] for of in pairs]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dicts as {'a.b': value}."""
  found = {}
  for key, value in tree.items():
    inner = isinstance(value, Mapping) and flat(value, f"{prefix}{key}.")
    found |= inner or {f"{prefix}{key}": value}
  return found


class Marked(NamedTuple):
  # The texts; words only in one are <del> there, <ins> here.
  old: Markup
  new: Markup
  note: str  # What is to be known of them as a whole, '' where marks say it.


def mark(old: str, new: str) -> Marked:
  """Marks the words that only one of two texts has, in their order."""
  plain = functools.partial(Marked, join([old]), join([new]))
  if old == new:
    return plain("the same")
  # Words, spaces and signs, which together are the text.
  a, b = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (old, new))
  if max(len(a), len(b)) > _MAX_WORDS:
    return plain("too long to be compared")
  found = difflib.SequenceMatcher(None, a, b, autojunk=False)
  # Spaces and full stops are in both of any two texts.
  number = lambda words: sum(word[0].isalnum() for word in words)
  blocks = found.get_matching_blocks()
  same = sum(number(a[start : start + size]) for start, _, size in blocks)
  if same < _ALIKE * min(number(a), number(b)):
    return plain("hardly a word in common")
  before, after = [], []
  for kind, a0, a1, b0, b1 in found.get_opcodes():
    left, right = "".join(a[a0:a1]), "".join(b[b0:b1])
    if kind == "equal":
      before.append(left)
      after.append(right)
    else:
      before += [tag("del", left)] if left else []
      after += [tag("ins", right)] if right else []
  return Marked(join(before), join(after), "")


_ENVIRONMENT = jinja2.Environment(
  loader=jinja2.FileSystemLoader(Path(__file__).parent),
  autoescape=True,
  finalize=text,
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
)
_ENVIRONMENT.globals |= {"with_classes": with_classes, "flat": flat}
