"""Text to token ids and back: one protocol, two kinds of tokenizer file."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import sentencepiece
import tokenizers

from sft_jax.data import tokenizer_folder

# Appended to a SentencePiece model, this overrides one field of it (protocol
# buffers merge when concatenated): normalizer_spec { add_dummy_prefix: false }.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


@runtime_checkable
class Tokenizer(Protocol):
  """What the rest of the program knows of a tokenizer.

  Attributes:
    vocab_size: one more than the largest id.
    bos_id, eos_id, pad_id: None where the tokenizer has no such token.
    stop_ids: ids at which generation stops, ascending.
    chat_template: the Jinja source; None where the folder has none.
    named_tokens: {'bos_token': '<s>', ...}, the variables templates read.
    special_tokens: {text: id} of tokens that are structure, not text; the
      stop tokens are among them.
    folder: where it was loaded from.
    files: the files of the folder that belong to it.
    fingerprint: a digest of those files.
  """

  vocab_size: int
  bos_id: int | None
  eos_id: int | None
  pad_id: int | None
  stop_ids: tuple[int, ...]
  chat_template: str | None
  named_tokens: dict[str, str]
  special_tokens: dict[str, int]
  folder: Path
  files: tuple[Path, ...]
  fingerprint: str

  def encode(self, text: str) -> list[int]:
    """Ids of a text. Special tokens in it are recognised; none is added."""
    ...

  def encode_with_offsets(
    self, text: str
  ) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids, and for each the (start, end) characters of the text it covers."""
    ...

  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    """The text of ids; special tokens are left out or written as text."""
    ...


def load_tokenizer(folder: str | Path) -> Tokenizer:
  """The tokenizer of a model folder, with its chat template and stop ids.

  Reads tokenizer.json, or else tokenizer.model (SentencePiece). Generation
  stops at eos_token_id of generation_config.json (or else of config.json) and
  at the eos_token of tokenizer_config.json.

  Raises:
    ValueError: no folder, or neither file in it; a token that the folder's
      files number differently, or that the vocabulary does not hold.
  """
  folder = Path(folder)
  if not folder.is_dir():
    raise ValueError(
      f"{folder}: got no such folder; expected a model folder. "
      "Check model.path."
    )
  read = tokenizer_folder.read(folder)
  if (folder / "tokenizer.json").is_file():
    return HuggingFaceTokenizer(read)
  if (folder / "tokenizer.model").is_file():
    return SentencePieceTokenizer(read)
  raise ValueError(
    f"{folder}: got {sorted(path.name for path in folder.iterdir())}; expected "
    "tokenizer.json or tokenizer.model. Copy it from the model's repository."
  )


class _Base:
  """The attributes of `Tokenizer`, resolved from a folder and {text: id}."""

  def __init__(
    self, read: tokenizer_folder.Folder, ids: Mapping[str, int], size: int
  ):
    self.folder, self.files = read.path, read.files
    self.fingerprint = read.fingerprint
    self.chat_template = read.chat_template
    self.named_tokens = read.named_tokens
    self.vocab_size = size
    for text in read.special:
      if text not in ids:
        raise ValueError(
          f"{read.path}/tokenizer_config.json: got the special token {text!r}; "
          "expected one of the vocabulary. Correct it or add the token."
        )
    named = read.named_tokens
    self.bos_id = ids[named["bos_token"]] if "bos_token" in named else None
    self.eos_id = ids[named["eos_token"]] if "eos_token" in named else None
    self.pad_id = ids[named["pad_token"]] if "pad_token" in named else None
    ends = () if self.eos_id is None else (self.eos_id,)
    self.stop_ids = tuple(sorted({*read.stop_ids, *ends}))
    for stop in self.stop_ids:
      if not 0 <= stop < size:
        raise ValueError(
          f"{read.path}: got eos_token_id {stop}; expected an id below "
          f"{size}. Correct generation_config.json."
        )


class HuggingFaceTokenizer(_Base):
  """A tokenizer.json, run by the `tokenizers` library. See `Tokenizer`."""

  def __init__(self, read: tokenizer_folder.Folder):
    path = read.path / "tokenizer.json"
    try:
      self._model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises bare Exception.
      raise ValueError(
        f"{path}: got {error}; expected a file of the tokenizers library. "
        "Copy it again."
      ) from error
    # What a file says of padding and cutting is for other uses of it.
    self._model.no_padding()
    self._model.no_truncation()
    for text, (number, flags) in read.added.items():
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
    return self._model.encode(text, add_special_tokens=False).ids

  def encode_with_offsets(
    self, text: str
  ) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = self._model.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets

  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    return self._model.decode(list(ids), skip_special_tokens=skip_special)


class SentencePieceTokenizer(_Base):
  """A tokenizer.model, run by the `sentencepiece` library. See `Tokenizer`.

  SentencePiece never reads control tokens out of text, so text is split at
  them here. The space that a model may put before text goes before the very
  first piece of text only (as transformers does, unless the folder's config
  says `legacy`: then after each special token too).
  """

  def __init__(self, read: tokenizer_folder.Folder):
    path = read.path / "tokenizer.model"
    proto = path.read_bytes()
    try:
      self._first = sentencepiece.SentencePieceProcessor(model_proto=proto)
      self._rest = sentencepiece.SentencePieceProcessor(
        model_proto=proto + _NO_DUMMY_PREFIX
      )
    except RuntimeError as error:
      raise ValueError(
        f"{path}: got {error}; expected a SentencePiece model. Copy it again."
      ) from error
    if read.config.get("legacy"):
      self._rest = self._first
    model = self._first
    pieces = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    added = {text: number for text, (number, _) in read.added.items()}
    ids = pieces | added
    defaults = {
      "bos_token": model.bos_id(),
      "eos_token": model.eos_id(),
      "pad_token": model.pad_id(),
      "unk_token": model.unk_id(),
    }
    named = {
      name: model.id_to_piece(number)
      for name, number in defaults.items()
      if number >= 0
    }
    # What the config says wins over what the model says, null included.
    named = {k: v for k, v in named.items() if k not in read.config}
    read = read._replace(named_tokens=named | read.named_tokens)
    super().__init__(read, ids, max(ids.values()) + 1)
    control = {text: i for text, i in pieces.items() if model.is_control(i)}
    structure = {
      text: number
      for text, number in ids.items()
      if text in read.special or number in self.stop_ids
    }
    self.special_tokens = (
      control
      | structure
      | {
        text: number
        for text, (number, flags) in read.added.items()
        if flags.get("special")
      }
    )
    self._whole = self.special_tokens | added
    self._texts = {number: text for text, number in self._whole.items()}
    longest_first = sorted(self._whole, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
    self._split = re.compile(f"({pattern})")

  def encode(self, text: str) -> list[int]:
    return self.encode_with_offsets(text)[0]

  def encode_with_offsets(
    self, text: str
  ) -> tuple[list[int], list[tuple[int, int]]]:
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    at = 0
    for part in self._split.split(text):
      if part in self._whole:
        ids.append(self._whole[part])
        offsets.append((at, at + len(part)))
      elif part:
        model = self._first if at == 0 else self._rest
        made = model.encode(part, return_type="offset_mapping")
        ids.extend(made["ids"])
        offsets.extend((at + a, at + b) for a, b in made["offsets"])
      at += len(part)
    return ids, offsets

  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    texts: list[str] = []
    run: list[int] = []

    def flush():
      model = self._rest if any(texts) else self._first
      if run:
        texts.append(model.decode(run))
        run.clear()

    for number in map(int, ids):
      if number in self._texts:
        flush()
        texts.append("" if skip_special else self._texts[number])
      else:
        run.append(number)
    flush()
    return "".join(texts)
