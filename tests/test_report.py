"""The report: everything given is on the page, as text and nothing else."""

import re
from html.parser import HTMLParser

import pytest

from sft_jax import report

HOSTILE = [
  "<script>alert(1)</script>",
  '"><img src=x onerror=alert(1)>',
  "' onmouseover='alert(1)",
  "</pre></article><iframe src='//evil'>",
  "</style><style>*{background:url(//evil)}",
  "</title><script>1</script>",
  "<!-- ",
  "&lt;b&gt; &amp;amp; &#x3c;",
  "$body ${title} {body} %s $$",
  "]]> <svg/onload=alert(1)>",
  "javascript:alert(1)",
  "line\nbreak\ttab  two spaces",
]


class Page(HTMLParser):
  """Tags, attributes and text, with the check that every tag is closed."""

  VOID = ("meta",)

  def __init__(self, page):
    super().__init__()
    self.tags, self.attributes, self.text, self.open = [], [], [], []
    self.feed(page)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


def render(tmp_path, run):
  path = tmp_path / "report.html"
  report.write(path, run)
  assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
  return path.read_text(encoding="utf-8")


def everywhere(x):
  """A run with the text x in every place that holds text."""
  reply = {"text": x, "passed": False, "stopped": False}
  return {
    "title": x,
    "summary": {x: x},
    "notes": [x],
    "metrics": [{"step": 1, x: 2.0}, {"step": 2, x: 1.0}],
    "curves": {x: [x]},
    "scores": [
      {"group": x, "n": 9, "before": (0.1, 0.0, 0.3), "after": (0.9, 0.7, 1.0)}
    ],
    "samples": [{"group": x, "prompt": x, "before": reply, "after": reply}],
    "ledger": {
      "sources": {x: {"rows": 3, "dropped": {x: 1}, "places": {x: [x]}}},
      "epoch": {x: 4},
    },
    "config": {x: {x: x}},
    "versions": {x: x},
  }


def test_hostile_text_stays_text(tmp_path):
  """Whatever the text, the page has the elements of the harmless page."""
  harmless = Page(render(tmp_path, everywhere("plain")))
  for x in HOSTILE:
    page = Page(render(tmp_path, everywhere(x)))
    assert page.tags == harmless.tags, x
    names = [name for name, _ in page.attributes]
    assert names == [name for name, _ in harmless.attributes], x
    whole = [text.replace(x, "plain") for text in page.text]
    assert whole == harmless.text, x


def test_nothing_is_loaded(tmp_path):
  """No script, no link, and a policy that forbids what slipped through."""
  page = Page(render(tmp_path, everywhere("plain")))
  assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
  names = {name for name, _ in page.attributes}
  assert not {"src", "href", "style"} & names
  assert not any(name.startswith("on") for name in names)
  values = [value for _, value in page.attributes]
  assert "default-src 'none'; style-src 'unsafe-inline'" in values
  assert "url(" not in "".join(page.text)
  assert "@import" not in "".join(page.text)


def test_every_value_is_there(tmp_path):
  run = everywhere("plain") | {
    "summary": {"trained tokens": 1234567, "loss": 1.23456},
    "config": {"optim": {"learning_rate": 1e-05}, "steps": 7, "off": {}},
  }
  page = Page(render(tmp_path, run))
  for text in (
    "1,234,567",
    "1.235",
    "optim.learning_rate",
    "1e-05",
    "{}",
    "10% (0% to 30%)",
    "90% (70% to 100%)",
    "+80 points",
    "did not stop",
    "failed",
    "dropped.plain",
    "plain, plain: plain",
    "plain: last 1",
  ):
    assert text in page.text


def test_ledger_columns_are_the_union(tmp_path):
  sources = {"a": {"dropped": {"long": 2}}, "b": {"dropped": {}, "rows": 5}}
  text = Page(render(tmp_path, {"ledger": {"sources": sources}})).text
  start = text.index("source")
  cells = [t for t in text[start:] if t.strip()]
  assert cells == [
    "source",
    "dropped.long",
    "rows",
    "a",
    "2",
    "0",
    "b",
    "0",
    "5",
  ]


@pytest.mark.parametrize(
  ("before", "after", "verdict"),
  [
    ((0.2, 0.1, 0.3), (0.5, 0.4, 0.6), "good"),
    ((0.5, 0.4, 0.6), (0.2, 0.1, 0.3), "bad"),
    ((0.5, 0.4, 0.6), (0.7, 0.6, 0.8), "dim"),
    ((0.5, 0.4, 0.6), (0.5, 0.4, 0.6), "dim"),
  ],
)
def test_a_change_within_noise_is_no_improvement(
  tmp_path, before, after, verdict
):
  scores = [{"group": "g", "n": 5, "before": before, "after": after}]
  page = render(tmp_path, {"scores": scores})
  assert re.findall(r'<span class="(good|bad|dim)">', page) == [verdict]


def test_no_before(tmp_path):
  run = {
    "scores": [{"group": "g", "n": 5, "after": (0.5, 0.4, 0.6)}],
    "samples": [{"prompt": "p", "after": {"text": "t"}}],
  }
  page = Page(render(tmp_path, run))
  assert page.tags.count("circle") == 1
  samples = page.text[page.text.index("Replies, side by side") :]
  assert "after" in samples
  assert "before" not in samples


def points(svg):
  return [
    [tuple(map(float, p.split(","))) for p in line.split()]
    for line in re.findall(r'points="([^"]*)"', svg)
  ]


def test_chart_is_a_linear_map():
  """Steps run left to right, and a larger value stands higher (smaller y)."""
  (line,) = points(report.chart("c", {"a": [(0, 1.0), (10, 3.0), (20, 2.0)]}))
  (x0, y0), (x1, y1), (x2, y2) = line
  assert x0 < x1 < x2
  assert x1 - x0 == pytest.approx(x2 - x1)
  assert y1 < y2 < y0
  assert y0 - y2 == pytest.approx(y2 - y1)


def test_chart_says_what_it_leaves_out():
  nan = float("nan")
  svg = report.chart("c", {"a": [(0, 1.0), (1, nan), (2, None), (3, 2.0)]})
  assert len(points(svg)[0]) == 2
  assert "2 not finite" in svg
  svg = report.chart("c", {"a": [(i, float(i)) for i in range(1200)]})
  assert len(points(svg)[0]) == 400
  assert "means of 3" in svg
  assert "no points" in report.chart("c", {"a": []})
  assert "<svg" not in report.chart("c", {"a": [(1, nan)]})


def test_chart_of_one_point_or_a_constant():
  assert "<circle" in report.chart("c", {"a": [(5, 2.0)]})
  for y in (0.0, 2.0):
    (line,) = points(report.chart("c", {"a": [(1, y), (2, y)]}))
    assert line[0][1] == line[1][1]


def test_what_cannot_be_shown_is_spelled_out(tmp_path):
  """Control characters, terminal escapes and lone surrogates."""
  page = render(tmp_path, {"notes": ["a\x00b\x1b[31mc\ud800d"]})
  assert "a␀b␛[31mc\\ud800d" in page


def test_unknown_keys_are_refused(tmp_path):
  with pytest.raises(ValueError, match="'sample'"):
    report.write(tmp_path / "report.html", {"sample": []})
  assert not list(tmp_path.iterdir())
