"""IFEval: the 25 verifiable instructions of Zhou et al. (2023), as checks.

Each function says whether a text follows one instruction, by the names and
arguments of the published prompts; verdicts are those of the published checker
(arXiv 2311.07911), but for what docs/evaluation.md lists. An empty text follows
nothing. That checker counts sentences with a trained model (NLTK's Punkt) and
so changes with its files; the rules here are our own, frozen by tests.
"""

import importlib
import json
import re
from collections.abc import Callable
from typing import Any

Relation = str  # 'at least' or 'less than'


def loose_variants(text: str) -> list[str]:
  """The eight readings of a reply of which one must follow, to pass loosely.

  As it is, or without its first line, its last line, or both; and each with
  its asterisks removed: a preamble, a farewell or bold print is forgiven.
  """
  lines = text.split("\n")
  cut = [lines[1:], lines[:-1], lines[1:-1]]
  kept = [text, *("\n".join(part).strip() for part in cut)]
  return kept + [variant.replace("*", "") for variant in kept]


def keywords_existence(text: str, keywords: list) -> bool:
  """Every keyword, a regular expression, is found, in any case."""
  patterns = [_pattern(word) for word in keywords]
  return all(pattern.search(text) for pattern in patterns)


def keywords_frequency(
  text: str, keyword: str, frequency: int, relation: Relation
) -> bool:
  """The keyword is found so often; within longer words, too."""
  found = _pattern(keyword.strip()).findall(text)
  return _compare(len(found), relation, frequency)


def forbidden_words(text: str, forbidden_words: list) -> bool:
  """None of the words stands in the text as a whole word."""
  patterns = [_pattern(rf"\b{word}\b") for word in forbidden_words]
  return not any(pattern.search(text) for pattern in patterns)


def letter_frequency(
  text: str, letter: str, let_frequency: int, let_relation: Relation
) -> bool:
  """The letter stands in the text so often, in either case."""
  letter = letter.strip().lower()
  if len(letter) != 1 or not "a" <= letter <= "z":
    raise ValueError(
      f"letter: got {letter!r}; expected one of a to z. Correct it."
    )
  count = text.lower().count(letter)
  return _compare(count, let_relation, let_frequency)


def response_language(text: str, language: str) -> bool:
  """The text is in the language, an ISO 639-1 code, by langdetect."""
  return language_is(text, language)


def number_sentences(text: str, num_sentences: int, relation: Relation) -> bool:
  count = len(sentences(text))
  return _compare(count, relation, num_sentences)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
  """Exactly so many paragraphs, divided by ***; none of them empty."""
  parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
  return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def number_words(text: str, num_words: int, relation: Relation) -> bool:
  """So many words: runs of letters, digits and underscores."""
  return _compare(len(re.findall(r"\w+", text)), relation, num_words)


def nth_paragraph_first_word(
  text: str, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
  """So many paragraphs, divided by empty lines; the nth begins with a word."""
  paragraphs = text.split("\n\n")
  filled = sum(bool(one.strip()) for one in paragraphs)
  if nth_paragraph > filled or filled != num_paragraphs:
    return False
  word, *_ = paragraphs[nth_paragraph - 1].split() or [""]
  word = word.lstrip("'").lstrip('"')
  return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def number_placeholders(text: str, num_placeholders: int) -> bool:
  """At least so many [placeholders]."""
  return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
  """A postscript, such as 'P.S.' or 'P.P.S', stands somewhere."""
  marker = postscript_marker.strip()
  known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
  return bool(re.search(known.get(marker, marker.lower()), text.lower()))


def number_bullet_lists(text: str, num_bullets: int) -> bool:
  """Exactly so many lines begin with a bullet, '* ' or '-'."""
  stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
  dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
  return len(stars) + len(dashes) == num_bullets


def constrained_response(text: str) -> bool:
  """One of the three answers stands in the text."""
  return any(f"My answer is {a}." in text for a in ("yes", "no", "maybe"))


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
  """At least so many *highlights*.

  As in the published checker, those in single and in double asterisks are
  looked for apart and added up, though one text may be both.
  """
  single = re.findall(r"\*[^\n\*]*\*", text)
  double = re.findall(r"\*\*[^\n\*]*\*\*", text)
  found = [one.strip("*") for one in single]
  found += [one.removeprefix("**").removesuffix("**") for one in double]
  return sum(bool(one.strip()) for one in found) >= num_highlights


def multiple_sections(
  text: str, section_spliter: str, num_sections: int
) -> bool:
  """At least so many sections, headed 'SECTION 1' and so on."""
  heading = re.compile(rf"\s?{section_spliter.strip()}\s?\d+\s?")
  return len(heading.split(text)) - 1 >= num_sections


def json_format(text: str) -> bool:
  """The whole text is JSON; a Markdown fence around it is forgiven."""
  text = text.strip()
  for fence in ("```json", "```Json", "```JSON", "```"):
    text = text.removeprefix(fence)
  try:
    json.loads(text.removesuffix("```").strip())
  except (ValueError, RecursionError):
    return False
  return True


def title(text: str) -> bool:
  """A <<title>> stands in the text."""
  found = re.findall(r"<<[^\n]+>>", text)
  return any(one.lstrip("<").rstrip(">").strip() for one in found)


def two_responses(text: str) -> bool:
  """Two different responses, divided by ******."""
  parts = [part.strip() for part in text.split("******")]
  filled = [part for part in parts if part]
  return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
  """The text begins with the prompt, in any case."""
  return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: str) -> bool:
  """The text ends with the phrase, in any case; a last quote is forgiven."""
  return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def capital_word_frequency(
  text: str, capital_frequency: int, capital_relation: Relation
) -> bool:
  """So many words in capitals."""
  count = sum(word.isupper() for word in words(text))
  return _compare(count, capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
  """English in capitals alone."""
  return text.isupper() and language_is(text, "en")


def english_lowercase(text: str) -> bool:
  """English in small letters alone."""
  return text.islower() and language_is(text, "en")


def no_comma(text: str) -> bool:
  return "," not in text


def quotation(text: str) -> bool:
  """Double quotation marks around the whole text."""
  text = text.strip()
  return len(text) > 1 and text[0] == text[-1] == '"'


_BY_GROUP: dict[str, tuple[Callable[..., bool], ...]] = {
  "keywords": (keywords_existence, keywords_frequency, forbidden_words,
               letter_frequency),
  "language": (response_language,),
  "length_constraints": (number_sentences, number_paragraphs, number_words,
                         nth_paragraph_first_word),
  "detectable_content": (number_placeholders, postscript),
  "detectable_format": (number_bullet_lists, constrained_response,
                        number_highlighted_sections, multiple_sections,
                        json_format, title),
  "combination": (two_responses, repeat_prompt),
  "startend": (end_checker, quotation),
  "change_case": (capital_word_frequency, english_capital, english_lowercase),
  "punctuation": (no_comma,),
}  # fmt: skip
INSTRUCTIONS: dict[str, Callable[..., bool]] = {
  f"{group}:{check.__name__.removeprefix('keywords_')}": check
  for group, checks in _BY_GROUP.items()
  for check in checks
}


def follows(text: str, instruction: str, **arguments: Any) -> bool:
  """Whether a text follows an instruction, strictly; an empty one does not."""
  # Called for empty text, too, so that bad arguments never pass unseen.
  verdict = INSTRUCTIONS[instruction](text, **arguments)
  return verdict and bool(text.strip())


def follows_loosely(text: str, instruction: str, **arguments: Any) -> bool:
  """Whether one of `loose_variants` follows."""
  variants = loose_variants(text)
  return any(follows(one, instruction, **arguments) for one in variants)


def _pattern(source: str) -> re.Pattern[str]:
  try:
    return re.compile(source, re.IGNORECASE)
  except re.error as error:
    raise ValueError(
      f"keyword: got {source!r}; expected a regular expression ({error}). "
      "Correct it."
    ) from error


def _compare(count: int, relation: Relation, threshold: int) -> bool:
  if relation not in ("at least", "less than"):
    raise ValueError(
      f"relation: got {relation!r}; expected 'at least' or 'less than'. "
      "Correct it."
    )
  return count >= threshold if relation == "at least" else count < threshold


_DOTTED = """
mr mrs ms dr prof sr jr st rev gen col capt lt sgt gov sen rep hon mt ft vs
e.g i.e a.m p.m u.s u.k u.n d.c ph.d b.c a.d no vol inc ltd co corp dept
jan feb mar apr jun jul aug sep sept oct nov dec cf fig est approx
"""
# Words that, after an abbreviation or dots, begin a new sentence.
_STARTING = """
the this that these those he she it they we you i there here but and so
however in on at if when while after before what who why how as for a an
my your his her our their no yes not then now
"""
_ABBREVIATIONS = frozenset(_DOTTED.split())
_STARTERS = frozenset(_STARTING.split())
_END = re.compile(r"(\S*?[.?!]+)([)\]}\"'*”’»]*)(?=\s+(\S+)|\s*$)")


def sentences(text: str) -> list[str]:
  """The sentences of a text.

  A sentence ends at . ? or ! before white space, unless the dot belongs to an
  abbreviation, an initial or an ellipsis and what follows does not look like
  a beginning: 'Dr. Ito left at 5 p.m. on foot. She ran.' has two.
  """
  found, start = [], 0
  for end in _END.finditer(text):
    if _ends_sentence(end[1], end[3]):
      found.append(text[start : end.end()])
      start = end.end()
  found.append(text[start:])
  return [one.strip() for one in found if one.strip()]


def _ends_sentence(token: str, following: str | None) -> bool:
  if following is None or not token.endswith("."):
    return True
  word = token.rstrip(".").lstrip("([{\"'*“‘")
  ellipsis = token.endswith("..")
  initial = len(word) == 1 and word.isalpha() and word != "I"
  if word.isdigit():
    return not following[:1].islower()
  if not (ellipsis or initial or word.lower() in _ABBREVIATIONS):
    return True
  begins = re.sub(r"\W+$", "", following.lstrip("([{\"'*“‘"))
  return begins[:1].isupper() and begins.lower() in _STARTERS and not initial


# The rules of the Penn Treebank's tokenizer (Mac Intyre, 1995), as far as they
# part words: quotes, punctuation, brackets, dashes and contractions.
_APART = (
  (re.compile(r"[«“‘„”’»`\"]|''|[:,](?=\D|$)|\.{2,}|--"), r" \g<0> "),
  (re.compile(r"[;@#$%&?!*\[\](){}<>]"), r" \g<0> "),
  (re.compile(r"([^' ])('(?:s|m|d|ll|re|ve)|n't)\b", re.I), r"\1 \2 "),
  (re.compile(r"([^' ])'(?=\s|$)"), r"\1 ' "),
  (re.compile(r"\b(can)(not)\b|\b(gim|lem)(me)\b", re.I), r"\1\3 \2\4"),
  (re.compile(r"\b(gon|wan)(na)\b|\b(got)(ta)\b", re.I), r"\1\3 \2\4"),
  (re.compile(r"('t)(is|was)\b", re.I), r"\1 \2"),
)


def words(text: str) -> list[str]:
  """Words and punctuation: "DON'T go, A-Z!" is DO N'T go , A-Z !"""
  for pattern, apart in _APART:
    text = pattern.sub(apart, text)
  return text.split()


def language_is(text: str, language: str) -> bool:
  """Whether langdetect takes the text for that language.

  A text in which it finds nothing to go by counts as right, as in the
  published checker. Its draws are seeded, so that verdicts repeat.

  Raises ValueError: langdetect is not installed.
  """
  try:
    langdetect = importlib.import_module("langdetect")
  except ImportError:
    raise ValueError(
      "language: got no langdetect package; expected one, to tell languages "
      "apart. Install sft_jax[ifeval]."
    ) from None
  langdetect.DetectorFactory.seed = 0
  try:
    return langdetect.detect(text) == language
  except langdetect.LangDetectException:
    return True
