"""What a store was made from, by name: the key of a cache says it in full."""

import importlib.metadata
import itertools
from pathlib import Path
from typing import Any

from sft_jax.data.readers.files import slice_of
from sft_jax.data.sources import Source
from sft_jax.data.store.files import Digests, digest, hash_text
from sft_jax.data.tokenizers.tokenizer import Tokenizer

# What has no say in what an example is.
_ELSEWHERE = (
  *("audit/", "packing.py", "pipeline.py", "selection.py"),
  *("chat/template_export.py", "store/stats.py", "store/workers.py"),
)
_LIBRARIES = ("jinja2", "sentencepiece", "tokenizers")


def of_source(
  source: Source, format: str, seed: int, digests: Digests
) -> dict[str, Any]:
  inputs: dict[str, Any] = {
    f"file {number} ({file.name})": digests.of(file)
    for number, file in enumerate(source.files(), 1)
  }
  if source.rows is not None:
    inputs["rows in memory"] = source.rows.digest
  if rows := slice_of(source.path):
    inputs["rows"] = rows
  inputs["format"] = source.format or format
  inputs["columns"] = dict(source.columns)
  if source.limit is not None:
    inputs |= {"limit": source.limit, "seed": seed}
  return inputs


def of_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
  # How a model likes to be sampled does not change what text becomes.
  files = [x for x in tokenizer.files if x.name != "generation_config.json"]
  return {
    "fingerprint": tokenizer.fingerprint,
    "chat template": hash_text(tokenizer.chat_template or ""),
    "stop ids": list(tokenizer.stop_ids),
    **{file.name: digest(file) for file in files},
  }


def code_version() -> str:
  """Hash of what turns rows into examples: our sources, others' versions."""
  folder = Path(__file__).parents[1]
  names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*.py"))
  names = [x for x in names if not x.startswith(_ELSEWHERE)]
  ours = [digest(folder / x) for x in names if not x.endswith("__init__.py")]
  others = [importlib.metadata.version(name) for name in _LIBRARIES]
  return hash_text(" ".join(ours + others))


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
  """What differs between the inputs of two stores or streams, in words.

  ['source 1, file 2 (chat.jsonl): changed', "options, history: 'auto' ->
  'split'"]. That the examples differ is said only where nothing says why.
  """

  def look(before: Any, after: Any, name: str) -> list[str]:
    if before == after:
      return []
    if isinstance(before, dict) and isinstance(after, dict):
      pairs = {x: (before.get(x), after.get(x)) for x in [*before, *after]}
      start = f"{name}, " if name else ""
      inner = (look(*pair, start + key) for key, pair in pairs.items())
      return list(itertools.chain.from_iterable(inner))
    for gone, word in ((after, "gone"), (before, "new")):
      if gone is None:
        return [f"{name}: {word}"]
    if isinstance(after, str) and len(after) == 64:  # A digest.
      return [f"{name}: changed"]
    return [f"{name}: {before!r} -> {after!r}"]

  lines = look(before, after, "")
  known = [line for line in lines if not line.startswith("examples:")]
  return known or lines
