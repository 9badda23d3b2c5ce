"""Special tokens in a text as the ordinary text they are written in."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

Ranges = Sequence[tuple[int, int]]

# In a tokenizer that escapes, special tokens are written as characters of
# Unicode's private plane 15, so that their usual text is text.
_FIRST = 0xF0000


def inside(span: tuple[int, int], ranges: Ranges) -> bool:
  """Whether a span shares a character with one of the ranges."""
  return any(a < span[1] and span[0] < b for a, b in ranges)


class Escaper:
  """A tokenizer whose special tokens go by other names.

  Where a special token is structure, its new name is put in the text; where
  it is something said, it stays, and is no token any more. Everything else
  about the tokenizer is as it was, so that the ids around it are the same.

  Args:
    model: the tokenizer.
    special: {text: id} of the tokens that are structure.
    folder: for messages.

  Raises:
    ValueError: a tokenizer in which the text of a special token is made of
      other tokens (by merges), so that it cannot be renamed.
  """

  def __init__(
    self,
    model: tokenizers.Tokenizer,
    special: Mapping[str, int],
    folder: Path,
  ):
    self._names = {text: chr(_FIRST + i) for i, text in enumerate(special)}
    self._ids = frozenset(special.values())
    self._folder = folder
    longest_first = sorted(special, key=len, reverse=True)
    self._special = re.compile("|".join(map(re.escape, longest_first)))
    state = json.loads(model.to_str())
    # What is added around a text has a name too; nothing is added here.
    state["post_processor"] = None
    for token in state["added_tokens"]:
      token["content"] = self._names.get(token["content"], token["content"])
    vocab = state["model"]["vocab"]
    if isinstance(vocab, dict):
      vocab = {self._names.get(text, text): i for text, i in vocab.items()}
    else:  # Unigram: [text, score].
      vocab = [[self._names.get(text, text), score] for text, score in vocab]
    state["model"]["vocab"] = vocab
    unknown = state["model"].get("unk_token")
    if unknown in self._names:
      state["model"]["unk_token"] = self._names[unknown]
    try:
      self._model = tokenizers.Tokenizer.from_str(json.dumps(state))
    except Exception as error:  # The library raises bare Exception.
      raise self._refusal(str(error)) from error
    for text, number in special.items():
      if self._model.token_to_id(self._names[text]) != number:
        raise self._refusal(f"{text!r}, which cannot be told from text")

  def encode_with_offsets(
    self, text: str, literal: Ranges
  ) -> tuple[list[int], list[tuple[int, int]]]:
    """See `tokenizers.Tokenizer`."""
    written, moved, at, shift = [], [], 0, 0
    for token in self._special.finditer(text):
      if inside(token.span(), literal):
        continue
      written += [text[at : token.start()], self._names[token[0]]]
      at = token.end()
      # From here on, characters stand so much further on in the text.
      shift += len(token[0]) - 1
      moved.append((token.end() - shift, shift))
    written.append(text[at:])
    encoding = self._model.encode("".join(written), add_special_tokens=False)
    offsets, shift, seen = [], 0, 0
    for start, end in encoding.offsets:
      while seen < len(moved) and moved[seen][0] <= start:
        shift = moved[seen][1]
        seen += 1
      ends = shift
      for begin, more in moved[seen:]:
        if begin > end:
          break
        ends = more
      offsets.append((start + shift, end + ends))
    return encoding.ids, offsets

  def _refusal(self, got: str) -> ValueError:
    return ValueError(
      f"{self._folder}/tokenizer.json: got {got}; expected a tokenizer that "
      "can read its special tokens as text (data.control_tokens='escape'). "
      "Set data.control_tokens to error or allow."
    )
