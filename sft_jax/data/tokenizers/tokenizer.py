"""Text to token ids and back: one protocol, two kinds of tokenizer file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from sft_jax.common import hub
from sft_jax.data.tokenizers import files as tokenizer_folder
from sft_jax.data.tokenizers.huggingface import HuggingFaceTokenizer
from sft_jax.data.tokenizers.literal import Ranges
from sft_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer


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

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, as `encode` gives them, in less time."""
    ...

  def encode_with_offsets(
    self, text: str, literal: Ranges = ()
  ) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids, and for each the (start, end) characters of the text it covers.

    A special token that reaches into one of the (start, end) characters of
    `literal` is read as the ordinary text it is written in.
    """
    ...

  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    """The text of ids; special tokens are left out or written as text."""
    ...


def load_tokenizer(folder: str | Path) -> Tokenizer:
  """The tokenizer of a model, with its chat template and stop ids.

  `folder` is a path, or an id of the hub (see `hub.find_model`).

  Reads tokenizer.json, or else tokenizer.model (SentencePiece), or else
  vocab.json and merges.txt (byte-level BPE). Generation
  stops at eos_token_id of generation_config.json (or else of config.json) and
  at the eos_token of tokenizer_config.json.

  Raises:
    ValueError: no folder, or neither file in it; a token that the folder's
      files number differently, or that the vocabulary does not hold.
  """
  path = hub.find_model(folder).folder
  if not path.is_dir():
    raise ValueError(
      f"{path}: got no such folder; expected a model folder. Check model.path."
    )
  read = tokenizer_folder.read(path)
  if (path / "tokenizer.json").is_file():
    return HuggingFaceTokenizer(read)
  if (path / "tokenizer.model").is_file():
    return SentencePieceTokenizer(read)
  if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
    return HuggingFaceTokenizer(read)
  raise ValueError(
    f"{path}: got {sorted(file.name for file in path.iterdir())}; expected "
    "tokenizer.json, or tokenizer.model, or vocab.json and merges.txt. Copy it "
    "from the model's repository."
  )
