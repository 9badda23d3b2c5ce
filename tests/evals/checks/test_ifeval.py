"""IFEval's instructions on worked examples; the live oracle is the tool."""

import importlib.util
import os

import pytest

from sft_jax.evals.checks import ifeval

# (instruction, arguments, texts that follow, texts that do not)
WORKED = [
  ("keywords:existence", {"keywords": ["cat", "dog"]},
   ["Dogs and CATS."], ["A cat."]),
  ("keywords:frequency",
   {"keyword": "cat", "frequency": 2, "relation": "at least"},
   ["cat category"], ["cat"]),
  ("keywords:frequency",
   {"keyword": "cat", "frequency": 2, "relation": "less than"},
   ["cat"], ["cat cat"]),
  ("keywords:forbidden_words", {"forbidden_words": ["cat"]},
   ["category"], ["a Cat!"]),
  ("keywords:letter_frequency",
   {"letter": "E", "let_frequency": 3, "let_relation": "at least"},
   ["eeE"], ["ee"]),
  ("length_constraints:number_sentences",
   {"num_sentences": 2, "relation": "at least"},
   ["Dr. Ito left. She ran."], ["Dr. Ito left."]),
  ("length_constraints:number_paragraphs", {"num_paragraphs": 2},
   ["a\n***\nb", "***\na *** b"], ["a", "a *** *** b", "a\n\nb"]),
  ("length_constraints:number_words",
   {"num_words": 3, "relation": "less than"}, ["two-words"], ["a b c"]),
  ("length_constraints:nth_paragraph_first_word",
   {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
   ["a\n\n'then, b"], ["a\n\nb", "a\n\nthen\n\nb", "then"]),
  ("detectable_content:number_placeholders", {"num_placeholders": 2},
   ["[a] [b]"], ["[a]", "[a\nb] [c]"]),
  ("detectable_content:postscript", {"postscript_marker": "P.S."},
   ["a\nP. S. b"], ["a\nPS b"]),
  ("detectable_content:postscript", {"postscript_marker": "P.P.S"},
   ["a\nP.P. S."], ["a\nP.S. b"]),
  ("detectable_format:number_bullet_lists", {"num_bullets": 2},
   ["* a\n- b"], ["* a", "**a**\n* b"]),
  ("detectable_format:constrained_response", {},
   ["So: My answer is no."], ["my answer is no."]),
  ("detectable_format:number_highlighted_sections", {"num_highlights": 1},
   ["*a*"], ["* *", "a"]),
  ("detectable_format:multiple_sections",
   {"section_spliter": "Day", "num_sections": 2},
   ["Day 1 a Day 2 b"], ["Day 1 a", "day 1 day 2"]),
  ("detectable_format:json_format", {},
   ['```json\n{"a": 1}\n```', "[1]"], ["Sure: {}", '{"a"}', "[" * 10**5]),
  ("detectable_format:title", {}, ["<<a>>\nb"], ["<< >>", "<a>"]),
  ("combination:two_responses", {}, ["a ****** b"],
   ["a", "a ****** a", "a ****** b ****** c"]),
  ("combination:repeat_prompt", {"prompt_to_repeat": "Say a. "},
   [" say A. a"], ["a. Say a."]),
  ("startend:end_checker", {"end_phrase": "Bye."},
   ['Hi. "bye."'], ["Bye. Hi"]),
  ("startend:quotation", {}, [' "a" '], ['"a', '"']),
  ("change_case:capital_word_frequency",
   {"capital_frequency": 2, "capital_relation": "at least"},
   ["CANNOT", "GO-ON NOW!"], ["A b", "GO-ON"]),
  ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]  # fmt: skip


@pytest.mark.parametrize(
  ("name", "arguments", "good", "bad"), WORKED, ids=lambda x: str(x)[:40]
)
def test_worked_examples(name, arguments, good, bad):
  for text in good:
    assert ifeval.follows(text, name, **arguments), text
  for text in [*bad, "", " \n"]:
    assert not ifeval.follows(text, name, **arguments), text


def test_loose_forgives_a_frame_and_bold_print():
  name, arguments = "startend:end_checker", {"end_phrase": "Bye."}
  text = "Sure!\nHi. **Bye.**\nHope that helps"
  assert not ifeval.follows(text, name, **arguments)
  assert ifeval.follows_loosely(text, name, **arguments)
  assert len(ifeval.loose_variants(text)) == 8
  assert not ifeval.follows_loosely("***", name, **arguments)


def test_an_unknown_relation_is_refused():
  with pytest.raises(ValueError, match="relation: got 'more'"):
    ifeval.number_words("a", 1, "more")


@pytest.mark.parametrize(
  ("text", "count"),
  [
    ("", 0),
    ("One. Two! Three?", 3),
    ("He said \"Go.\" She went.", 2),
    ("At 5 p.m. on foot.", 1),
    ("At 5 p.m. She ran.", 2),
    ("J. R. Ewing ran.", 1),
    ("Pi is 3.14. Good.", 2),
    ("Well... maybe. Yes", 2),
    ("1. apples\n2. pears", 1),
    ("no end", 1),
  ],
)  # fmt: skip
def test_sentences(text, count):
  assert len(ifeval.sentences(text)) == count


def test_words_part_as_in_the_treebank():
  assert ifeval.words("DON'T go, A-Z!") == ["DO", "N'T", "go", ",", "A-Z", "!"]
  assert ifeval.words("He's (at) 1,000: \"x\"") == [
    "He", "'s", "(", "at", ")", "1,000", ":", '"', "x", '"'
  ]  # fmt: skip


@pytest.mark.skipif(
  importlib.util.find_spec("langdetect") is None, reason="needs langdetect"
)
def test_languages():
  german = "Das ist ein kurzer Satz über das Wetter in der Stadt."
  english_text = "THIS IS A SHORT SENTENCE ABOUT THE WEATHER IN TOWN."
  name = "language:response_language"
  assert ifeval.follows(german, name, language="de")
  assert not ifeval.follows(german, name, language="en")
  assert ifeval.follows(english_text, "change_case:english_capital")
  assert ifeval.follows(english_text.lower(), "change_case:english_lowercase")
  assert not ifeval.follows(english_text, "change_case:english_lowercase")


@pytest.mark.skipif(
  not os.environ.get("NLTK_DATA")
  or any(
    importlib.util.find_spec(name) is None
    for name in ("lm_eval", "nltk", "langdetect", "immutabledict")
  ),
  reason="live oracle: needs lm-eval, langdetect, nltk and its NLTK_DATA",
)
def test_verdicts_are_those_of_the_published_checker():
  import ifeval_agreement

  texts = [
    "Dr. Ito, who lives in town, makes the best bread. It is sold at noon. "
    "You can buy a loaf, a cake and 3.5 pounds of buns there. Why not go?",
    "First, wash the cat. Then dry it! Is the time right? The code says so.",
  ]
  theirs = ifeval_agreement.reference()
  differ = [
    (name, arguments, text)
    for name, arguments, text in ifeval_agreement.pairs(texts, 2000, seed=1)
    if ifeval.follows(text, name, **arguments) != theirs(name, arguments, text)
  ]
  # Where a sentence ends, a trained model and our rules may disagree.
  assert {name for name, _, _ in differ} <= {
    "length_constraints:number_sentences"
  }
  assert len(differ) <= 4
