"""Warnings: what looks wrong with training rows, with examples.

None of them refuses a run:

empty answers    nothing, or a placeholder, where an answer should be
duplicates       rows with the same words as another
near duplicates  rows with nearly the same words as another
conflicts        the same question with different answers
openings         many prompts, or answers, that begin or end alike
languages        rows in a language that is rare here
lengths          answers much longer or shorter than the others
refusals         answers that decline
cut off          answers that look truncated
"""

import collections
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from sft_jax.data.audit import conflicts, languages, near_duplicates
from sft_jax.data.audit import text_hashing as words_lib
from sft_jax.data.audit.row_texts import Texts

# Words of a shingle, and the Jaccard from which rows count as near: one word
# changed in 30 leaves 0.82, two leave 0.69.
SHINGLE, NEAR = 3, 0.8
_SHOWN = 5
_OPENING = 6  # words
# An opening is over-represented in more rows than both of these.
_OPENING_ROWS, _OPENING_SHARE = 20, 0.05
_RARE_LANGUAGE = 0.05
_LANGUAGE_ROWS = 10_000  # at most, evenly over the rows: 8 s
# Robust standard deviations of log words from the median; see `_lengths`.
_FAR = 5.0

# What stands for an answer where there is none.
_PLACEHOLDER = re.compile(
  r"\W*(?:nooutput|no (?:output|answer|response)|n/?a|none|null|nan|undefined"
  r"|todo|tbd|empty)?\W*",
  re.IGNORECASE,
)
# With what a refusal opens, what it cannot, and what an AI says it is not.
_REFUSAL = re.compile(
  r"(?:(?:unfortunately|regrettably|(?:my )?apologies|i apologi[sz]e|sorry"
  r"|(?:i['\u2019]?m|i am) (?:\w+ )?sorry)\b[,.:;]? ?(?:but )?)?"
  r"(?:(?:i|we)(?: can(?:no|['\u2019])?t| could ?n[o'\u2019]t| won['\u2019]?t"
  r"|(?: am|['\u2019]m| are|['\u2019]re) (?:not able|unable) to)"
  r" (?:help(?! but)|assist|provide|answer|comply|fulfil|do that|complete"
  r"|create|generate|write|give|support|engage|access|browse|share|retrieve"
  r"|estimate|predict|draw|display)\b"
  r"|(?:i|we) (?:must|have to) (?:decline|refuse)\b"
  r"|i (?:do not|don['\u2019]t) have (?:access|the ability)\b"
  r"|i(?:['\u2019]m| am) (?:just |only )?an ai\b"
  r"|as an ai\b[^.!?]{0,60}?\bi(?:['\u2019]m| am| do| have| ca| can| must)"
  r"(?:n['\u2019]t| ?not| no| unable| decline)\b)",
  re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?]) +")
_LOOKED_AT = 300  # characters of the first line, where a refusal stands
_PROSE = re.compile(r"[.!?][\"')\u201d]* +[A-Z\u00c0-\u00de]")
_ENDS = frozenset(".!?:;\"'`)]}>\u2019\u201d\u2026\u3002\uff01\uff1f")
_CODE = re.compile(r"[;{}]\s*$|^\s*(?:#include|import |def |class |<\w+)", re.M)
_LOOSE = re.compile(
  r"^\s*(?:[-*\u2022]|\d+[.)])|#\w|\b(?:yours|sincerely|regards)|\bhttps?:",
  re.IGNORECASE,
)
_DANGLING = re.compile(
  r"[,;(\[\u2013]$|\b(?:and|or|but|the|an|of|to|with|for|because|which|that"
  r"|is|are|was|were|in|on|by|from|as)$",
  re.IGNORECASE,
)


class Example(NamedTuple):
  """Rows that show a warning: what they are, and where they stand."""

  note: str  # In a few words, such as 'similarity 0.91'.
  rows: tuple[int, ...]  # Their numbers in the `Texts`, one or more.


class DataWarning(NamedTuple):
  name: str  # See the head of this file.
  count: int  # Rows concerned.
  message: str  # What it means, in a line.
  examples: tuple[Example, ...]  # A few.


def find_warnings(texts: Texts) -> list[DataWarning]:
  """All warnings about training rows; those about none are left out."""
  first = _first_alike(texts)
  count, examples = _groups(first, "with the same words")
  found = [
    _empty(texts),
    DataWarning(
      "duplicates",
      count,
      f"{count:,} rows repeat another, case, spacing and punctuation aside: "
      "they weigh double, and may stand on both sides of a split.",
      examples,
    ),
    _near_duplicates(texts, first),
    _conflicts(texts),
    *_openings(texts),
    _languages(texts),
    _lengths(texts),
    *_by_answer(texts),
  ]
  return [warning for warning in found if warning.count]


def _first_alike(texts: Texts) -> Int64[np.ndarray, " rows"]:
  """The first row with the words of each; of those without words, itself."""
  words = texts.words("row")
  found = np.arange(len(texts))
  rows = np.flatnonzero(texts.watched & (words.counts > 0))
  _, first, which = np.unique(
    words_lib.whole(words)[rows], return_index=True, return_inverse=True
  )
  found[rows] = rows[first[which]]
  return found


def _groups(
  group: Int64[np.ndarray, " rows"], note: str
) -> tuple[int, tuple[Example, ...]]:
  """Rows that are not the first of their group; the largest groups."""
  sizes = np.bincount(group, minlength=len(group))
  again = int((group != np.arange(len(group))).sum())
  largest = np.argsort(-sizes, kind="stable")[:_SHOWN]
  of = lambda one: tuple(np.flatnonzero(group == one)[:3].tolist())
  largest = [one for one in largest if sizes[one] > 1]
  notes = (f"{sizes[one]} rows {note}" for one in largest)
  return again, tuple(map(Example, notes, map(of, largest)))


def reasons_to_leave(texts: Texts, places: Iterable[str]) -> list[str]:
  """Why the rows of these places, in order, should be left out; '' of most."""
  first = _first_alike(texts)
  reasons: dict[int, str] = {}
  groups = {
    "has the words of": first,
    "nearly repeats": _near(texts, first).group,
  }
  for what, group in groups.items():
    for i in np.flatnonzero(group != np.arange(len(group))).tolist():
      reasons[i] = f"{what} {texts.place(int(group[i]))}"
  for pair in conflicts.find_conflicts(texts):
    for one, other in (pair, pair[::-1]):
      reasons[one] = f"answers otherwise than {texts.place(other)}"
  for start, some in texts.batches("answer"):
    empty = (i for i, text in enumerate(some, start) if is_empty(text))
    reasons |= dict.fromkeys(empty, "a placeholder for an answer")
  numbers = iter(range(len(texts)))
  found = (next(i for i in numbers if texts.place(i) == x) for x in places)
  return [reasons.get(i, "") for i in found]


def _near(
  texts: Texts, first: Int64[np.ndarray, " rows"]
) -> near_duplicates.Pairs:
  rows = texts.words("row")
  unique = texts.watched & (first == np.arange(len(first)))
  common = near_duplicates.boilerplate(rows, n=SHINGLE, among=unique)
  return near_duplicates.find_near_duplicates(
    rows, n=SHINGLE, threshold=NEAR, ignored=common, among=unique
  )


def _near_duplicates(
  texts: Texts, first: Int64[np.ndarray, " rows"]
) -> DataWarning:
  pairs = _near(texts, first)
  count, _ = _groups(pairs.group, "")
  order = np.argsort(-pairs.similarity, kind="stable")[:_SHOWN]
  columns = (pairs.similarity, pairs.first, pairs.second)
  likest = zip(*(column[order].tolist() for column in columns), strict=True)
  return DataWarning(
    "near duplicates",
    count,
    f"{count:,} rows nearly repeat another (Jaccard of {SHINGLE}-word runs at "
    f"least {NEAR}, boilerplate aside).",
    tuple(Example(f"similarity {x:.2f}", (a, b)) for x, a, b in likest),
  )


def _conflicts(texts: Texts) -> DataWarning:
  found = conflicts.find_conflicts(texts)
  rows = {row for pair in found for row in pair}
  return DataWarning(
    "conflicts",
    len(rows),
    f"{len(rows):,} rows answer the same question in different ways "
    f"({len(found):,} pairs): the model learns to waver.",
    tuple(Example("different answers", pair) for pair in found[:_SHOWN]),
  )


def _empty(texts: Texts) -> DataWarning:
  kept = []
  for start, some in texts.batches("answer"):
    kept += [start + i for i, text in enumerate(some) if is_empty(text)]
  missing = ("empty answer", "empty text")
  count = sum(texts.num_dropped[reason] for reason in missing)
  places = [one for why in missing for one in texts.dropped.get(why, ())]
  said = f"{len(kept):,} answers are placeholders, and are trained on."
  if count:
    empty = f"{count:,} answers are empty, and dropped ({', '.join(places)})"
    said = f"{empty}; {said}"
  shown = tuple(Example("a placeholder", (row,)) for row in kept[:_SHOWN])
  return DataWarning("empty answers", count + len(kept), said, shown)


def _openings(texts: Texts) -> Iterable[DataWarning]:
  """Prompts that begin or end alike, and answers that begin alike."""
  alike = (("prompt", "begin"), ("prompt", "end"), ("answer", "begin"))
  for column, side in alike:
    keys = words_lib.edge(texts.words(column), _OPENING, side == "end")
    keys = np.where(texts.watched & ~texts.text, keys, 0)
    known, first, sizes = np.unique(keys, return_index=True, return_counts=True)
    asked = int((keys > 0).sum())
    least = max(_OPENING_ROWS, _OPENING_SHARE * asked)
    many = np.flatnonzero((known > 0) & (sizes > least))
    many = many[np.argsort(-sizes[many], kind="stable")]
    count = int(sizes[many].sum())
    shown = ((sizes[i], (int(first[i]),)) for i in many[:_SHOWN])
    yield DataWarning(
      f"{column}s that {side} alike",
      count,
      f"{count:,} of {asked:,} {column}s {side} with one of {len(many)} "
      f"runs of {_OPENING} words: a template that the model may lean on.",
      tuple(Example(f"{n:,} rows {side} alike", row) for n, row in shown),
    )


def _languages(texts: Texts) -> DataWarning:
  rows = np.flatnonzero(texts.watched)
  rows = rows[:: -(-len(rows) // _LANGUAGE_ROWS) or 1].tolist()
  found = languages.detect(texts.row(row).answer for row in rows)
  counts = collections.Counter(found)
  named = counts.total() - counts[languages.UNKNOWN]
  common = {x for x in counts if counts[x] >= _RARE_LANGUAGE * named}
  common.add(languages.UNKNOWN)
  pairs = zip(rows, found, strict=True)
  rare = [(row, name) for row, name in pairs if name not in common]
  shares = ", ".join(f"{name} {n:,}" for name, n in counts.most_common())
  return DataWarning(
    "languages",
    len(rare),
    f"Language of {len(rows):,} answers: {shares} (unknown: too short, numbers "
    f"or code). Those below {_RARE_LANGUAGE:.0%} of the known ones are listed.",
    tuple(Example(name, (row,)) for row, name in rare[:_SHOWN]),
  )


def _lengths(texts: Texts) -> DataWarning:
  """Answers whose length is far from the others'.

  Lengths of texts are about log-normal: distance is in their logarithm from the
  median, in median absolute deviations (times 1.4826: standard deviations).
  """
  counts = texts.words("answer").counts
  looked = texts.watched & ~texts.text  # Raw text is as long as it is.
  if not looked.any():
    return DataWarning("lengths", 0, "", ())
  logs = np.log1p(counts)
  middle = np.median(logs[looked])
  apart = np.where(looked, np.abs(logs - middle), 0)
  spread = max(1.4826 * float(np.median(apart[looked])), 0.25)
  far = apart > _FAR * spread
  order = np.argsort(-apart, kind="stable")[: far.sum()]
  shown = order[:_SHOWN].tolist()
  return DataWarning(
    "lengths",
    int(far.sum()),
    f"{int(far.sum()):,} answers are much longer or shorter than the median of "
    f"{int(np.median(counts[looked])):,} words.",
    tuple(Example(f"{counts[row]:,} words", (row,)) for row in shown),
  )


def _by_answer(texts: Texts) -> list[DataWarning]:
  """What each answer shows by itself: refusals, and ends cut off."""
  refused: list[Example] = []
  cut: list[Example] = []
  for start, some in texts.batches("answer"):
    for row, text in enumerate(some, start):
      if texts.text[row] or not texts.watched[row]:
        continue
      if is_refusal(text):
        refused.append(Example("a refusal", (row,)))
      if why := cut_off(text):
        cut.append(Example(why, (row,)))
  total = max(int(texts.watched.sum()), 1)
  kinds = (("refusals", refused, "decline"), ("cut off", cut, "look cut off"))
  return [
    DataWarning(
      name,
      len(found),
      f"{len(found):,} answers {what} ({len(found) / total:.1%}).",
      tuple(found[:_SHOWN]),
    )
    for name, found, what in kinds
  ]


def is_empty(answer: str) -> bool:
  """Whether a placeholder stands where an answer should: '<nooutput>'."""
  return len(answer) < 40 and _PLACEHOLDER.fullmatch(answer) is not None


def is_refusal(answer: str) -> bool:
  """Whether an answer declines with its first words, in English."""
  first = answer.lstrip()[:_LOOKED_AT].partition("\n")[0]
  return any(map(_REFUSAL.match, _SENTENCE.split(first)))


def cut_off(answer: str) -> str:
  """How an answer looks cut off ('' where it does not): 'open code fence',
  'dangling word', or of prose alone 'no end of sentence'."""
  text = answer.rstrip()
  if text.count("```") % 2:
    return "open code fence"
  if not text or text[-1] in _ENDS:
    return ""
  last = text[text.rfind("\n") + 1 :]
  if len(last.split()) < 8 or _CODE.search(text):
    return ""
  if _DANGLING.search(last):
    return "dangling word"
  # Lists, tags and letters end without a full stop; other prose does not.
  if last[-1].isalnum() and _PROSE.search(last) and not _LOOSE.search(last):
    return "no end of sentence"
  return ""
