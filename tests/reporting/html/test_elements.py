"""Elements: escaped once, closed, and figures as people read them."""

import pytest

from page_reader import Page
from sft_jax.reporting.html import elements


def test_text_is_escaped_and_elements_are_not():
  inner = elements.tag("b", "<&>")
  assert inner == "<b>&lt;&amp;&gt;</b>"
  outer = elements.tag("p", inner, '"', title='"><i>', class_="x")
  assert outer == (
    '<p title="&quot;&gt;&lt;i&gt;" class="x"><b>&lt;&amp;&gt;</b>&quot;</p>'
  )


def test_what_cannot_be_shown_is_spelled_out():
  """Control characters, terminal escapes and lone surrogates."""
  shown = elements.tag("p", "a\x00b\x1b[31mc\ud800d\u202ee")
  assert shown == "<p>a␀b␛[31mc&lt;D800&gt;d&lt;202E&gt;e</p>"
  shown.encode()


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (1234567, "1,234,567"),
    (1.23456, "1.235"),
    (1833.0, "1,833"),
    (1.2e7, "12,000,000"),
    (True, "True"),
    ("x", "x"),
  ],
)
def test_values(value, text):
  assert elements.text(value) == text


def test_columns_of_numbers_stand_on_the_right():
  table = elements.table(["a", "b"], [["x", 1], ["y", None]])
  assert '<th class="n">b</th>' in table
  assert '<td class="n">1</td>' in table
  assert '<td class="n"></td>' in table
  assert "<td>x</td>" in table
  Page(elements.table(["a"], []))


def test_links_lead_to_the_sections_and_empty_ones_are_left_out():
  made = elements.sections({"A": "text", "B": "", "C": "more"})
  page = Page(made)
  links = [v for n, v in page.attributes if n == "href"]
  assert links == [f"#{v}" for n, v in page.attributes if n == "id"]
  assert len(links) == 2
  assert "B" not in page.text
