"""The report of a run: plain values in, one self-contained HTML page out.

The page loads nothing, runs nothing and works offline, in light and dark.
Text comes from data and models, so it is hostile until escaped: every element
is made by `tag`, which escapes whatever is not already an element.
"""

import html
import math
import os
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Points = Sequence[tuple[float | int, float | int | None]]

# Control characters are shown (␛ for an escape) rather than obeyed or lost.
_VISIBLE = {i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n"}
_PAGE = Path(__file__).parent / "assets" / "report.html"
_MAX_POINTS = 500  # Of one curve; more than its pixels.


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
    opening += f' {key}="{html.escape(str(value))}"'
  return Element(f"<{opening}>{_join(children)}</{name}>")


def _join(children: Iterable[object]) -> Element:
  return Element(
    "".join(
      child if isinstance(child, Element) else html.escape(_text(child))
      for child in children
    )
  )


def _text(value: object) -> str:
  """A value as people read it; numbers short, control characters visible."""
  if isinstance(value, float):
    return f"{value:.4g}"
  if isinstance(value, int) and not isinstance(value, bool):
    return f"{value:,}"
  return str(value).translate(_VISIBLE)


def write(path: str | os.PathLike, run: Mapping[str, Any]) -> None:
  """Writes the page, whole or not at all. Every key is optional.

      title     text
      summary   {label: value}, the headline figures
      notes     [text]: whatever a reader must know, fallbacks first
      metrics   [{'step': n, name: number, ...}], rows of metrics.jsonl
      curves    {title: [name in metrics, ...]}, one chart each
      scores    [{'group': name, 'n': n, 'before': (rate, low, high) or None,
                  'after': (rate, low, high)}], shares with 95 % intervals
      samples   [{'group': name, 'prompt': text, 'before': reply or None,
                  'after': reply}], reply: {'text', 'passed', 'stopped'}
      ledger    {'sources': {source: counts}, 'epoch': counts or None}, as in
                ledger.json; counts may nest, 'places' lists rows by reason
      config    nested dict
      versions  {name: version}

  Raises:
    ValueError: a key that is not in this list.
  """
  known = ["title", "summary", "notes", "metrics", "curves", *_SECTIONS]
  if unknown := sorted(run.keys() - set(known)):
    raise ValueError(
      f"report.write: run has {unknown}; expected keys of {known}. Remove or "
      "rename them: what the page leaves out would be lost in silence."
    )
  title = run.get("title", "Supervised fine-tuning")
  tiles = (
    tag("div", tag("b", value), tag("span", label))
    for label, value in run.get("summary", {}).items()
  )
  parts = [tag("h1", title), tag("div", *tiles, class_="tiles")]
  parts += [tag("p", note, class_="note") for note in run.get("notes", ())]
  rows = run.get("metrics", ())
  for name, keys in run.get("curves", {}).items():
    series = {
      key: [(row["step"], row[key]) for row in rows if key in row]
      for key in keys
    }
    parts += [tag("h2", name), chart(name, series)]
  for key, (name, section) in _SECTIONS.items():
    if run.get(key):
      parts += [tag("h2", name), section(run[key])]
  page = string.Template(_PAGE.read_text(encoding="utf-8"))
  page = page.substitute(title=_join([title]), body=_join(parts))
  partial = Path(f"{os.fspath(path)}.partial")
  # A lone surrogate, which a model may emit, has no UTF-8: it is spelled out.
  partial.write_text(page, encoding="utf-8", errors="backslashreplace")
  os.replace(partial, path)


def _ticks(low: float, high: float, n: int = 5) -> list[float]:
  """About n round numbers that lie in [low, high]."""
  step = (high - low) / n
  size = 10.0 ** math.floor(math.log10(step))
  size *= next(m for m in (1, 2, 5, 10) if m * size >= step)
  first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
  return [i * size for i in range(first, last + 1)]


def _thin(points: list) -> tuple[list, int]:
  """Means of k neighbours, so that few enough remain; and k."""
  k = -(-len(points) // _MAX_POINTS) or 1
  groups = [points[i : i + k] for i in range(0, len(points), k)]
  return [[sum(c) / len(g) for c in zip(*g, strict=True)] for g in groups], k


def chart(label: str, series: Mapping[str, Points]) -> Element:
  """Curves over steps as SVG; points not finite are counted, not drawn."""
  width, height, left, bottom, top = 720, 260, 56, 28, 10
  drawn, legend = {}, []
  for i, (name, points) in enumerate(series.items()):
    fine = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    drawn[name], k = _thin(fine)
    text = f"{name}: " + (f"last {fine[-1][1]:.4g}" if fine else "no points")
    if k > 1:
      text += f", means of {k}"
    if lost := len(points) - len(fine):
      text += f", {lost} not finite"
    legend.append(tag("span", text, class_=f"c{i % 4}"))
  xs = [x for points in drawn.values() for x, _ in points]
  ys = [y for points in drawn.values() for _, y in points]
  if not xs:
    return tag("p", *legend, class_="legend")
  x0, x1 = min(xs), max(xs) + (min(xs) == max(xs))
  y0, y1 = min(ys), max(ys)
  if y0 == y1:
    y0, y1 = y0 - (abs(y0) or 1), y1 + (abs(y1) or 1)

  def px(x: float) -> str:
    return f"{left + (x - x0) / (x1 - x0) * (width - left - 10):.1f}"

  def py(y: float) -> str:
    return f"{top + (y1 - y) / (y1 - y0) * (height - bottom - top):.1f}"

  parts = []
  for y in _ticks(y0, y1):
    parts += [
      tag("line", x1=left, x2=width - 10, y1=py(y), y2=py(y), class_="grid"),
      tag("text", f"{y:.4g}", x=left - 8, y=py(y), class_="y"),
    ]
  for x in _ticks(x0, x1):
    parts.append(tag("text", f"{x:,g}", x=px(x), y=height - 8, class_="x"))
  for i, (name, points) in enumerate(drawn.items()):
    line = " ".join(f"{px(x)},{py(y)}" for x, y in points)
    kind = f"s{i % 4}"
    if len(points) == 1:  # A line of one point would not show.
      x, y = points[0]
      parts.append(tag("circle", cx=px(x), cy=py(y), r=3, class_=kind))
    parts.append(tag("polyline", tag("title", name), points=line, class_=kind))
  svg = tag(
    "svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label
  )
  return tag("figure", svg, tag("figcaption", *legend, class_="legend"))


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Element:
  """Numbers stand on the right, all else on the left."""

  def cell(value: object) -> Element:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return tag("td", value, **({"class_": "n"} if number else {}))

  body = [tag("tr", *map(cell, row)) for row in rows]
  header = tag("tr", *(tag("th", name) for name in head))
  table = tag("table", tag("thead", header), tag("tbody", *body))
  return tag("div", table, class_="scroll")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dicts as {'a.b': value}."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping) and value:
      flat |= _flat(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def _pairs(tree: Mapping[str, Any]) -> Element:
  return _table(["key", "value"], ([k, str(v)] for k, v in _flat(tree).items()))


def _ledger(ledger: Mapping[str, Any]) -> Element:
  """One row per source; a column for whatever any of them counted."""
  flat, places = {}, []
  for source, counts in ledger["sources"].items():
    counts = dict(counts)
    for reason, where in counts.pop("places", {}).items():
      text = f"{source}, {reason}: {', '.join(map(str, where))}"
      places.append(tag("p", text, class_="dim"))
    flat[source] = {k: n for k, n in _flat(counts).items() if n != {}}
  columns = dict.fromkeys(key for row in flat.values() for key in row)
  rows = ([s, *(row.get(c, 0) for c in columns)] for s, row in flat.items())
  parts = [_table(["source", *columns], rows), *places]
  if epoch := ledger.get("epoch"):
    table = _table(list(epoch), [list(epoch.values())])
    parts += [tag("p", "One epoch, packed:"), table]
  return _join(parts)


def _interval(
  before: Sequence[float] | None, after: Sequence[float]
) -> Element:
  """Both shares on a line from 0 to 1, with their intervals."""
  parts = [tag("line", x1=4, x2=164, y1=12, y2=12, class_="grid")]
  for share, y, kind in ((before, 8, "s3"), (after, 16, "s0")):
    if share is not None:
      x, low, high = (4 + 160 * float(s) for s in share)
      parts += [
        tag("line", x1=low, x2=high, y1=y, y2=y, class_=kind),
        tag("circle", cx=x, cy=y, r=3.5, class_=kind),
      ]
  return tag("svg", *parts, viewBox="0 0 168 24", class_="interval")


def _scores(scores: Sequence[Mapping[str, Any]]) -> Element:
  def share(s: Sequence[float] | None) -> str:
    return f"{s[0]:.0%} ({s[1]:.0%} to {s[2]:.0%})" if s else ""

  def change(before: Sequence[float] | None, after: Sequence[float]) -> Element:
    if before is None:
      return Element("")
    text = f"{100 * (after[0] - before[0]):+.0f} points"
    if after[1] > before[2]:
      return tag("span", text, class_="good")
    if after[2] < before[1]:
      return tag("span", text, class_="bad")
    return tag("span", f"{text}, intervals overlap", class_="dim")

  return _table(
    ["group", "n", "before", "after", "change", "before ○ after ●, 0 to 100 %"],
    (
      [s["group"], s["n"], share(b), share(a), change(b, a), _interval(b, a)]
      for s in scores
      for b, a in [(s.get("before"), s["after"])]
    ),
  )


def _samples(samples: Sequence[Mapping[str, Any]]) -> Element:
  def reply(name: str, r: Mapping[str, Any]) -> Element:
    marks = [tag("span", name, class_="dim")]
    if (passed := r.get("passed")) is not None:
      word, kind = ("passed", "good") if passed else ("failed", "bad")
      marks.append(tag("span", word, class_=kind))
    if r.get("stopped") is False:
      marks.append(tag("span", "did not stop", class_="bad"))
    return tag("div", tag("p", *marks), tag("pre", r["text"]))

  cards = []
  for s in samples:
    replies = [reply(k, s[k]) for k in ("before", "after") if s.get(k)]
    prompt = tag("pre", s["prompt"], class_="prompt")
    group = tag("p", s.get("group", ""), class_="dim")
    pair = tag("div", *replies, class_="pair")
    cards.append(tag("article", group, prompt, pair))
  return tag("div", *cards)


_SECTIONS = {
  "scores": ("Behaviour, before and after", _scores),
  "samples": ("Replies, side by side", _samples),
  "ledger": ("Data ledger", _ledger),
  "config": ("Config", _pairs),
  "versions": ("Versions", _pairs),
}
