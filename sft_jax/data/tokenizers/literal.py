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
  """A tokenizer that reads special tokens as text, and placeholders whole.

  Attributes:
    model: the tokenizer.
    cut: the placeholder between two characters that no token may join.
    names: {special token: placeholder}; tokens that take white space around
      them alike have one placeholder together.
    ids: of the placeholders, `cut` included.
  """

  model: tokenizers.Tokenizer
  cut: str
  names: dict[str, str]
  ids: frozenset[int]


class LiteralEncoder:
  """Encodes texts in which some special tokens are ordinary text.

  The `tokenizers` library reads either all special tokens as text
  (`encode_special_tokens`) or none. So the ones that are structure are
  replaced by placeholders, tokens that are not special, in a copy of the
  tokenizer that reads all special tokens as text:

      text      <s> user: what is <mask> ? </s>     literal: <mask>
      encoded    #  user: what is <mask> ?  #       k-th # -> k-th of <s>, </s>

  Where a vocabulary makes a special token even out of text (a Unigram model
  that has '<mask>' as a piece), its text is cut after the first character.

  Args:
    model: the tokenizer.
    special: {text: id} of the tokens that are structure.
    unknown: id of the token for unknown text, which any text may have.
    folder: for messages.
  """

  def __init__(
    self,
    model: tokenizers.Tokenizer,
    special: Mapping[str, int],
    unknown: int | None,
    folder: Path,
  ):
    self._original = model
    self._special = special
    self._forbidden = frozenset(special.values()) - {unknown}
    self._folder = folder
    self._pattern = any_of(special)
    self._copy = functools.lru_cache(maxsize=2)(self._make_copy)

  def encode_with_offsets(self, text: str, literal: Ranges) -> Encoded:
    """See `tokenizer.Tokenizer`."""
    for cuts in (False, True):
      ids, offsets = self._encode(text, literal, cuts)
      if ids is not None:
        return ids, offsets
    raise refusal(self._folder, text)

  def _encode(
    self, text: str, literal: Ranges, cuts: bool
  ) -> tuple[list[int] | None, list[tuple[int, int]]]:
    """Ids and offsets; None where a literal text became a special token."""
    copy = self._copy(self._unused_block(text))
    written: list[str] = []
    starts, ends = [], []  # In `text`, of each written character.
    structure: list[int] = []

    def write(new: str, start: int, end: int | None = None) -> None:
      written.append(new)
      if end is None:  # The text's own characters.
        starts.extend(range(start, start + len(new)))
        ends.extend(range(start + 1, start + len(new) + 1))
      else:
        starts.append(start)
        ends.append(end)

    at = 0
    for token in self._pattern.finditer(text):
      if not overlaps(token.span(), literal):
        write(text[at : token.start()], at)
        write(copy.names[token[0]], *token.span())
        structure.append(self._special[token[0]])
        at = token.end()
      elif cuts:
        write(text[at : token.start() + 1], at)
        at = token.start() + 1
        write(copy.cut, at, at)
    write(text[at:], at)
    encoding = copy.model.encode("".join(written), add_special_tokens=False)
    ids, offsets = [], []
    cut = copy.model.token_to_id(copy.cut)
    following = iter(structure)
    for number, (a, b) in zip(encoding.ids, encoding.offsets, strict=True):
      if number == cut:
        continue
      if number in copy.ids:
        number = next(following)
      elif number in self._forbidden:
        return None, []
      ids.append(number)
      start = starts[a] if a < len(starts) else len(text)
      offsets.append((start, ends[b - 1] if b > a else start))
    assert next(following, None) is None
    return ids, offsets

  def _unused_block(self, text: str) -> int:
    """The number of a block of placeholders that the text has none of."""
    if text.isascii():
      return 0
    used = {(ord(one) - _FIRST) // _BLOCK for one in set(text)}
    return next(block for block in range(_BLOCKS) if block not in used)

  def _make_copy(self, block: int) -> _Copy:
    model = tokenizers.Tokenizer.from_str(self._original.to_str())
    added = self._original.get_added_tokens_decoder().values()
    # Structure by its name or as a stop token, and not by its own flag.
    structure = [one for one in added if one.content in self._special]
    model.add_special_tokens(structure)
    model.encode_special_tokens = True
    first = _FIRST + block * _BLOCK
    flags = {one.content: (one.lstrip, one.rstrip) for one in added}
    kinds = [(left, right) for left in (False, True) for right in (False, True)]
    marks = {kind: chr(first + 1 + i) for i, kind in enumerate(kinds)}
    tokens = [
      tokenizers.AddedToken(
        mark, lstrip=left, rstrip=right, normalized=False, special=False
      )
      for (left, right), mark in [((False, False), chr(first)), *marks.items()]
    ]
    model.add_tokens(tokens)
    return _Copy(
      model,
      cut=chr(first),
      names={text: marks[flags[text]] for text in self._special},
      ids=frozenset(cast(int, model.token_to_id(x.content)) for x in tokens),
    )
