"""What the files of a tokenizer folder hold beside the vocabulary."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sft_jax.common import hub

# What an export copies beside the weights, where the folder has it.
FILES = hub.TOKENIZER_FILES
# Folders of more templates, each named after its file.
_TEMPLATES = ("additional_chat_templates", "chat_templates")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
SPECIAL = dict.fromkeys(_FLAGS, False) | {"special": True}


class Folder(NamedTuple):
  # The folder, and its files that belong to the tokenizer.
  path: Path
  files: tuple[Path, ...]
  fingerprint: str  # A digest of what decides ids.
  config: dict[str, Any]  # tokenizer_config.json.
  named_tokens: dict[str, str]  # {'bos_token': '<s>', ...}.
  # Keys such as 'eos_token' that some file sets to null.
  unnamed: frozenset[str]
  special: tuple[str, ...]  # Texts of special tokens, named or listed.
  # {text: (id, flags)} of tokens beside the vocabulary.
  added: dict[str, tuple[int, dict[str, Any]]]
  # eos_token_id of generation_config.json, or else of config.json.
  stop_ids: tuple[int, ...]
  # {name: Jinja source}, 'default' among them or not.
  chat_templates: dict[str, str]
  # {text: id} of tokens that no file calls special; see
  # `tokenizer.Tokenizer.with_new_tokens`.
  extra_tokens: dict[str, int] = {}  # noqa: RUF012, never changed


def read(folder: Path) -> Folder:
  """Reads the files; see `tokenizer.load_tokenizer` for what is refused."""
  config = _json(folder / "tokenizer_config.json")
  listed = _json(folder / "special_tokens_map.json")
  # As transformers: the list counts where the config is too old to have all.
  new = "added_tokens_decoder" in config
  tokens = listed | config if new else config | listed
  tokens |= tokens.get("model_specific_special_tokens") or {}
  # {'content': '</s>', ...} and '</s>' are the same token.
  named = {
    key: text
    for key, value in tokens.items()
    if key.endswith("_token") and (text := _content(value)) is not None
  }
  special = [*named.values()]
  for key in ("additional_special_tokens", "extra_special_tokens"):
    more = tokens.get(key) or []
    more = more.values() if isinstance(more, dict) else more
    special += filter(None, map(_content, more))
  added = {
    text: (number, {"special": False})
    for text, number in _json(folder / "added_tokens.json").items()
  }
  for number, token in (config.get("added_tokens_decoder") or {}).items():
    flags = {key: value for key, value in token.items() if key in _FLAGS}
    added[token["content"]] = (int(number), flags)
  generation = _json(folder / "generation_config.json")
  if "eos_token_id" not in generation:
    generation = _json(folder / "config.json")
  stops = generation.get("eos_token_id")
  stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
  files = [folder / name for name in FILES if (folder / name).is_file()]
  more = [sorted((folder / one).glob("*.jinja")) for one in _TEMPLATES]
  files += itertools.chain.from_iterable(more)
  digest = hashlib.sha256(repr(sorted(stops)).encode())
  for file in files:
    # How a model likes to be sampled does not change what text becomes.
    if file.name != "generation_config.json":
      data = file.read_bytes()
      digest.update(f"{file.name} {len(data)} ".encode() + data)
  return Folder(
    path=folder,
    files=tuple(files),
    fingerprint=digest.hexdigest(),
    config=config,
    named_tokens=named,
    unnamed=frozenset(k for k, value in tokens.items() if value is None),
    special=tuple(dict.fromkeys(special)),
    added=added,
    stop_ids=tuple(stops),
    chat_templates=_chat_templates(folder, config, files),
  )


def write(read: Folder, folder: Path, chat_template: str | None) -> None:
  """Writes the files into a folder, with the chat template and new tokens;
  whoever exports the model completes its generation_config.json."""
  folder.mkdir(exist_ok=True)
  for file in read.files:
    target = folder / file.relative_to(read.path)
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(file, target)
  if chat_template not in (None, read.chat_templates.get("default")):
    path = folder / "chat_template.jinja"
    path.write_text(chat_template, encoding="utf-8")
  if not read.extra_tokens:
    return
  if (path := folder / "tokenizer.json").is_file():
    state = _json(path)
    added = {one["content"]: one for one in state["added_tokens"]}
    for text, number in read.extra_tokens.items():
      token = added.get(text, {"id": number, "content": text, **SPECIAL})
      added[text] = token | {"special": True}
    state["added_tokens"] = sorted(added.values(), key=lambda one: one["id"])
    _write_json(path, state)
  path = folder / "added_tokens.json"
  _write_json(path, _json(path) | read.extra_tokens)
  path = folder / "tokenizer_config.json"
  config = _json(path)
  if (decoder := config.get("added_tokens_decoder")) is not None:
    for text, number in read.extra_tokens.items():
      decoder[str(number)] = {"content": text, **SPECIAL}
  # The newer name holds a list from version 5 of transformers on.
  key = "extra_special_tokens"
  if not isinstance(config.get(key), list):
    key = "additional_special_tokens"
  listed = config.get(key) or []
  texts = set(map(_content, listed))
  config[key] = [*listed, *(x for x in read.extra_tokens if x not in texts)]
  _write_json(path, config)


def _chat_templates(
  folder: Path, config: dict[str, Any], files: Sequence[Path]
) -> dict[str, str]:
  """{name: source}; a file of its own wins over an entry of a config."""
  found: dict[str, str] = {}
  for place in (config, _json(folder / "chat_template.json")):
    source = place.get("chat_template") or {}
    if isinstance(source, str):
      source = {"default": source}
    elif isinstance(source, list):
      source = {one["name"]: one["template"] for one in source}
    found |= source
  for path in files:
    if path.suffix == ".jinja":
      name = "default" if path.parent == folder else path.stem
      found[name] = read_text(path)
  return found


def read_text(path: Path) -> str:
  """A file's text; a ValueError that names it where it is none."""
  try:
    return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path}: got {error}; expected UTF-8. Copy it again, or convert it."
    ) from error


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
    if not isinstance(value, dict):
      raise ValueError(f"a {type(value).__name__}")
  except ValueError as error:
    expected = "expected JSON of an object. Copy it again."
    raise ValueError(f"{path}: got {error}; {expected}") from error
  return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
  text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
  path.write_text(text, encoding="utf-8")
