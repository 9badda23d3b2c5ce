"""The pages as a browser draws them: nothing overflows, all can be read.

A page of the test's own holds ours in a frame of the width of a phone or a
desk and measures it there; it needs Chromium, which CI installs where it can.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fake_runs
from page_reader import INJECTIONS
from sft_jax.reporting.html import compare_page, run_page

CHROMIUM = next(
  filter(
    None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
  ),
  None,
)
pytestmark = pytest.mark.skipif(
  CHROMIUM is None, reason="needs chromium (apt-get install chromium)"
)

LONG = "averylongwordwithoutanyspaceinit" * 8

# Measures the frame's page when it is there, and writes what it found where
# --dump-dom prints it.
MEASURE = """
const frame = document.querySelector('iframe');
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => {
  const part = v =>
    (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  return .2126 * part(r) + .7152 * part(g) + .0722 * part(b);
};
const behind = (node, view) => {
  for (; node; node = node.parentElement) {
    const colour = rgb(view.getComputedStyle(node).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
};
frame.onload = () => {
  const view = frame.contentWindow, page = frame.contentDocument;
  for (const one of page.querySelectorAll('details')) one.open = true;
  const contrast = [], outside = [], wide = [];
  for (const node of page.body.querySelectorAll('*')) {
    const own = [...node.childNodes].some(
      child => child.nodeType === 3 && child.textContent.trim());
    const style = view.getComputedStyle(node);
    const box = node.getBoundingClientRect();
    if (own && node.closest('svg') === null) {
      const [a, b] = [light(rgb(style.color)), light(behind(node, view))];
      const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      const what = node.textContent.slice(0, 30);
      contrast.push([ratio, `${node.className}: ${what}`]);
    }
    if (node.closest('.scroll') === null && box.right > view.innerWidth + .5)
      wide.push(node.tagName + '.' + node.className);
    if (node.tagName === 'text') {
      const sheet = node.closest('svg').getBoundingClientRect();
      if (box.left < sheet.left - 1 || box.right > sheet.right + 1 ||
          box.top < sheet.top - 1 || box.bottom > sheet.bottom + 1)
        outside.push(node.textContent);
    }
  }
  contrast.sort((a, b) => a[0] - b[0]);
  const letters = [...page.querySelectorAll('svg text')].map(
    node => node.getBoundingClientRect().height);
  document.title = 'done';
  document.querySelector('pre').textContent = JSON.stringify({
    width: page.documentElement.scrollWidth, view: view.innerWidth,
    back: light(rgb(view.getComputedStyle(page.body).backgroundColor)),
    loaded: view.performance.getEntriesByType('resource').length,
    drawn: [...page.querySelectorAll('polyline')].filter(
      line => line.getBoundingClientRect().width > 50).length,
    shown: page.body.innerText.length,
    worst: contrast[0], wide: wide, outside: outside,
    smallest: Math.min(...letters, 99)});
};
"""


def _chromium(*arguments: str) -> str:
  done = subprocess.run(
    [
      *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu"),
      *("--allow-file-access-from-files", "--virtual-time-budget=3000"),
      *arguments,
    ],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


def _measure(page: Path, width: int, scheme: str) -> dict:
  holder = page.with_name("holder.html")
  holder.write_text(
    f"<pre></pre><iframe src='{page.name}' style='width:{width}px;"
    f"height:800px;border:0'></iframe><script>{MEASURE}</script>"
  )
  number = {"dark": 0, "light": 1}[scheme]
  dom = _chromium(
    f"--blink-settings=preferredColorScheme={number}",
    *("--window-size=1400,900", "--dump-dom", f"file://{holder}"),
  )
  found = re.search(r"<pre>(\{.*?\})</pre>", dom, re.DOTALL)
  assert found, dom[:500]
  return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
  """A page of each kind, with texts that do not want to be broken."""
  folder = tmp_path_factory.mktemp("pages")
  run = fake_runs.finished(LONG)
  found = {name: folder / f"{name}.html" for name in ("report", "compare")}
  run_page.write(found["report"], run)
  compare_page.write(found["compare"], {"one": run, LONG: run})
  return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_page_can_be_read(pages, name, width, scheme):
  found = _measure(pages[name], width, scheme)
  assert found["view"] == width
  assert found["width"] <= width, found["wide"]
  assert not found["wide"]
  assert not found["outside"], "labels that the edge of a chart cuts"
  assert (found["back"] > 0.5) == (scheme == "light")
  assert found["loaded"] == 0
  assert found["drawn"] >= 2
  assert found["shown"] > 2000
  # WCAG's level AA for text.
  assert found["worst"][0] >= 4.5, found["worst"]
  assert found["smallest"] >= 10, "letters of charts, in pixels"


def test_a_page_prints(pages, tmp_path):
  """Folded parts are on the paper, too."""
  paper = tmp_path / "paper.pdf"
  _chromium(f"--print-to-pdf={paper}", f"file://{pages['report']}")
  data = paper.read_bytes()
  assert data.startswith(b"%PDF")
  assert len(re.findall(rb"/Type\s*/Page\b", data)) >= 3


LOOK = """
const frame = document.querySelector('iframe');
frame.onload = () => setTimeout(() => {
  const view = frame.contentWindow, page = frame.contentDocument;
  for (const one of page.querySelectorAll('details')) one.open = true;
  const all = [...page.querySelectorAll('*')];
  document.querySelector('pre').textContent = JSON.stringify({
    pwned: window.pwned || 0,
    foreign: all.map(node => node.tagName.toLowerCase()).filter(name =>
      /^(script|img|iframe|object|embed|video|audio|link|base|form|input)$/
      .test(name)),
    handlers: all.flatMap(node => node.getAttributeNames()).filter(
      name => name.startsWith('on')),
    links: [...page.links].map(link => link.getAttribute('href')).filter(
      href => !href.startsWith('#part-')),
    loaded: view.performance.getEntriesByType('resource').length,
    text: page.body.innerText.includes('49') ? 'template ran' : ''});
}, 500);
"""


def test_nothing_runs_that_is_injected(tmp_path):
  """Each text in every place of a run, without the policy that forbids it."""
  assert len(INJECTIONS) >= 50
  every = "\n".join(INJECTIONS)
  run = fake_runs.finished(every)
  one = [fake_runs.finished(x) for x in INJECTIONS]
  for name in ("samples", "incidents", "held_out"):
    run[name] = [row for other in one for row in other[name]]
  for when in ("before", "after"):
    run[when]["behaviors"]["replies"] = [
      reply for other in one for reply in other[when]["behaviors"]["replies"]
    ]
  run["config"] = {x: x for x in INJECTIONS}
  run["result"] |= {x: {x: x} for x in INJECTIONS}
  pages = [tmp_path / "report.html", tmp_path / "compare.html"]
  run_page.write(pages[0], run)
  compare_page.write(pages[1], {every: run, "other": fake_runs.finished("x")})
  for page in pages:
    text = page.read_text(encoding="utf-8")
    bare = re.sub(r'(?s)<meta\s+http-equiv="Content-Security.*?>', "", text)
    assert "default-src" not in bare
    page.write_text(bare, encoding="utf-8")
    holder = page.with_name("holder.html")
    holder.write_text(
      f"<pre></pre><iframe src='{page.name}'></iframe><script>{LOOK}</script>"
    )
    dom = _chromium("--dump-dom", f"file://{holder}")
    found = re.search(r"<pre>(\{.*?\})</pre>", dom, re.DOTALL)
    assert found, dom[:500]
    assert json.loads(found[1]) == {
      "pwned": 0, "foreign": [], "handlers": [], "links": [], "loaded": 0,
      "text": "",
    }  # fmt: skip
