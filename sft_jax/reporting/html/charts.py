"""Charts as inline SVG: curves over steps, intervals, bars, histograms.

Whatever is in the records of a run is drawn: a name that no chart of `CHARTS`
takes is in a chart of its own family, so that no new metric is lost.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from sft_jax.reporting.html.elements import tag

Records = Sequence[Mapping[str, Any]]

Points = Sequence[tuple[float | int, float | int | None]]
# A share and the ends of its interval.
Share = Sequence[float]

# Drawn small, so that it can be read on a phone: the letters shrink with it.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 250, 52, 10, 26, 44
_MAX_POINTS = 300  # Of one curve; as many as can be told apart.
COLORS = 6  # s0 to s5 of page.html.jinja.

# (title, unit, regex of names), the first that fits; what is open at once.
CHARTS = (
  ("Loss", "nats per token", r"(loss|held_out)/nats_per_token"),
  ("Accuracy", "share", r"acc/(token|stop_token)|held_out/acc/token"),
  ("Learning rate", "", r"optim/learning_rate"),
  ("Gradient norm", "", r"optim/grad_norm"),
  ("Behavior", "share passed", r"behavior/all/(pass_rate|stopped)"),
  ("Speed", "tokens per second", r"speed/(trained_)?tokens_per_s"),
  ("Time of a step", "seconds", r"time/(step|data_wait|compute)_s"),
  ("Memory", "bytes", r"memory/.+_bytes"),
)
# Units of all other names, by how they begin or end.
_UNITS = (
  ("nats", r".*(nats|nats_per_token)|(.*/)?loss/.*|.*/(kl|gap)"),
  ("share", r"(.*/)?acc/.*|behavior/.*|.*/(fill|mfu|goodput|.*fraction)"),
  ("per second", r".*_per_s"),
  ("seconds", r".*_s"),
  ("bytes", r".*_bytes"),
  ("tokens", r".*tokens|.*trained_weight"),
)


def chart(
  label: str,
  series: Mapping[str, Points],
  marks: Iterable[tuple[int, str]] = (),
  unit: str = "",
) -> Markup:
  """Curves over steps; points that are not finite are counted, not drawn. Of
  `marks`, (step, what happened there); `unit` is named at the values' axis."""
  drawn, legend = {}, []
  for i, (name, points) in enumerate(series.items()):
    fine = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    # Means of k neighbors, so that few enough remain.
    k = -(-len(fine) // _MAX_POINTS) or 1
    groups = [np.mean(fine[j : j + k], 0) for j in range(0, len(fine), k)]
    drawn[name] = [group.tolist() for group in groups]
    last = _tick_of(abs(fine[-1][1]))(fine[-1][1]) if fine else ""
    said = f"{name}: " + (f"last {last}" if fine else "no points")
    if k > 1:
      said += f", means of {k}"
    if lost := len(points) - len(fine):
      said += f", {lost} not finite"
    legend.append(tag("span", said, class_=f"c{i % COLORS}"))
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
  px, py, parts = _axes((x0, x1, "step"), (y0, y1, unit))
  for x, what in marks:
    if x0 <= x <= x1:
      ends = {"x1": px(x), "x2": px(x), "y1": _TOP, "y2": _HEIGHT - _BOTTOM}
      note = tag("title", f"{what}, step {x}")
      parts.append(tag("line", note, **ends, class_="mark"))
  for i, (name, points) in enumerate(drawn.items()):
    kind = f"s{i % COLORS}"
    if len(points) == 1:  # A line of one point would not show.
      x, y = points[0]
      parts.append(tag("circle", cx=px(x), cy=py(y), r=3, class_=kind))
    line = " ".join(f"{px(x)},{py(y)}" for x, y in points)
    parts.append(tag("polyline", tag("title", name), points=line, class_=kind))
  svg = _svg(parts, _WIDTH, _HEIGHT, label)
  return tag("figure", heading, svg, caption)


def intervals(
  shares: Sequence[Share | None], label: str, kinds: Sequence[str] = ()
) -> Markup:
  """Shares on lines from 0 to 1, one beneath the other, with intervals; None
  leaves a line empty, and `kinds` are classes in place of the curves'."""
  height = 8 * len(shares) + 8
  middle = height / 2
  parts = [tag("line", x1=4, x2=164, y1=middle, y2=middle, class_="grid")]
  for i, share in enumerate(shares):
    if share is not None:
      x, low, high = (f"{4 + 160 * float(s):.1f}" for s in share)
      kind, y = kinds[i] if kinds else f"s{i % COLORS}", 8 + 8 * i
      parts += [
        tag("line", x1=low, x2=high, y1=y, y2=y, class_=kind),
        tag("circle", cx=x, cy=y, r=3.5, class_=kind),
      ]
  return _svg(parts, 168, height, label, "interval")


def bars(label: str, values: Mapping[str, float]) -> Markup:
  """Horizontal bars of shares from 0 to 1, each with its name and figure."""
  rows = []
  for name, share in values.items():
    bar = tag("rect", x=0, y=0, width=f"{100 * share:.1f}", height=10)
    svg = _svg([bar], 100, 10, f"{name}: {share:.1%}", "bar")
    rows += [tag("span", name), svg, tag("span", f"{share:.1%}", class_="n")]
  return tag("div", *rows, class_="bars", role="group", aria_label=label)


def histogram(
  label: str, bins: Sequence[tuple[float, float, int]], unit: str
) -> Markup:
  """Bars over bins (from, to, how many) of one width, with a scale beneath."""
  tallest = max(number for *_, number in bins)
  low, high = bins[0][0], bins[-1][1]
  px, py, parts = _axes((low, high, unit), (0, tallest, "examples"))
  floor = float(py(0))
  for start, end, number in bins:
    # One example among thousands is still there.
    tall = max(floor - float(py(number)), 1) if number else 0
    left, right = float(px(start)) + 0.5, float(px(end)) - 0.5
    box = {"x": left, "y": floor - tall, "width": max(right - left, 1)}
    box = {key: f"{x:.1f}" for key, x in {**box, "height": tall}.items()}
    note = tag("title", f"{start:,.4g} to {end:,.4g} {unit}: {number:,}")
    parts.append(tag("rect", note, **box))
  svg = _svg(parts, _WIDTH, _HEIGHT, label)
  return tag("figure", tag("h3", label), svg)


def scatter(
  label: str, groups: Mapping[str, Sequence[Sequence[float]]]
) -> Markup:
  """Points (x, y) of a plane without units, in four groups: the first is at the
  back, and pale, the last is of crosses."""
  every = np.array([point for points in groups.values() for point in points])
  low, high = every.min(axis=0), every.max(axis=0)
  scale = np.array([_WIDTH - 16, _HEIGHT - 16]) / np.maximum(high - low, 1e-9)
  parts, legend = [], []
  kinds = zip(groups.items(), ("old", "s0", "s3", "s1"), "●●●✕", strict=True)
  for (name, points), kind, shape in kinds:
    for x, y in (np.array(points).reshape(-1, 2) - low) * scale + 8:
      a, b = f"{x:.1f}", f"{_HEIGHT - y:.1f}"
      mark = tag("circle", cx=a, cy=b, r=2.5, class_=kind)
      if shape == "✕":
        line = f"M{a} {b}m-4 -4l8 8m0 -8l-8 8"
        mark = tag("path", d=line, class_=f"{kind} cross")
      parts.append(mark)
    said = f"{shape} {name}: {len(points):,}"
    legend.append(tag("span", said, class_=kind.replace("s", "c")))
  svg = _svg(parts, _WIDTH, _HEIGHT, label)
  caption = tag("figcaption", *legend, class_="legend")
  return tag("figure", tag("h3", label), svg, caption)


def _svg(
  parts: Iterable[Markup], width: float, height: float, label: str, kind=""
) -> Markup:
  box = f"0 0 {width:g} {height:g}"
  more = {"class_": kind} if kind else {}
  if kind == "bar":
    more["preserveAspectRatio"] = "none"
  return tag("svg", *parts, viewBox=box, role="img", aria_label=label, **more)


Axis = tuple[float, float, str]


def _axes(
  x: Axis, y: Axis
) -> tuple[Callable[[float], str], Callable[[float], str], list[Markup]]:
  """Where an x and a y stand, and the axes drawn, each (from, to, what it is),
  with round ticks; there is no half step and no half example."""
  (x0, x1, x_name), (y0, y1, y_name) = x, y
  wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _BOTTOM - _TOP
  px = lambda x: f"{_LEFT + (x - x0) / (x1 - x0) * wide:.1f}"
  py = lambda y: f"{_TOP + (y1 - y) / (y1 - y0) * tall:.1f}"
  whole = lambda name, value: (
    name not in ("step", "examples") or value == round(value)
  )
  middle = (_LEFT + _WIDTH) // 2
  parts = [tag("text", x_name, x=middle, y=_HEIGHT - 6, class_="axis")]
  if y_name:
    parts.append(tag("text", y_name, x=4, y=14))
  tick = _tick_of(max(abs(y0), abs(y1)))
  for value in _ticks(y0, y1):
    if whole(y_name, value):
      at = py(value)
      ends = {"x1": _LEFT, "x2": _WIDTH - _RIGHT, "y1": at, "y2": at}
      parts += [
        tag("line", **ends, class_="grid"),
        tag("text", tick(value), x=_LEFT - 6, y=at, class_="y"),
      ]
  tick = _tick_of(max(abs(x0), abs(x1)))
  for value in _ticks(x0, x1):
    if whole(x_name, value):
      # Half a number would stand beyond the edge.
      end = " last" if float(px(value)) > _WIDTH - 30 else ""
      place = {"x": px(value), "y": _HEIGHT - 26}
      parts.append(tag("text", tick(value), **place, class_=f"x{end}"))
  return px, py, parts


def _ticks(low: float, high: float) -> list[float]:
  """About five round numbers in [low, high]."""
  step = (high - low) / 5
  size = 10.0 ** math.floor(math.log10(step))
  size *= next(m for m in (1, 2, 5, 10) if m * size >= step)
  first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
  return [i * size for i in range(first, last + 1)]


def _tick_of(largest: float) -> Callable[[float], str]:
  """How the ticks of one axis are written: all in the unit of the largest."""
  for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
    if largest >= size:
      scale = 1e3 if unit == " k" else size
      return lambda y: f"{y / scale:.4g}{unit}" if y else "0"
  return lambda y: f"{y:.4g}"


Curves = tuple[list[Markup], list[Markup]]


def of_run(
  records: Records,
  marks: Sequence[tuple[int, str]] = (),
  before: Mapping[str, Any] | None = None,
) -> Curves:
  """The main curves of one run, and all others, to be folded away; `before` are
  measurements before training, at step 0."""
  values = [(name, (before or {}).get(name)) for name in number_names(records)]
  first = {name: x for name, x in values if isinstance(x, int | float)}
  records = [{"step": 0, **first}, *records] if first else records

  def draw(title: str, names: Sequence[str], unit: str) -> Markup:
    series = {name: points(records, name) for name in names}
    return chart(title, series, marks, unit)

  main, rest = [], number_names(records)
  for title, unit, pattern in CHARTS:
    mine = [name for name in rest if re.fullmatch(pattern, name)]
    rest = [name for name in rest if name not in mine]
    main += [draw(title, mine, unit)] if mine else []
  families: dict[str, list[str]] = {}
  for name in rest:
    families.setdefault(_family(name), []).append(name)
  others = [
    draw(family, mine[i : i + COLORS], _unit(mine[i]))
    for family, mine in families.items()
    for i in range(0, len(mine), COLORS)
  ]
  return main, others


def _family(name: str) -> str:
  """What shares a chart: 'loss/role/answer' is of 'loss/role'.

  Of behaviors, the same figure of all groups. Two parts, as in 'data/...', make
  none: their units differ.
  """
  parts = name.split("/")
  if len(parts) < 3:
    return name
  if parts[0] == "behavior":
    return f"behavior/.../{parts[-1]}"
  return name.rpartition("/")[0]


def of_runs(runs: Mapping[str, Records]) -> Curves:
  """A chart per metric, a curve per run; those of `CHARTS` are open."""
  names = dict.fromkeys(n for of in runs.values() for n in number_names(of))
  patterns = [pattern for *_, pattern in CHARTS]
  main = [n for p in patterns for n in names if re.fullmatch(p, n)]

  def draw(name: str) -> Markup:
    series = {run: points(records, name) for run, records in runs.items()}
    return chart(name, series, unit=_unit(name))

  others = [name for name in names if name not in main]
  return [*map(draw, main)], [*map(draw, others)]


def number_names(records: Records) -> list[str]:
  """Names of the figures in the records, in their order."""
  found = dict.fromkeys(
    name
    for record in records
    for name, value in record.items()
    if isinstance(value, int | float | None)
  )
  return [name for name in found if name != "step"]


def points(records: Records, name: str) -> list[tuple[int, float | None]]:
  """(step, value) of one figure, wherever it was recorded."""
  return [(r["step"], r[name]) for r in records if name in r]


def _unit(name: str) -> str:
  """The unit of a metric, by its name; '' if it has none that is known."""
  fits = (unit for unit, pattern in _UNITS if re.fullmatch(pattern, name))
  return next(fits, "")
