"""Elements: escaped once, closed, and figures as people read them."""

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from page_reader import Page
from sft_jax.reporting.html import elements


def test_text_is_escaped_and_elements_are_not():
  inner = elements.tag("b", "<&>")
  assert inner == "<b>&lt;&amp;&gt;</b>"
  outer = elements.tag("p", inner, '"', title='"><i>', class_="x")
  assert outer == (
    '<p title="&#34;&gt;&lt;i&gt;" class="x"><b>&lt;&amp;&gt;</b>&#34;</p>'
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


MACROS = '{% import "macros.html.jinja" as m %}'


def macro(call: str, **values) -> str:
  """A call of a macro of the pages."""
  environment = elements._ENVIRONMENT
  return environment.from_string(f"{MACROS}{{{{ m.{call} }}}}").render(values)


def test_columns_of_numbers_stand_on_the_right():
  rows = [["x", 1], ["y", None]]
  table = macro("table(head, rows)", head=["a", "b"], rows=rows)
  assert '<th class="n">b</th>' in table
  assert '<td class="n">1</td>' in table
  assert '<td class="n"></td>' in table
  assert "<td>x</td>" in table
  Page(macro("table(head, rows)", head=["a"], rows=[]))


def test_templates_escape_as_elements_do():
  """In text and in attributes; a control character is shown, not obeyed."""
  row = {
    "place": "<i>", "tokens": [1], "loss_weights": [0.5],
    "spans": [{"text": "a\x1b<b>", "special": True, "weight": 0.5,
                "role": '"><script>'}],
  }  # fmt: skip
  made = macro("sample(row)", row=row)
  assert "a␛&lt;b&gt;" in made
  assert 'title="&#34;&gt;&lt;script&gt;, weight 0.5"' in made
  assert set(Page(made).tags) == {"article", "h3", "pre", "span"}


def test_links_lead_to_the_sections_and_empty_ones_are_left_out():
  made = macro("sections(parts)", parts=[("A", "t"), ("B", " \n"), ("C", "m")])
  page = Page(made)
  links = [v for n, v in page.attributes if n == "href"]
  assert links == [f"#{v}" for n, v in page.attributes if n == "id"]
  assert len(links) == 2
  assert "B" not in page.text


_WORDS = st.lists(
  st.sampled_from(["a", "b", "cat", " ", "\n", ".", "<b>", "&", "é"])
).map("".join)


def _text(marked: str) -> str:
  return html.unescape(re.sub(r"</?(ins|del)>", "", marked))


def _unmarked(marked: str) -> str:
  return re.sub(r"<(ins|del)>.*?</\1>", "", marked, flags=re.DOTALL)


@given(_WORDS, _WORDS)
def test_texts_are_whole_and_what_is_unmarked_is_common(old, new):
  marked = elements.mark(old, new)
  assert _text(marked.old) == old
  assert _text(marked.new) == new
  if not marked.note:
    assert _unmarked(marked.old) == _unmarked(marked.new)
    assert "<ins>" not in marked.old
    assert "<del>" not in marked.new
    assert "del>" in marked.old or "ins>" in marked.new


def test_the_words_that_differ_are_marked():
  old, new, note = elements.mark(
    "The tower of Elm is grey.", "The tower of Elm is tall, and grey."
  )
  assert not note
  assert old == "The tower of Elm is grey."
  assert new == "The tower of Elm is <ins>tall, and </ins>grey."
  marked = elements.mark("It is red.", "It is blue.")
  assert marked.old == "It is <del>red</del>."
  assert marked.new == "It is <ins>blue</ins>."


def test_what_has_nothing_in_common_is_not_marked():
  marked = elements.mark("one two three", "four five six")
  assert (marked.old, marked.new) == ("one two three", "four five six")
  assert marked.note == "hardly a word in common"
  assert elements.mark("same", "same").note == "the same"
  assert elements.mark("w " * 3000, "v").note == "too long to be compared"
