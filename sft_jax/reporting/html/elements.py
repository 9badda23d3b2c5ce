"""Elements of a page: text is escaped until it is an element, tables, files.

Text comes from data and models, so it is hostile until escaped: every element
is made by `tag`, which escapes whatever is not already an element. A page
loads nothing and runs nothing.
"""

import html
import os
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_jax.reporting.terminal import visible

_LINE = 40  # Letters of a cell that are not broken into lines.
_PAGE = Path(__file__).with_name("page.html")


class Element(str):
  """Finished HTML, which must not be escaped again."""


def tag(name: str, *children: object, **attributes: object) -> Element:
  """Makes an element; children that are no Element are escaped as text.

  >>> tag('p', 'a < b', tag('b', '&'), class_='x')
  '<p class="x">a &lt; b<b>&amp;</b></p>'
  """
  opening = name
  for key, value in attributes.items():
    key = key.rstrip("_").replace("_", "-")
    opening += f' {key}="{html.escape(visible(value))}"'
  return Element(f"<{opening}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Element:
  """Elements as they are and all else as text, one after the other."""
  return Element(
    "".join(
      child if isinstance(child, Element) else html.escape(text(child))
      for child in children
    )
  )


def text(value: object) -> str:
  """A value as people read it: numbers short, control characters visible."""
  if isinstance(value, float):
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
  if isinstance(value, int) and not isinstance(value, bool):
    return f"{value:,}"
  return visible(value)


def write_page(
  path: str | os.PathLike, title: str, body: Iterable[object]
) -> None:
  """Writes a page, whole or not at all."""
  page = string.Template(_PAGE.read_text(encoding="utf-8"))
  page = page.substitute(title=join([title]), body=join(body))
  partial = Path(f"{os.fspath(path)}.partial")
  partial.write_text(page, encoding="utf-8")
  os.replace(partial, path)


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Element:
  """Columns in which all are numbers stand on the right, others on the left.

  It may be wider than a phone: it scrolls in a frame of its own. Only long
  texts are broken into lines.
  """
  body = [list(row) for row in rows]
  columns = list(zip(*body, strict=True)) or [()] * len(head)
  numbers = [
    bool(column) and all(map(_is_number, column)) for column in columns
  ]

  def line(name: str, cells: Sequence[object]) -> Element:
    made = []
    for cell, number in zip(cells, numbers, strict=True):
      long = not isinstance(cell, Element) and len(str(cell)) > _LINE
      kind = "n" if number else "long" if long else ""
      shown = "" if cell is None else cell
      made.append(tag(name, shown, **({"class_": kind} if kind else {})))
    return tag("tr", *made)

  return tag(
    "div",
    tag(
      "table",
      tag("thead", line("th", head)),
      tag("tbody", *(line("td", row) for row in body)),
    ),
    class_="scroll",
  )


def _is_number(value: object) -> bool:
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return number or value is None


def tiles(facts: Mapping[str, object]) -> Element:
  """Headline figures, each with its name beneath."""
  cards = (
    tag("div", tag("b", value), tag("span", name))
    for name, value in facts.items()
  )
  return tag("div", *cards, class_="tiles")


def sections(parts: Mapping[str, object]) -> Element:
  """Titled parts, and a line of links to them; empty ones are left out."""
  shown = {title: part for title, part in parts.items() if part}
  links = [
    tag("a", title, href=f"#{_anchor(i)}") for i, title in enumerate(shown)
  ]
  return join(
    [
      tag("nav", *links),
      *(
        tag("section", tag("h2", title), part, id=_anchor(i))
        for i, (title, part) in enumerate(shown.items())
      ),
    ]
  )


def _anchor(number: int) -> str:
  return f"part-{number}"


def details(summary: object, *children: object) -> Element:
  """What is folded away until it is asked for."""
  return tag("details", tag("summary", summary), *children)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dicts as {'a.b': value}."""
  found = {}
  for key, value in tree.items():
    if isinstance(value, Mapping) and value:
      found |= flat(value, f"{prefix}{key}.")
    else:
      found[f"{prefix}{key}"] = value
  return found


def pairs(tree: Mapping[str, Any]) -> Element:
  """A table of names and values."""
  rows = ([name, str(value)] for name, value in flat(tree).items())
  return table(["name", "value"], rows)
