"""The tokenizer of a tokenizer.model: SentencePiece, and tokens around it."""

import re
from collections.abc import Sequence

import sentencepiece

from sft_jax.data.tokenizers import files
from sft_jax.data.tokenizers import literal as escapes
from sft_jax.data.tokenizers.literal import Ranges

# Appended to a SentencePiece model, this overrides one field of it (protocol
# buffers merge when concatenated): normalizer_spec { add_dummy_prefix: false }.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(files.Resolved):
  """Runs on the `sentencepiece` library; see `tokenizers.Tokenizer`.

  SentencePiece never reads control tokens out of text, so text is split at
  them here. The space that a model may put before text goes before the very
  first piece of text only (as transformers does, unless the folder's config
  says `legacy`: then after each special token too).
  """

  def __init__(self, read: files.Folder):
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

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def encode_with_offsets(
    self, text: str, literal: Ranges = ()
  ) -> tuple[list[int], list[tuple[int, int]]]:
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    at = 0
    for part in self._parts(text, literal):
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

  def _parts(self, text: str, literal: Ranges) -> list[str]:
    """The text cut at its tokens, those but special ones that are literal."""
    if not literal:
      return self._split.split(text)
    parts, at = [], 0
    for token in self._split.finditer(text):
      if not escapes.inside(token.span(), literal):
        parts += [text[at : token.start()], token[0]]
        at = token.end()
    return [*parts, text[at:]]

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
