"""Charts: a linear map, and what is left out is said."""

import re

import pytest

from page_reader import Page
from sft_jax.reporting.html import charts


def lines(svg):
  return [
    [tuple(map(float, p.split(","))) for p in line.split()]
    for line in re.findall(r'points="([^"]*)"', svg)
  ]


def test_a_chart_is_a_linear_map():
  """Steps run left to right, and a larger value stands higher (smaller y)."""
  (line,) = lines(charts.chart("c", {"a": [(0, 1.0), (10, 3.0), (20, 2.0)]}))
  (x0, y0), (x1, y1), (x2, y2) = line
  assert x0 < x1 < x2
  assert x1 - x0 == pytest.approx(x2 - x1)
  assert y1 < y2 < y0
  assert y0 - y2 == pytest.approx(y2 - y1)


def test_a_tick_stands_where_its_value_would():
  svg = charts.chart("c", {"a": [(0, 0.0), (10, 1.0), (20, 4.0)]})
  ticks = {
    text: float(y)
    for y, text in re.findall(r'y="([\d.]+)" class="y">([^<]*)<', svg)
  }
  (line,) = lines(svg)
  assert ticks["1"] == line[1][1]
  assert ticks["4"] == line[2][1]
  assert ticks["0"] == line[0][1]


def test_there_is_no_half_step():
  svg = charts.chart("c", {"a": [(1, 0.0), (2, 1.0)]})
  assert re.findall(r'class="x[^"]*">([^<]*)<', svg) == ["1", "2"]


def test_a_chart_says_what_it_leaves_out():
  nan = float("nan")
  svg = charts.chart("c", {"a": [(0, 1.0), (1, nan), (2, None), (3, 2.0)]})
  assert len(lines(svg)[0]) == 2
  assert "2 not finite" in svg
  svg = charts.chart("c", {"a": [(i, float(i)) for i in range(900)]})
  assert len(lines(svg)[0]) == 300
  assert "means of 3" in svg
  assert "no points" in charts.chart("c", {"a": []})
  assert "<svg" not in charts.chart("c", {"a": [(1, nan)]})


def test_a_chart_of_one_point_or_a_constant():
  assert "<circle" in charts.chart("c", {"a": [(5, 2.0)]})
  for y in (0.0, 2.0):
    (line,) = lines(charts.chart("c", {"a": [(1, y), (2, y)]}))
    assert line[0][1] == line[1][1]


def test_incidents_are_marked_where_they_were():
  svg = charts.chart("c", {"a": [(0, 1.0), (10, 2.0)]}, [(10, "resumed")])
  (mark,) = re.findall(r'x1="([\d.]+)" x2="([\d.]+)"[^>]*class="mark"', svg)
  (line,) = lines(svg)
  assert [float(x) for x in mark] == [line[1][0]] * 2
  assert "resumed, step 10" in svg
  # Beyond the curve there is no place for one.
  other = charts.chart("c", {"a": [(0, 1.0), (10, 2.0)]}, [(11, "resumed")])
  assert "mark" not in other


def test_intervals_lie_where_the_shares_are():
  svg = charts.intervals([(0.5, 0.25, 1.0), None], "x")
  (x,) = re.findall(r'<circle cx="([\d.]+)"', svg)
  low, high = re.findall(r'x1="([\d.]+)" x2="([\d.]+)"[^>]*class="s0"', svg)[0]
  assert [float(v) for v in (low, x, high)] == [44, 84, 164]


def test_bars_are_as_long_as_their_share():
  page = charts.bars("b", {"half": 0.5, "all": 1.0})
  assert re.findall(r'<rect [^>]*width="([\d.]+)"', page) == ["50.0", "100.0"]
  Page(page)


def test_a_histogram_shows_one_among_thousands():
  svg = charts.histogram("h", [("0", "0 to 1", 5000), ("1", "1 to 2", 1)])
  heights = re.findall(r'height="([\d.]+)">', svg)
  assert float(heights[0]) > 100
  assert float(heights[1]) == 1
