"""Rows in memory, in place of files."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from sft_jax.data.conversation import Conversation, RowError


class MemoryRows:
  """Rows in memory, read as often as needed and known by their content.

  `digest` is equal for equal rows in equal order. An iterator is read once.

  Raises RowError: a value without JSON form, by which its change is noticed.
  """

  def __init__(self, rows: Iterable[Mapping[str, Any] | Conversation]):
    self.rows = list(rows)
    made = hashlib.sha256()
    for index, row in enumerate(self.rows):
      if isinstance(row, Conversation):
        row = {"conversation": dataclasses.asdict(row)}
      try:
        text = json.dumps(row, default=_plain, allow_nan=False)
        made.update(text.encode() + b"\n")
      except (TypeError, ValueError, RecursionError) as error:
        got = f"a value that JSON cannot hold ({error})"
        expected = "strings, finite numbers, booleans, null, lists and dicts"
        where, cure = f"rows[{index}]", "Convert or drop it."
        raise RowError(where, got, expected, cure) from None
    self.digest = made.hexdigest()

  def __repr__(self) -> str:
    return f"{len(self.rows)} rows in memory"


def _plain(value: Any) -> Any:
  """A value of pandas, numpy or `datasets` as JSON, for its digest alone."""
  if hasattr(value, "tolist"):
    return value.tolist()
  if isinstance(value, bytes):
    return value.hex()
  if hasattr(value, "isoformat"):
    return value.isoformat()
  raise TypeError(f"type {type(value).__name__}")
