"""The tokenizer of a tokenizer.json, or of a vocab.json and merges.txt."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from sft_jax.data.tokenizers import files, vocab_merges
from sft_jax.data.tokenizers import literal as escapes
from sft_jax.data.tokenizers.literal import Ranges


class HuggingFaceTokenizer(files.Resolved):
  """Runs on the `tokenizers` library; see `tokenizers.Tokenizer`."""

  def __init__(self, read: files.Folder):
    path = read.path / "tokenizer.json"
    if path.is_file():
      self._model = _from_json(path)
    else:
      self._model, named = vocab_merges.load(read.path, read.config)
      named = named | read.named_tokens
      special = tuple(dict.fromkeys([*named.values(), *read.special]))
      read = read._replace(named_tokens=named, special=special)
    # What a file says of padding and cutting is for other uses of it.
    self._model.no_padding()
    self._model.no_truncation()
    by_id = sorted(read.added.items(), key=lambda added: added[1][0])
    for text, (number, flags) in by_id:
      if self._model.token_to_id(text) is None:
        self._model.add_tokens([tokenizers.AddedToken(text, **flags)])
      if (got := self._model.token_to_id(text)) != number:
        raise ValueError(
          f"{path}: got id {got} for {text!r}; expected {number} as in "
          "tokenizer_config.json. Use the two files of one model."
        )
    stops = map(self._model.id_to_token, read.stop_ids)
    self._promote(*read.special, *filter(None, stops))
    ids = self._model.get_vocab(with_added_tokens=True)
    super().__init__(read, ids, max(ids.values()) + 1)
    self.special_tokens = {
      one.content: number
      for number, one in self._model.get_added_tokens_decoder().items()
      if one.special or one.content in read.special or number in self.stop_ids
    }

  def _promote(self, *texts: str) -> None:
    """Has ordinary tokens of these texts read whole, as transformers does."""
    added = self._model.get_added_tokens_decoder().values()
    known = {one.content for one in added}
    for text in texts:
      if text not in known and self._model.token_to_id(text) is not None:
        self._model.add_special_tokens([text])

  def encode(self, text: str) -> list[int]:
    return self._searched(self._model.encode, text).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    # "Fast" leaves out the offsets.
    made = self._searched(self._model.encode_batch_fast, list(texts))
    return [encoding.ids for encoding in made]

  def encode_with_offsets(
    self, text: str, literal: Ranges = ()
  ) -> tuple[list[int], list[tuple[int, int]]]:
    if literal:
      return self._escaper.encode_with_offsets(text, literal)
    encoding = self._searched(self._model.encode, text)
    return encoding.ids, encoding.offsets

  def _searched(self, encode: Callable[..., Any], text: Any) -> Any:
    """What the library encodes; no BOS is added, for templates write it.

    Its regular expressions come with models of others. The library gives one
    up after ten million steps, in half a second, by a panic that is no
    Exception.
    """
    try:
      return encode(text, add_special_tokens=False)
    except BaseException as error:
      if type(error).__name__ != "PanicException":
        raise
      raise ValueError(
        f"{self.folder}: its tokenizer gave up on {str(text)[:60]!r} "
        f"({error}); expected one that reads any text. Its regular "
        "expressions may be an attack: use the tokenizer of a model you trust."
      ) from None

  @functools.cached_property
  def _escaper(self) -> escapes.Escaper:
    return escapes.Escaper(self._model, self.special_tokens, self.folder)

  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    return self._model.decode(list(ids), skip_special_tokens=skip_special)


def _from_json(path: Path) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # The library raises bare Exception.
    raise ValueError(
      f"{path}: got {error}; expected a file of the tokenizers library. "
      "Copy it again."
    ) from error
