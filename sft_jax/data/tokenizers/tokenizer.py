"""Text to token ids and back: one protocol, two kinds of tokenizer file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

from sft_jax.common import hub
from sft_jax.data.tokenizers import files
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
    chat_templates: {name: Jinja source} of all of the folder's; the one named
      'default' is `chat_template`.
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
  chat_templates: dict[str, str]
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

  def with_chat_template(self, source: str) -> Self:
    """This tokenizer with another chat template, which an export writes."""
    ...

  def with_new_tokens(
    self, texts: Sequence[str], *, stop: Sequence[str] = ()
  ) -> tuple[Self, dict[str, int]]:
    """This tokenizer with more special tokens, and {text: id} of new ones.

    See `files.Resolved.with_new_tokens`.
    """
    ...

  def write_files(self, folder: Path) -> None:
    """Writes the tokenizer's files into a folder, new tokens included."""
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
  read = files.read(path)
  if (path / "tokenizer.json").is_file():
    return HuggingFaceTokenizer(read)
  if (path / "tokenizer.model").is_file():
    return SentencePieceTokenizer(read)
  if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
    return HuggingFaceTokenizer(read)
  names = sorted(file.name for file in path.iterdir())
  foreign = [name for name in names if "tekken" in name or "tiktoken" in name]
  cure = "Copy it from the model's repository."
  if foreign:
    cure = (
      f"{foreign[0]} is a format of Mistral's or OpenAI's own libraries: copy "
      "tokenizer.json from the repository's files for transformers, or convert "
      "it with transformers.convert_slow_tokenizer."
    )
  raise ValueError(
    f"{path}: got {names}; expected tokenizer.json, or tokenizer.model, or "
    f"vocab.json and merges.txt. {cure}"
  )
