"""Text to token ids and back, for every kind of tokenizer file."""

import abc
import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

from sft_jax.common import hub
from sft_jax.data.tokenizers import child, files
from sft_jax.data.tokenizers.literal import Encoded, Ranges

# The largest vocabularies have some 260,000.
_MOST_TOKENS = 2**24
# Tried on a tokenizer before it is trusted.
_PROBES = (
  "The cat's 12 × 3 = 36!\n\t\r\n x² ﬁ ﷺ 漢字 한국어 ไทย नि 👩\u200d👧 \ufeff",
  *(one * 5000 for one in ("a", "0", "é", ".", "漢", "ab ")),
)


class Tokenizer(abc.ABC):
  """A tokenizer with what its folder says of special tokens, in ids.

  Attributes:
    vocab_size: one more than the largest id.
    bos_id, eos_id, pad_id: None where the tokenizer has no such token.
    stop_ids: ids at which generation stops, ascending.
    chat_templates: {name: Jinja source}; `chat_template` is the 'default'.
    named_tokens: {'bos_token': '<s>', ...}, the variables templates read.
    special_tokens: {text: id} of tokens that are structure, stop tokens too.
    fingerprint: a digest of what decides ids.
  """

  special_tokens: dict[str, int]

  def __init__(self, read: files.Folder, ids: Mapping[str, int]):
    """Raises ValueError: a special token that the vocabulary does not hold."""
    self._read = read
    self.folder, self.files = read.path, read.files
    self.fingerprint = read.fingerprint
    self.chat_templates = read.chat_templates
    self.chat_template = read.chat_templates.get("default")
    self.vocab_size = max(ids.values(), default=0) + 1
    if not ids or self.vocab_size > _MOST_TOKENS:
      raise ValueError(
        f"{read.path}: got {len(ids)} tokens with ids up to "
        f"{self.vocab_size - 1}; expected ids below {_MOST_TOKENS}. Use the "
        "tokenizer of a model you trust."
      )
    for text in read.special:
      if text not in ids:
        raise ValueError(
          f"{read.path}/tokenizer_config.json: got the special token {text!r}; "
          "expected one of the vocabulary. Correct it or add the token."
        )
    for stop in read.stop_ids:
      if not 0 <= stop < self.vocab_size:
        raise ValueError(
          f"{read.path}: got eos_token_id {stop}; expected an id below "
          f"{self.vocab_size}. Correct generation_config.json."
        )
    named = self.named_tokens = dict(read.named_tokens)
    if read.stop_ids and not {"eos_token"} & (read.unnamed | named.keys()):
      first = next(t for t, n in ids.items() if n == read.stop_ids[0])
      named["eos_token"] = first
    id_of = lambda key: ids[named[key]] if key in named else None
    self.bos_id, self.eos_id = id_of("bos_token"), id_of("eos_token")
    self.pad_id = id_of("pad_token")
    ends = () if self.eos_id is None else (self.eos_id,)
    self.stop_ids = tuple(sorted({*read.stop_ids, *ends}))

  def encode(self, text: str) -> list[int]:
    """Ids of a text. Special tokens in it are recognized; none is added."""
    return self.encode_with_offsets(text)[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, as `encode` gives them, in less time."""
    return [self.encode(text) for text in texts]

  @abc.abstractmethod
  def encode_with_offsets(self, text: str, literal: Ranges = ()) -> Encoded:
    """Ids, and the (start, end) characters of the text that each covers.

    A special token that reaches into a range of `literal` is read as text.
    """

  @abc.abstractmethod
  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    """The text of ids; special tokens are left out or written as text."""

  @abc.abstractmethod
  def id_of(self, text: str) -> int | None:
    """The id of a token, if the vocabulary has it."""

  def with_chat_template(self, source: str) -> Self:
    """This tokenizer with another chat template, which an export writes."""
    other = copy.copy(self)
    other.chat_template = source
    other.fingerprint = _digest(self.fingerprint, source)
    return other

  def with_new_tokens(
    self, texts: Sequence[str], *, stop: Sequence[str] = ()
  ) -> tuple[Self, dict[str, int]]:
    """This tokenizer with more special tokens, which an export writes.

    A text that the vocabulary has keeps its id; `stop` ends generation, too.

    Returns the tokenizer, and {text: id} of the new tokens: ids from
    `vocab_size` on. A padded model may have (untrained) rows for them.

    Raises ValueError: an empty text or one with white space at its edges;
    `stop` with a text that is no token.
    """
    for text in texts:
      if not text or text != text.strip():
        raise ValueError(
          f"model.new_tokens: got {text!r}; expected a text without white "
          "space around it. Correct it."
        )
    known = {text: self.id_of(text) for text in (*texts, *stop)}
    new = [text for text in dict.fromkeys(texts) if known[text] is None]
    numbers = {text: self.vocab_size + i for i, text in enumerate(new)}
    known |= numbers
    for text in stop:
      if known[text] is None:
        raise ValueError(
          f"model.new_tokens: got no token {text!r}, at which generation shall "
          "stop; expected it in the vocabulary or among the new tokens. Add it."
        )
    read = self._read
    stops = [*read.stop_ids, *(known[text] for text in stop)]
    read = read._replace(
      fingerprint=_digest(read.fingerprint, repr((list(texts), list(stop)))),
      special=tuple(dict.fromkeys([*read.special, *texts])),
      added=read.added | {x: (n, files.SPECIAL) for x, n in numbers.items()},
      stop_ids=tuple(dict.fromkeys(stops)),
      extra_tokens=read.extra_tokens | {text: known[text] for text in texts},
    )
    other = cast(Any, type(self))(read)
    if self.chat_template not in (None, other.chat_template):
      other = other.with_chat_template(self.chat_template)
    return other, numbers

  def write_files(self, folder: Path) -> None:
    """Writes the tokenizer's files into a folder, its new tokens included."""
    files.write(self._read, folder, self.chat_template)


def _digest(*texts: str) -> str:
  return hashlib.sha256(repr(texts).encode()).hexdigest()


def load_tokenizer(folder: str | Path) -> Tokenizer:
  """The tokenizer of a model, with its chat template and stop ids.

  `folder` is a path, or an id of the hub (see `hub.find_model`). Read is
  tokenizer.json, or else tokenizer.model (SentencePiece), or else vocab.json
  and merges.txt (byte-level BPE). Generation stops at eos_token_id of
  generation_config.json (or else of config.json) and at the eos_token of
  tokenizer_config.json.

  The libraries abort the process where they cannot allocate, or break on files
  that were made to. So a child process tries each tokenizer first.

  Raises ValueError: no folder, or neither file in it; a token that the files
  number differently, or that the vocabulary does not hold; exceeded limits.
  """
  path = hub.find_model(folder).folder
  if not path.is_dir():
    raise ValueError(
      f"{path}: got no such folder; expected a model folder. Check model.path."
    )
  read = files.read(path)
  if (key := (str(path), read.fingerprint)) not in _trusted:
    reply = TRIAL.ask(str(path))
    if reply is None:
      reply = [
        f"{path}: got a tokenizer that exceeds {TRIAL.limits}, or crashes, "
        "where it is loaded and reads short texts; expected one that does "
        "not. Use the tokenizer of a model you trust."
      ]
    elif not reply[0] and reply[1] != read.fingerprint:
      reply = [
        f"{path}: got files that change while they are read; expected a "
        "tokenizer that stays. Run the same command again."
      ]
    if reply[0]:
      raise ValueError(reply[0])
    _trusted.add(key)
  return _build(read)


TRIAL = child.Child(
  __name__, 60.0, 3 << 30, RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"
)
_trusted: set[tuple[str, str]] = set()


def serve() -> None:
  """The child: tries folders until its streams end."""
  child.serve(_tried, TRIAL.memory)


def _tried(folder: str) -> list[str]:
  """What is wrong with a folder's tokenizer, or '' and its fingerprint."""
  child.limit_time(TRIAL.seconds)
  try:
    read = files.read(Path(folder))
    one = _build(read)
    for text in _PROBES:
      try:
        ids = one.encode(text)
        one.decode(ids)
      except ValueError as error:  # It may not know a character.
        if type(error.__context__).__name__ == "PanicException":
          raise
      else:
        if not ids:
          raise ValueError(
            f"{folder}: got a tokenizer that makes no tokens of {text[:20]!r}; "
            "expected ids. Use the tokenizer of a model you trust."
          )
  except ValueError as error:
    return [str(error)]
  except Exception:  # A mistake of ours: the parent shows its trace.
    pass
  return ["", read.fingerprint]


def _build(read: files.Folder) -> Tokenizer:
  """The tokenizer of a folder; see `load_tokenizer`."""
  from sft_jax.data.tokenizers.huggingface import HuggingFaceTokenizer
  from sft_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer

  path = read.path
  names = sorted(file.name for file in path.iterdir())
  if "tokenizer.model" in names and "tokenizer.json" not in names:
    return SentencePieceTokenizer(read)
  if "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= {*names}:
    return HuggingFaceTokenizer(read)
  cure = "Copy it from the model's repository."
  for name in names:
    if "tekken" in name or "tiktoken" in name:
      cure = (
        f"{name} is a format of Mistral's or OpenAI's own libraries: copy "
        "tokenizer.json from the repository's files for transformers, or "
        "convert it with transformers.convert_slow_tokenizer."
      )
  raise ValueError(
    f"{path}: got {names}; expected tokenizer.json, or tokenizer.model, or "
    f"vocab.json and merges.txt. {cure}"
  )
