"""A tokenizer of vocab.json and merges.txt: byte-level BPE as GPT-2 has it."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

# How Qwen2 cuts text before merging: digits one by one, line breaks together.
_QWEN2 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By the class that a folder names (less 'Fast'); GPT-2's where it names none.
_CUTS = {
  "GPT2Tokenizer": "gpt2",
  "CodeGenTokenizer": "gpt2",
  "Qwen2Tokenizer": "qwen2",
}
# Special tokens that the classes have where no file names them.
_DEFAULTS = {
  "gpt2": dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>"),
  "qwen2": dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>"),
}


def load(
  folder: Path, config: dict[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
  """The tokenizer, and special tokens by name unless the config names others.

  Args:
    folder: with vocab.json and merges.txt.
    config: its tokenizer_config.json.

  Raises:
    ValueError: a tokenizer_class whose way of cutting text is not known here;
      files that are not such a tokenizer.
  """
  named = str(config.get("tokenizer_class") or "GPT2Tokenizer")
  cut = _CUTS.get(named.removesuffix("Fast"))
  if cut is None:
    raise ValueError(
      f"{folder}/tokenizer_config.json: got tokenizer_class {named!r} without "
      f"a tokenizer.json; expected one of {', '.join(_CUTS)}. Save the "
      "tokenizer as tokenizer.json (transformers' save_pretrained does)."
    )
  try:
    bpe = models.BPE.from_file(
      str(folder / "vocab.json"), str(folder / "merges.txt")
    )
  except Exception as error:  # The library raises bare Exception.
    raise ValueError(
      f"{folder}: got {error}; expected the vocab.json and merges.txt of one "
      "tokenizer. Copy them again."
    ) from error
  model = tokenizers.Tokenizer(bpe)
  space = bool(config.get("add_prefix_space", False))
  if cut == "gpt2":
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
  else:
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(Regex(_QWEN2), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False),
      ]
    )
  model.decoder = decoders.ByteLevel()
  defaults = {
    name: text
    for name, text in _DEFAULTS[cut].items()
    if name not in config and model.token_to_id(text) is not None
  }
  return model, defaults
