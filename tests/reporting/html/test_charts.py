"""Charts: a linear map, and what is left out is said."""

import itertools
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
  svg = charts.histogram("h", [(0, 1, 5000), (1, 2, 1)], "nats")
  heights = re.findall(r'height="([\d.]+)">', svg)
  assert float(heights[0]) > 100
  assert float(heights[1]) == 1


def test_a_histogram_has_one_scale():
  """Ticks are round, stand where their value is, and share a unit."""
  bins = [(1000 * i, 1000 * (i + 1), i % 3) for i in range(24)]
  svg = charts.histogram("h", bins, "tokens")
  found = re.findall(r'<text x="([\d.]+)" y="\d+" class="x[^"]*">([^<]*)<', svg)
  assert [text for _, text in found] == ["0", "5 k", "10 k", "15 k", "20 k"]
  places = [float(x) for x, _ in found]
  steps = [b - a for a, b in itertools.pairwise(places)]
  assert max(steps) - min(steps) < 0.3
  (left,) = re.findall(r'<rect x="([\d.]+)"[^>]*><title>5,000 to', svg)
  assert float(left) == pytest.approx(places[1], abs=1)


NAMES = (
  *("loss/nats_per_token", "held_out/nats_per_token", "optim/grad_norm"),
  *("loss/role/answer", "loss/role/tool_call", "data/fill", "plain"),
  *("behavior/all/pass_rate", "behavior/a/pass_rate", "new/metric"),
  *(f"loss/source/{i}.jsonl" for i in range(9)),
)
RECORDS = [{"step": 1, **dict.fromkeys(NAMES, 1.0), "data/chain": "0f3a"}]


def _page(found) -> str:
  """The charts that are open and those that are folded."""
  return "".join(found[0] + found[1])


def _curves(page: str) -> list[str]:
  """Names in the legends."""
  return [t.split(":")[0] for t in Page(page).text if ": last " in t]


def test_every_name_is_drawn_once():
  drawn = _curves(_page(charts.of_run(RECORDS)))
  assert sorted(drawn) == sorted(NAMES)


def test_what_belongs_together_shares_a_chart():
  page = _page(charts.of_run(RECORDS))
  figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
  together = [set(_curves(figure)) for figure in figures]
  assert {"loss/nats_per_token", "held_out/nats_per_token"} in together
  assert {"loss/role/answer", "loss/role/tool_call"} in together
  assert {"behavior/a/pass_rate"} in together
  # More than there are colours for are spread over charts.
  sources = [c for c in together if "loss/source/0.jsonl" in c]
  assert len(sources[0]) == 6


def test_a_curve_per_run():
  runs = {"one": RECORDS, "two": [{"step": 5, "loss/nats_per_token": 2.0}]}
  page = _page(charts.of_runs(runs))
  assert _curves(page).count("one") == len(NAMES)
  assert "two: last 2" in page
  assert "two: no points" in page


def test_the_value_before_training_stands_at_step_0():
  records = [{"step": 4, "held_out/nats_per_token": 1.0, "data/fill": 0.5}]
  before = {"held_out/nats_per_token": 3.0, "behaviors": {}, "other": 2.0}
  page = _page(charts.of_run(records, before=before))
  (held_out,) = [line for line in lines(page) if len(line) == 2]
  assert held_out[0][1] < held_out[1][1]  # Higher, and so of smaller y.
  assert "other" not in page
  for axis in ("step", "nats per token", "share"):
    assert f">{axis}</text>" in page
