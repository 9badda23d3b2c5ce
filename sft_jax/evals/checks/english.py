"""English counted as IFEval counts it: sentences, words, and is it English.

Rules of our own, frozen by tests: the published checker asks trained models
(NLTK's Punkt) and so changes with their files. docs/evaluation.md says how
often the two differ.
"""

import importlib
import re

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

  Raises:
    ValueError: langdetect is not installed.
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
