"""The tokenizer of a tokenizer.model: SentencePiece, and tokens around it."""

import itertools
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
    load = sentencepiece.SentencePieceProcessor
    try:
      self._first = self._rest = model = load(model_proto=proto)
      if not read.config.get("legacy"):
        self._rest = load(model_proto=proto + _NO_DUMMY_PREFIX)
    except RuntimeError as error:
      raise ValueError(
        f"{path}: got {error}; expected a SentencePiece model. Copy it again."
      ) from error
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
    special = {x for x, (_, how) in read.added.items() if how.get("special")}
    special |= {x for x, i in pieces.items() if model.is_control(i)}
    special |= {*read.special}
    self.special_tokens = {
      x: i for x, i in ids.items() if x in special or i in self.stop_ids
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
      span, special = token.span(), token[0] in self.special_tokens
      if not (special and literals.overlaps(span, literal)):
        read(at, span[0])
        ids.append(self._whole[token[0]])
        offsets.append(span)
        at = span[1]
    read(at, len(text))
    return ids, offsets

  def id_of(self, text: str) -> int | None:
    return self._pieces.get(text)

  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    texts: list[str] = []
    for own, run in itertools.groupby(map(int, ids), self._texts.__contains__):
      if own:
        texts += ["" if skip_special else self._texts[one] for one in run]
      else:
        model = self._rest if any(texts) else self._first
        texts.append(model.decode([*run]))
    return "".join(texts)
