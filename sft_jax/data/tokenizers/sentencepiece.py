"""The tokenizer of a tokenizer.model: SentencePiece, and tokens around it."""

import re
from collections.abc import Sequence

import sentencepiece

from sft_jax.data.tokenizers import files
from sft_jax.data.tokenizers import literal as literals
from sft_jax.data.tokenizers.tokenizer import Tokenizer

# Appended to a SentencePiece model, this overrides one field of it (protocol
# buffers merge when concatenated): normalizer_spec { add_dummy_prefix: false }.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
  """Runs on the `sentencepiece` library; see `tokenizer.Tokenizer`.

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
    # What the config says wins over what the model says, null included.
    named = {
      f"{name}_token": model.id_to_piece(number)
      for name in ("bos", "eos", "pad", "unk")
      if (number := getattr(model, f"{name}_id")()) >= 0
      and f"{name}_token" not in read.config
    }
    read = read._replace(named_tokens=named | read.named_tokens)
    super().__init__(read, ids)
    special = {
      x for x, (_, flags) in read.added.items() if flags.get("special")
    }
    special |= {x for x, i in pieces.items() if model.is_control(i)}
    special |= {*read.special}
    self.special_tokens = {
      text: number
      for text, number in ids.items()
      if text in special or number in self.stop_ids
    }
    self._whole = self.special_tokens | added
    self._texts = {number: text for text, number in self._whole.items()}
    self._split = re.compile(f"({literals.any_of(self._whole).pattern})")
    unknown = self.named_tokens.get("unk_token")
    # Pieces of text that the model's own encoder may find are among them.
    self._forbidden = frozenset(
      n for text, n in self.special_tokens.items() if text != unknown
    )
    self._pieces = ids

  def encode_with_offsets(
    self, text: str, literal: literals.Ranges = ()
  ) -> literals.Encoded:
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []

    def read(start: int, end: int) -> None:
      """Text without tokens that are to be read whole."""
      if start == end:
        return
      model = self._rest if start else self._first
      made = model.encode(text[start:end], return_type="offset_mapping")
      if literal and self._forbidden.intersection(made["ids"]):
        # The model takes such a token for a piece of text: cut it.
        token = self._split.search(text, start, end)
        if token is None or token.start() + 1 == end:
          raise literals.refusal(self.folder, text)
        read(start, token.start() + 1)
        read(token.start() + 1, end)
        return
      ids.extend(made["ids"])
      offsets.extend((start + a, start + b) for a, b in made["offsets"])

    at = 0
    for token in self._split.finditer(text):
      if token[0] in self.special_tokens and literals.overlaps(
        token.span(), literal
      ):
        continue
      read(at, token.start())
      ids.append(self._whole[token[0]])
      offsets.append(token.span())
      at = token.end()
    read(at, len(text))
    return ids, offsets

  def id_of(self, text: str) -> int | None:
    return self._pieces.get(text)

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
