"""Conflicts: the same question with different answers.

Questions are the same when all their words are, or nearly (Jaccard of 2-word
runs at least 0.8, boilerplate aside, and no more than two words differ, none
of them a number, a sign, or a word that its answer repeats: then the answer
differs because the question does). Answers differ when their words do:

    'Paris'  'Paris.'                       the same words
    'Paris'  'It is Paris, of course.'      one says all that the other says
    'Paris'  'Rome'                         different
    '... so 42 boxes'  '... so 43 boxes'    different: they end in other numbers

Long answers may say one thing in many ways, and count as different only when
they share little, or conclude with another number or another yes and no.
"""

import collections
import re

import numpy as np

from sft_jax.data.audit import near_duplicates
from sft_jax.data.audit import text_hashing as words_lib
from sft_jax.data.audit.row_texts import Row, Texts

_SHINGLE, _NEAR = 2, 0.8
_WORDS_APART = 2
_SHORT = 8  # words of an answer in which every word counts
_SHARED = 0.3  # Jaccard of the words of long answers that agree
_TOKEN = re.compile(r"[^\W_]+|[-+*/=<>%^]")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_YES_NO = re.compile(r"\W*(yes|no|true|false|correct|incorrect)\b", re.I)


def find_conflicts(texts: Texts) -> list[tuple[int, int]]:
  """Pairs of rows that conflict, those with equal questions first; of many rows
  with one question, neighbors are compared."""
  asked = texts.watched & ~texts.text & (texts.words("prompt").counts > 0)
  keys = words_lib.whole(texts.words("prompt"))
  # Another system prompt may well ask for another answer.
  keys = words_lib.mix(keys + words_lib.whole(texts.words("system")))
  prompts, rows = texts.words("prompt"), np.flatnonzero(asked)
  order = rows[np.argsort(keys[rows], kind="stable")]
  same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
  neighbors = zip(order[same].tolist(), order[same + 1].tolist(), strict=True)
  answers = lambda pair: [texts.row(i).answer for i in pair]
  found = [pair for pair in neighbors if disagree(*answers(pair))]
  _, first = np.unique(keys[rows], return_index=True)
  unique = np.zeros(len(texts), bool)
  unique[rows[first]] = True
  common = near_duplicates.boilerplate(prompts, n=_SHINGLE, among=unique)
  pairs = near_duplicates.find_near_duplicates(
    prompts, n=_SHINGLE, threshold=_NEAR, ignored=common, among=unique
  )
  for a, b in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
    one, other = texts.row(a), texts.row(b)
    same = one.system == other.system and same_question(one, other)
    if same and disagree(one.answer, other.answer):
      found.append((a, b))
  return found


def same_question(one: Row, other: Row) -> bool:
  """Whether two rows with near-identical prompts ask for the same."""
  a, b = _count(one.prompt), _count(other.prompt)
  for apart, answer in ((a - b, one.answer), (b - a, other.answer)):
    said = _count(answer)
    counts = any(word in said or not word.isalpha() for word in apart)
    if counts or apart.total() > _WORDS_APART:
      return False
  return True


def disagree(one: str, other: str) -> bool:
  """Whether two answers to one question differ; see the head of this file."""
  a, b = set(_count(one)), set(_count(other))
  if not a or not b or a <= b or b <= a:
    return False
  if max(len(a), len(b)) <= _SHORT:
    return True
  answered = [_YES_NO.match(text) for text in (one, other)]
  if answered[0] and answered[1]:
    return answered[0][1].lower() != answered[1][1].lower()
  numbers = [_NUMBER.findall(text)[-1:] for text in (one, other)]
  if numbers[0] and numbers[1] and numbers[0] != numbers[1]:
    return True
  return len(a & b) / len(a | b) < _SHARED


def _count(text: str) -> collections.Counter[str]:
  return collections.Counter(_TOKEN.findall(text.casefold()))
