"""Marked differences: nothing is lost, and what is unmarked is in both."""

import html
import re

from hypothesis import given
from hypothesis import strategies as st

from sft_jax.reporting.html import differences

_WORDS = st.lists(
  st.sampled_from(["a", "b", "cat", " ", "\n", ".", "<b>", "&", "é"])
).map("".join)


def _text(marked: str) -> str:
  return html.unescape(re.sub(r"</?(ins|del)>", "", marked))


def _unmarked(marked: str) -> str:
  return re.sub(r"<(ins|del)>.*?</\1>", "", marked, flags=re.DOTALL)


@given(_WORDS, _WORDS)
def test_texts_are_whole_and_what_is_unmarked_is_common(old, new):
  marked = differences.mark(old, new)
  assert _text(marked.old) == old
  assert _text(marked.new) == new
  if not marked.said:
    assert _unmarked(marked.old) == _unmarked(marked.new)
    assert "<ins>" not in marked.old
    assert "<del>" not in marked.new
    assert "del>" in marked.old or "ins>" in marked.new


def test_the_words_that_differ_are_marked():
  old, new, said = differences.mark(
    "The tower of Elm is grey.", "The tower of Elm is tall, and grey."
  )
  assert not said
  assert old == "The tower of Elm is grey."
  assert new == "The tower of Elm is <ins>tall, and </ins>grey."
  marked = differences.mark("It is red.", "It is blue.")
  assert marked.old == "It is <del>red</del>."
  assert marked.new == "It is <ins>blue</ins>."


def test_what_has_nothing_in_common_is_not_marked():
  marked = differences.mark("one two three", "four five six")
  assert (marked.old, marked.new) == ("one two three", "four five six")
  assert marked.said == "hardly a word in common"
  assert differences.mark("same", "same").said == "the same"
  assert differences.mark("w " * 3000, "v").said == "too long to be compared"
