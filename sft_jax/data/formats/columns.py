"""Columns: what a data set calls its columns, the keys of a turn, and roles."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Names(NamedTuple):
  """Each maps names of a data set to ours.

  Attributes:
    columns: of a row.
    keys: of a turn.
    roles: the values of a turn's role.
  """

  columns: Mapping[str, str]
  keys: Mapping[str, str]
  roles: Mapping[str, str]


OURS = Names({}, {}, {})


def to_names(columns: Mapping[str, Any]) -> Names:
  """`Source.columns`, told apart.

  >>> to_names({"query": "prompt", "role": {"bot": "assistant"}})
  Names(columns={'query': 'prompt'}, keys={}, roles={'bot': 'assistant'})

  Args:
    columns: new names by old ones; under 'messages' those of a turn's keys,
      and under 'role' those of roles.

  Raises:
    ValueError: a new name that is no string, or that two columns share.
  """
  inner = {
    key: dict(columns[key])
    for key in ("messages", "role")
    if isinstance(columns.get(key), Mapping)
  }
  made = Names(
    {key: new for key, new in columns.items() if key not in inner},
    inner.get("messages", {}),
    inner.get("role", {}),
  )
  for part in made:
    news = list(part.values())
    shared = part is not made.roles and len(set(map(str, news))) < len(news)
    if shared or not all(isinstance(new, str) for new in news):
      raise ValueError(
        f"columns of the source: got {dict(columns)!r}; expected new names by "
        "old ones, each once: {'query': 'prompt', 'messages': {'speaker': "
        "'role'}, 'role': {'bot': 'assistant'}}. Correct it."
      )
  return made


def renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
  """A row under our names; a renamed column displaces one of its new name.

  >>> renamed({"q": "2 + 2?", "answer": 4}, {"q": "prompt"})
  {'answer': 4, 'prompt': '2 + 2?'}
  """
  kept = {
    key: held
    for key, held in row.items()
    if key not in names and key not in names.values()
  }
  return kept | {new: row[old] for old, new in names.items() if old in row}
