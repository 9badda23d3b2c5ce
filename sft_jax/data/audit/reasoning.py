"""Reasoning: whether what rows hold is in what is trained.

Rows hold reasoning under many names, and a format that does not know one
would drop it in silence. So the rows themselves are searched, whatever their
format: <think> blocks in any text, and any text under a telling key.
"""

import collections
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sft_jax.data.audit import checks, text_hashing
from sft_jax.data.conversation import RowError
from sft_jax.data.formats import fields
from sft_jax.data.store import shards
from sft_jax.data.store.store import Store
from sft_jax.data.tokenizers.tokenizer import Tokenizer

_KEYS = re.compile(
  r"(?:.*_)?(?:reasoning|reasoning_content|thinking|thoughts?|rationale|cot"
  r"|chain_of_thought|scratchpad)",
  re.IGNORECASE,
)
_BLOCK = re.compile(r"<think(?:ing)?>(.*?)</think(?:ing)?>", re.DOTALL)
# Of its words; tokenizers may normalize the others away.
_FOUND = 0.9
_SHOWN = 5


def check(
  store: Store, tokenizer: Tokenizer, *, seed: int = 0
) -> checks.Finding:
  """The finding 'think': rows whose reasoning their examples do not hold.

  The store's options keep reasoning. Rows that are cut or dropped lose it by
  them and are not at fault.
  """
  lost, examples_of = [], collections.defaultdict(list)
  for i, source in enumerate(store.source.tolist()):
    examples_of[source, store.place(i)].append(i)
  for number, source in enumerate(store.sources):
    names = fields.to_names(source.columns)
    ours = {**names.keys, **names.columns}
    for item in shards.read_again(source, seed=seed):
      if isinstance(item, RowError):
        continue
      where, row = item
      examples = examples_of.get((number, where), [])
      if not examples or store.index["may_run_on"][examples].any():
        continue
      if thoughts := [text for text in written(row, ours) if text.strip()]:
        ids = (store.example(i).tokens.tolist() for i in examples)
        seen = "\n".join(map(tokenizer.decode, ids))
        if not all(holds(seen, thought) for thought in thoughts):
          lost.append(where)
  if not lost:
    return checks.Finding("think")
  message = (
    f"{lost[0]}: holds reasoning that is not in what is trained "
    f"({len(lost):,} such rows), expected all of it. Rename its key to "
    "reasoning_content in a row of messages, or remove it from the rows."
  )
  return checks.Finding("think", len(lost), message, tuple(lost[:_SHOWN]))


def written(
  value: Any, ours: Mapping[str, str], *, found: bool = False
) -> Iterator[str]:
  """Every reasoning text in a row: thinking blocks, and telling keys.

  `ours` has new names of keys, by those in the row (see `Source.columns`);
  `found`: a key that led here names reasoning.
  """
  if isinstance(value, str):
    blocks = _BLOCK.findall(value)
    yield from blocks or ([value] if found else [])
  elif isinstance(value, dict):
    for key, inner in value.items():
      telling = _KEYS.fullmatch(ours.get(key, str(key)))
      yield from written(inner, ours, found=found or bool(telling))
  elif isinstance(value, list | tuple):
    for inner in value:
      yield from written(inner, ours, found=found)


def holds(text: str, thought: str) -> bool:
  """Whether most different words of a thought are in a text."""
  both = text_hashing.sets(text_hashing.split([text, thought]))
  return bool(np.isin(both.of(1), both.of(0)).mean() >= _FOUND)
