"""Special tokens in a text, read as the ordinary text they are written in."""

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import tokenizers

Ranges = Sequence[tuple[int, int]]
Encoded = tuple[list[int], list[tuple[int, int]]]

# Placeholders are characters of Unicode's private plane 15: blocks of 8, the
# first of which cuts a text, and the others stand for special tokens.
_FIRST, _BLOCK, _BLOCKS = 0xF0000, 8, 8000


def overlaps(span: tuple[int, int], ranges: Ranges) -> bool:
  """Whether a span shares a character with one of the ranges."""
  return any(a < span[1] and span[0] < b for a, b in ranges)


def any_of(texts: Collection[str]) -> re.Pattern[str]:
  """Matches any of the texts, the longest first; of none, nothing."""
  longest_first = sorted(texts, key=len, reverse=True)
  return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def refusal(folder: Path, text: str) -> ValueError:
  """Where a special token comes even of its own text, cut in two."""
  return ValueError(
    f"{folder}: got a tokenizer that makes a special token of ordinary text, "
    f"in {text[:60]!r}; expected one that can read it as text. Remove the "
    "text, or set data.control_tokens to allow."
  )


class _Copy(NamedTuple):
  """A tokenizer that reads special tokens as text, and placeholders whole."""

  model: tokenizers.Tokenizer  # The tokenizer.
  # {special token: placeholder}, and '' -> the placeholder that cuts.
  marks: dict[str, str]
  ids: list[int]  # Of the placeholders, the one that cuts first.


class LiteralEncoder:
  """Encodes texts in which some special tokens are ordinary text.

  The `tokenizers` library reads either all special tokens as text
  (`encode_special_tokens`) or none. So those that are structure (`special`) are
  replaced by placeholders, tokens that are not special, in a copy that reads
  all special tokens as text:

      text      <s> user: what is <mask> ? </s>     literal: <mask>
      encoded    #  user: what is <mask> ?  #       k-th # -> k-th of <s>, </s>

  Where a vocabulary makes a special token even out of text (a Unigram model
  that has '<mask>' as a piece), its text is cut after the first character.
  `unknown` is the id of unknown text, which any text may have.
  """

  def __init__(
    self,
    model: tokenizers.Tokenizer,
    special: Mapping[str, int],
    unknown: int | None,
    folder: Path,
  ):
    self._original, self._special, self._folder = model, special, folder
    self._forbidden = frozenset(special.values()) - {unknown}
    self._pattern = any_of(special)
    self._copy = functools.lru_cache(maxsize=2)(self._make_copy)

  def encode(self, text: str, literal: Ranges) -> Encoded:
    for cuts in (False, True):
      if found := self._encode(text, literal, cuts):
        return found
    raise refusal(self._folder, text)

  def _encode(self, text: str, literal: Ranges, cuts: bool) -> Encoded | None:
    """Ids and offsets; None where a literal text became a special token."""
    # A text may hold characters of a block of placeholders: not of this one.
    used = {(ord(one) - _FIRST) // _BLOCK for one in set(text)}
    copy = self._copy(next(i for i in range(_BLOCKS) if i not in used))
    written: list[str] = []
    spans: list[tuple[int, int]] = []  # In `text`, of each written character.
    structure: list[int] = []
    at = 0

    def keep(end: int) -> None:
      written.append(text[at:end])
      spans.extend((i, i + 1) for i in range(at, end))

    for token in self._pattern.finditer(text):
      start, end = token.span()
      if not overlaps((start, end), literal):
        keep(start)
        written.append(copy.marks[token[0]])
        spans.append((start, end))
        structure.append(self._special[token[0]])
        at = end
      elif cuts:
        keep(start + 1)
        at = start + 1
        written.append(copy.marks[""])
        spans.append((at, at))
    keep(len(text))
    encoding = copy.model.encode("".join(written), add_special_tokens=False)
    spans.append((len(text), len(text)))
    ids, offsets = [], []
    for number, (a, b) in zip(encoding.ids, encoding.offsets, strict=True):
      if number in self._forbidden:
        return None
      if number != copy.ids[0]:
        ids.append(structure.pop(0) if number in copy.ids else number)
        offsets.append((spans[a][0], spans[b - 1][1] if b > a else spans[a][0]))
    assert not structure
    return ids, offsets

  def _make_copy(self, block: int) -> _Copy:
    model = tokenizers.Tokenizer.from_str(self._original.to_str())
    added = self._original.get_added_tokens_decoder().values()
    structure = [one for one in added if one.content in self._special]
    # Structure by name or as a stop token, whatever the token's own flag.
    model.add_special_tokens(structure)
    model.encode_special_tokens = True
    marks = [chr(_FIRST + _BLOCK * block + i) for i in range(5)]
    for i, mark in enumerate(marks):
      strips = {"lstrip": i > 2, "rstrip": i in (2, 4)}
      token = tokenizers.AddedToken(mark, **strips, normalized=False)
      model.add_tokens([token])
    own = {x.content: marks[1 + 2 * x.lstrip + x.rstrip] for x in structure}
    ids = [cast(int, model.token_to_id(mark)) for mark in marks]
    return _Copy(model, own | {"": marks[0]}, ids)
