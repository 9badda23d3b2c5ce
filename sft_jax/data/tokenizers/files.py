"""What the files of a tokenizer folder say beside the vocabulary."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

# What an export copies beside the weights, where the folder has it.
FILES = (
  "tokenizer.json",
  "tokenizer.model",
  "vocab.json",
  "merges.txt",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "generation_config.json",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Folder(NamedTuple):
  """What a tokenizer folder says beside the vocabulary."""

  path: Path
  files: tuple[Path, ...]
  fingerprint: str
  config: dict[str, Any]
  named_tokens: dict[str, str]
  special: tuple[str, ...]
  added: dict[str, tuple[int, dict[str, Any]]]
  stop_ids: tuple[int, ...]
  chat_template: str | None


def read(folder: Path) -> Folder:
  config = _json(folder / "tokenizer_config.json")
  tokens = _json(folder / "special_tokens_map.json") | config
  # {'content': '</s>', ...} and '</s>' are the same token.
  named = {
    key: text
    for key, value in tokens.items()
    if key.endswith("_token") and (text := _content(value)) is not None
  }
  more = tokens.get("additional_special_tokens") or []
  extra = config.get("extra_special_tokens") or []
  more = [*more, *(extra.values() if isinstance(extra, dict) else extra)]
  special = [*named.values(), *filter(None, map(_content, more))]
  added = {
    text: (number, {"special": False})
    for text, number in _json(folder / "added_tokens.json").items()
  }
  for number, token in config.get("added_tokens_decoder", {}).items():
    flags = {key: value for key, value in token.items() if key in _FLAGS}
    added[token["content"]] = (int(number), flags)
  generation = _json(folder / "generation_config.json")
  if "eos_token_id" not in generation:
    generation = _json(folder / "config.json")
  stops = generation.get("eos_token_id")
  stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
  files = tuple(folder / name for name in FILES if (folder / name).is_file())
  digest = hashlib.sha256(repr(sorted(stops)).encode())
  for file in files:
    # How a model likes to be sampled does not change what text becomes.
    if file.name != "generation_config.json":
      data = file.read_bytes()
      digest.update(f"{file.name} {len(data)} ".encode() + data)
  return Folder(
    path=folder,
    files=files,
    fingerprint=digest.hexdigest(),
    config=config,
    named_tokens=named,
    special=tuple(dict.fromkeys(special)),
    added=added,
    stop_ids=tuple(stops),
    chat_template=_chat_template(folder, config),
  )


class Resolved:
  """What a folder says, in ids: the attributes of `tokenizers.Tokenizer`.

  Args:
    read: the folder.
    ids: {text: id} of the vocabulary.
    size: one more than the largest id.

  Raises:
    ValueError: a special token that the vocabulary does not hold.
  """

  def __init__(self, read: Folder, ids: Mapping[str, int], size: int):
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


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
  if (path := folder / "chat_template.jinja").is_file():
    return path.read_text(encoding="utf-8")
  template = config.get("chat_template")
  if isinstance(template, list):
    named = {one["name"]: one["template"] for one in template}
    if "default" not in named:
      raise ValueError(
        f"{folder}/tokenizer_config.json: got chat templates {sorted(named)}; "
        "expected one named default. Write the one to use to "
        "chat_template.jinja."
      )
    return named["default"]
  return template


def _content(token: Any) -> str | None:
  if isinstance(token, dict):
    token = token.get("content")
  return token if isinstance(token, str) else None


def _json(path: Path) -> dict[str, Any]:
  """The object in a file; {} where there is no such file."""
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(
      f"{path}: got {error}; expected JSON. Copy it again."
    ) from error
  if not isinstance(value, dict):
    raise ValueError(
      f"{path}: got a {type(value).__name__}; expected an object. "
      "Copy it again."
    )
  return value
