"""Two texts side by side, with the words marked in which they differ."""

import difflib
import re
from typing import NamedTuple

from sft_jax.reporting.html.elements import Element, join, tag

# Below this share of the shorter one's words two texts have nothing to do with
# each other: marks on every word would say less than one line.
_ALIKE = 0.3
# Comparing takes the product of the numbers of words.
_MAX_WORDS = 2000


class Marked(NamedTuple):
  """Two texts with their differences marked.

  Attributes:
    old, new: the texts; words only in one are <del> there, <ins> here.
    said: what is to be known of them as a whole, '' where marks say it.
  """

  old: Element
  new: Element
  said: str


def mark(old: str, new: str) -> Marked:
  """Marks the words that only one of two texts has, in their order."""
  if old == new:
    return Marked(join([old]), join([new]), "the same")
  a, b = _words(old), _words(new)
  if max(len(a), len(b)) > _MAX_WORDS:
    return Marked(join([old]), join([new]), "too long to be compared")
  found = difflib.SequenceMatcher(None, a, b, autojunk=False)
  # Spaces and full stops are in both of any two texts.
  same = sum(
    word[0].isalnum()
    for start, _, size in found.get_matching_blocks()
    for word in a[start : start + size]
  )
  shorter = min(sum(w[0].isalnum() for w in words) for words in (a, b))
  if same < _ALIKE * shorter:
    return Marked(join([old]), join([new]), "hardly a word in common")
  before, after = [], []
  for kind, a0, a1, b0, b1 in found.get_opcodes():
    left, right = "".join(a[a0:a1]), "".join(b[b0:b1])
    if kind == "equal":
      before.append(left)
      after.append(right)
    else:
      before += [tag("del", left)] if left else []
      after += [tag("ins", right)] if right else []
  return Marked(join(before), join(after), "")


def _words(text: str) -> list[str]:
  """Words, spaces and signs, which together are the text."""
  return re.findall(r"\w+|\s+|[^\w\s]", text)
