"""The tokenizer of a tokenizer.json, or of a vocab.json and merges.txt."""

import base64
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from sft_jax.data.tokenizers import files
from sft_jax.data.tokenizers.literal import Encoded, LiteralEncoder, Ranges
from sft_jax.data.tokenizers.tokenizer import Tokenizer

# How Qwen2 cuts text before merging: digits one by one, line breaks together.
_QWEN2 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By the class that a folder names (less 'Fast'; GPT-2's where it names none):
# what <|endoftext|> is where no file says so.
_DEFAULTS = {
  "GPT2Tokenizer": ("bos_token", "eos_token"),
  "CodeGenTokenizer": ("bos_token", "eos_token"),
  "Qwen2Tokenizer": ("eos_token", "pad_token"),
}
# Characters that a normalizer or decoder may make of one. Unicode's own
# normal forms make at most 18.
_MAX_GROWTH = 256
# Of a text, as the normalizer makes it: the library keeps 17 bytes of each.
_MOST_CHARACTERS = 1 << 28
_GROWTH = {"NFKC": 18, "NFKD": 18, "NFD": 4, "NFC": 3, "Lowercase": 3}


class HuggingFaceTokenizer(Tokenizer):
  """Runs on the `tokenizers` library; see `tokenizer.Tokenizer`."""

  def __init__(self, read: files.Folder):
    path = read.path / "tokenizer.json"
    if path.is_file():
      self._model, growth = _from_json(path)
    else:
      growth = _GROWTH["NFC"]
      self._model, named = _from_vocab_and_merges(read.path, read.config)
      named |= read.named_tokens
      special = tuple(dict.fromkeys([*named.values(), *read.special]))
      read = read._replace(named_tokens=named, special=special)
    self._longest = int(_MOST_CHARACTERS / growth)
    # What a file says of padding and cutting is for other uses of it.
    self._model.no_padding()
    self._model.no_truncation()
    if getattr(self._model.model, "dropout", None):
      self._model.model.dropout = None  # pyright: ignore  # Random ids.
    by_id = sorted(read.added.items(), key=lambda added: added[1][0])
    for text, (number, flags) in by_id:
      if self._model.token_to_id(text) is None:
        self._model.add_tokens([tokenizers.AddedToken(text, **flags)])
      if (got := self._model.token_to_id(text)) != number:
        raise ValueError(
          f"{path}: got id {got} for {text!r}; expected {number} as in "
          "tokenizer_config.json. Use the two files of one model."
        )
    # Ordinary tokens that are special here are read whole, as by transformers.
    known = {x.content for x in self._model.get_added_tokens_decoder().values()}
    stops = map(self._model.id_to_token, read.stop_ids)
    for text in {*read.special, *stops} - {*known, None}:
      if self._model.token_to_id(text) is not None:
        self._model.add_special_tokens([text])
    ids = self._model.get_vocab(with_added_tokens=True)
    if not read.config and "bos_token" not in read.named_tokens:
      # A tokenizer.json by itself: what it puts before a text.
      before = self._model.encode("").ids[:1]
      texts = [text for text, number in ids.items() if [number] == before]
      named = dict.fromkeys(["bos_token"][: len(texts)], *texts)
      read = read._replace(named_tokens=named | read.named_tokens)
    super().__init__(read, ids)
    self.special_tokens = {
      one.content: number
      for number, one in self._model.get_added_tokens_decoder().items()
      if one.special or one.content in read.special or number in self.stop_ids
    }

  def id_of(self, text: str) -> int | None:
    return self._model.token_to_id(text)

  def encode(self, text: str) -> list[int]:
    return self._searched(self._model.encode, text).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    # "Fast" leaves out the offsets.
    made = self._searched(self._model.encode_batch_fast, list(texts))
    return [encoding.ids for encoding in made]

  def encode_with_offsets(self, text: str, literal: Ranges = ()) -> Encoded:
    if literal:
      encode = lambda text, **_: self._literal.encode(text, literal)
      return self._searched(encode, text)
    encoding = self._searched(self._model.encode, text)
    return encoding.ids, encoding.offsets

  def _searched(self, encode: Callable[..., Any], text: Any) -> Any:
    """What the library encodes; no BOS is added, for templates write it."""
    texts, most = [text] if isinstance(text, str) else text, self._longest
    if (longest := max(map(len, texts), default=0)) > most:
      raise ValueError(
        f"{self.folder}: got a text of {longest} characters; expected at most "
        f"{most}, for its tokenizer may make many of one. Cut the row, or use "
        "the tokenizer of another model."
      )
    return self._guarded(lambda: encode(text, add_special_tokens=False), text)

  def _guarded(self, function: Callable[[], Any], given: Any) -> Any:
    """The library's answer, or what it gave up on: it raises bare Exceptions,
    and panics that are none, as of a regex that takes too long."""
    try:
      return function()
    except BaseException as error:
      if type(error).__name__ not in ("PanicException", "Exception"):
        raise
      raise ValueError(
        f"{self.folder}: its tokenizer gave up on {str(given)[:60]!r} "
        f"({error}); expected one that reads any text. It may be an attack: "
        "use the tokenizer of a model you trust."
      ) from None

  @functools.cached_property
  def _literal(self) -> LiteralEncoder:
    unknown = self.special_tokens.get(self.named_tokens.get("unk_token", ""))
    special, folder = self.special_tokens, self.folder
    return LiteralEncoder(self._model, special, unknown, folder)

  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    given, model = list(ids), self._model
    decode = lambda: model.decode(given, skip_special_tokens=skip_special)
    return self._guarded(decode, ids)


def _from_json(path: Path) -> tuple[tokenizers.Tokenizer, float]:
  """The library's tokenizer, and how far its normalizer lengthens a text.

  The library aborts the process where it cannot allocate, at loading (a
  precompiled map that claims more than it holds) or in encoding (replacements
  of replacements). So both are computed from the file first.
  """
  try:
    state = json.loads(path.read_text(encoding="utf-8"))
    for key in ("decoder", "normalizer"):
      if (growth := _growth(state[key])) > _MAX_GROWTH:
        most = f"{growth:g} characters of one, more than {_MAX_GROWTH}"
        raise ValueError(f"a {key} that makes up to {most}")
    return tokenizers.Tokenizer.from_file(str(path)), growth
  except BaseException as error:  # Bare ones, and panics that are no Exception.
    if isinstance(error, KeyboardInterrupt | SystemExit):
      raise
    raise ValueError(
      f"{path}: got {error}; expected a file of the tokenizers library. "
      "Copy it again, from a model you trust."
    ) from error


def _growth(part: dict[str, Any] | None) -> float:
  """How many characters a normalizer or decoder may make of one.

  Raises ValueError: a precompiled map that is shorter than it says.
  """
  part = part or {}
  for key in ("normalizers", "decoders"):
    if key in part:
      return math.prod(map(_growth, part[key]))
  if part.get("type") == "Replace":
    content, pattern = len(part["content"]), part["pattern"].get("String")
    # A regular expression may match between characters.
    return max(1.0, content / len(pattern)) if pattern else 1 + content
  if part.get("type") == "Prepend":
    return 1.0 + len(part["prepend"])
  if part.get("type") == "Precompiled":
    # The size of a trie in bytes, the trie, and texts that end in 0.
    data = base64.b64decode(part["precompiled_charsmap"] or "")
    end = 4 + int.from_bytes(data[:4], "little")
    if end > max(4, len(data)):
      raise ValueError(f"a precompiled map of {len(data)} bytes, not {end}")
    return max(map(len, data[end:].split(b"\0")))
  return _GROWTH.get(str(part.get("type")), 1)


def _from_vocab_and_merges(
  folder: Path, config: dict[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
  """The tokenizer, and special tokens by name unless the config names others.

  Raises ValueError: an unknown tokenizer_class; files that are no tokenizer.
  """
  named = str(config.get("tokenizer_class") or "GPT2Tokenizer")
  if (kind := named.removesuffix("Fast")) not in _DEFAULTS:
    raise ValueError(
      f"{folder}/tokenizer_config.json: got tokenizer_class {named!r} without "
      f"a tokenizer.json; expected one of {', '.join(_DEFAULTS)}. Save the "
      "tokenizer as tokenizer.json (transformers' save_pretrained does)."
    )
  names = (str(folder / "vocab.json"), str(folder / "merges.txt"))
  try:
    model = tokenizers.Tokenizer(models.BPE.from_file(*names))
  except Exception as error:  # The library raises bare Exception.
    raise ValueError(
      f"{folder}: got {error}; expected the vocab.json and merges.txt of one "
      "tokenizer. Copy them again."
    ) from error
  qwen, space = kind == "Qwen2Tokenizer", bool(config.get("add_prefix_space"))
  how = {"add_prefix_space": space, "use_regex": not qwen}
  bytes_of = pre_tokenizers.ByteLevel(**how)
  model.pre_tokenizer = bytes_of
  if qwen:
    model.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN2), "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
  model.decoder = decoders.ByteLevel()
  end = "<|endoftext|>"
  names = _DEFAULTS[kind] if model.token_to_id(end) is not None else ()
  return model, {name: end for name in names if name not in config}
