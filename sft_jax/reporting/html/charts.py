"""Charts as inline SVG: curves over steps, intervals, bars."""

import math
from collections.abc import Iterable, Mapping, Sequence

from sft_jax.reporting.html.elements import Element, tag

Points = Sequence[tuple[float | int, float | int | None]]
# A share and the ends of its interval.
Share = Sequence[float]

# Drawn small, so that it can be read on a phone: the letters shrink with it.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 220, 52, 10, 10, 26
_MAX_POINTS = 300  # Of one curve; as many as can be told apart.
COLOURS = 6  # s0 to s5 of page.html.


def chart(
  label: str,
  series: Mapping[str, Points],
  marks: Iterable[tuple[int, str]] = (),
) -> Element:
  """Curves over steps; points that are not finite are counted, not drawn.

  Args:
    label: what it shows, its heading.
    series: (step, value) of each curve.
    marks: (step, what happened there), dotted lines.
  """
  drawn, legend = {}, []
  for i, (name, points) in enumerate(series.items()):
    fine = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    drawn[name], k = _thin(fine)
    said = f"{name}: " + (f"last {fine[-1][1]:.4g}" if fine else "no points")
    if k > 1:
      said += f", means of {k}"
    if lost := len(points) - len(fine):
      said += f", {lost} not finite"
    legend.append(tag("span", said, class_=f"c{i % COLOURS}"))
  heading = tag("h3", label)
  caption = tag("figcaption", *legend, class_="legend")
  xs = [x for points in drawn.values() for x, _ in points]
  ys = [y for points in drawn.values() for _, y in points]
  if not xs:
    return tag("figure", heading, caption)
  x0, x1 = min(xs), max(xs) + (min(xs) == max(xs))
  y0, y1 = min(ys), max(ys)
  if y0 == y1:
    y0, y1 = y0 - (abs(y0) or 1), y1 + (abs(y1) or 1)

  def px(x: float) -> str:
    return f"{_LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT):.1f}"

  def py(y: float) -> str:
    return f"{_TOP + (y1 - y) / (y1 - y0) * (_HEIGHT - _BOTTOM - _TOP):.1f}"

  parts = []
  for y in _ticks(y0, y1):
    ends = {"x1": _LEFT, "x2": _WIDTH - _RIGHT, "y1": py(y), "y2": py(y)}
    parts += [
      tag("line", **ends, class_="grid"),
      tag("text", _tick(y), x=_LEFT - 6, y=py(y), class_="y"),
    ]
  for x in _ticks(x0, x1):
    if x != round(x):  # There is no half step.
      continue
    # Half a number would stand beyond the edge.
    end = " last" if float(px(x)) > _WIDTH - 30 else ""
    place = {"x": px(x), "y": _HEIGHT - 8}
    parts.append(tag("text", f"{x:,g}", **place, class_=f"x{end}"))
  for x, what in marks:
    if x0 <= x <= x1:
      ends = {"x1": px(x), "x2": px(x), "y1": _TOP, "y2": _HEIGHT - _BOTTOM}
      note = tag("title", f"{what}, step {x}")
      parts.append(tag("line", note, **ends, class_="mark"))
  for i, (name, points) in enumerate(drawn.items()):
    kind = f"s{i % COLOURS}"
    if len(points) == 1:  # A line of one point would not show.
      x, y = points[0]
      parts.append(tag("circle", cx=px(x), cy=py(y), r=3, class_=kind))
    line = " ".join(f"{px(x)},{py(y)}" for x, y in points)
    parts.append(tag("polyline", tag("title", name), points=line, class_=kind))
  svg = _svg(parts, _WIDTH, _HEIGHT, label)
  return tag("figure", heading, svg, caption)


def intervals(
  shares: Sequence[Share | None], label: str, kinds: Sequence[str] = ()
) -> Element:
  """Shares on lines from 0 to 1, one beneath the other, with intervals.

  Args:
    shares: None leaves a line empty.
    label: what they are.
    kinds: class of each, its colour; by default those of `chart`'s curves.
  """
  height = 8 * len(shares) + 8
  middle = height / 2
  parts = [tag("line", x1=4, x2=164, y1=middle, y2=middle, class_="grid")]
  for i, share in enumerate(shares):
    if share is not None:
      x, low, high = (f"{4 + 160 * float(s):.1f}" for s in share)
      kind, y = kinds[i] if kinds else f"s{i % COLOURS}", 8 + 8 * i
      parts += [
        tag("line", x1=low, x2=high, y1=y, y2=y, class_=kind),
        tag("circle", cx=x, cy=y, r=3.5, class_=kind),
      ]
  return _svg(parts, 168, height, label, "interval")


def bars(label: str, values: Mapping[str, float]) -> Element:
  """Horizontal bars of shares from 0 to 1, each with its name and figure."""
  rows = []
  for name, share in values.items():
    bar = tag("rect", x=0, y=0, width=f"{100 * share:.1f}", height=10)
    svg = _svg([bar], 100, 10, f"{name}: {share:.1%}", "bar")
    rows += [tag("span", name), svg, tag("span", f"{share:.1%}", class_="n")]
  return tag("div", *rows, class_="bars", role="group", aria_label=label)


def histogram(label: str, bins: Sequence[tuple[str, str, int]]) -> Element:
  """Bars of equal width over (where it begins, what it is, how many)."""
  tallest = max(number for *_, number in bins)
  step = _WIDTH / len(bins)
  parts = []
  for i, (start, what, number) in enumerate(bins):
    tall = number / tallest * (_HEIGHT - 80)
    if number:
      tall = max(tall, 1)  # One example among thousands is still there.
    place = {
      "x": f"{i * step + 1:.1f}",
      "y": f"{_HEIGHT - 70 - tall:.1f}",
      "width": f"{step - 2:.1f}",
      "height": f"{tall:.1f}",
    }
    note = tag("title", f"{what}: {number:,}")
    parts.append(tag("rect", note, **place))
    if i % max(len(bins) // 6, 1) == 0:
      at = {"x": f"{(i + 0.5) * step:.1f}", "y": _HEIGHT - 54}
      parts.append(tag("text", start, **at, class_="x"))
  return _svg(parts, _WIDTH, _HEIGHT - 50, label)


def _svg(
  parts: Iterable[Element], width: float, height: float, label: str, kind=""
) -> Element:
  box = f"0 0 {width:g} {height:g}"
  more = {"class_": kind} if kind else {}
  if kind == "bar":
    more["preserveAspectRatio"] = "none"
  return tag("svg", *parts, viewBox=box, role="img", aria_label=label, **more)


def _ticks(low: float, high: float, n: int = 5) -> list[float]:
  """About n round numbers that lie in [low, high]."""
  step = (high - low) / n
  size = 10.0 ** math.floor(math.log10(step))
  size *= next(m for m in (1, 2, 5, 10) if m * size >= step)
  first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
  return [i * size for i in range(first, last + 1)]


def _tick(y: float) -> str:
  """Short enough for the margin: '2 M', '15 k', '0.25'."""
  for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
    if abs(y) >= size:
      return f"{y / (1e3 if unit == ' k' else size):.4g}{unit}"
  return f"{y:.4g}"


def _thin(points: list) -> tuple[list, int]:
  """Means of k neighbours, so that few enough remain; and k."""
  k = -(-len(points) // _MAX_POINTS) or 1
  groups = [points[i : i + k] for i in range(0, len(points), k)]
  return [[sum(c) / len(g) for c in zip(*g, strict=True)] for g in groups], k
