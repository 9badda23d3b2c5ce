"""Behaviour sets: prompts with declared checks, read and validated."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sft_jax.data.conversation import Conversation
from sft_jax.data.formats import formats
from sft_jax.data.readers import files
from sft_jax.evals.checks import checks

_KEYS = {"messages", "checks"}
_TEXT_KEYS = {"text", "checks"}


class Item(NamedTuple):
  """One prompt and what its reply must satisfy.

  Attributes:
    group: the behaviour it belongs to.
    prompt: ends in a user or tool turn, or is a raw text to go on from.
    checks: `{"check": name, ...arguments}`; all must pass.
    where: 'behaviours.jsonl:12', for errors and records.
  """

  group: str
  prompt: Conversation
  checks: tuple[dict[str, Any], ...]
  where: str


def load(path: str | Path) -> list[Item]:
  """Reads a behaviour set: one item per line of jsonl.

      {"group": "facts", "messages": [{"role": "user", "content": "..."}],
       "checks": [{"check": "contains", "text": "Dorvik"}]}

  `group` may be left out. With `text` in place of the messages, the reply is
  what a model goes on with after a raw text, as base models are asked: it need
  not stop by itself. Rows of IFEval (prompt, instruction_id_list, kwargs)
  are taken as they are. Every check is validated here, so that none fails
  after the training.

  Raises:
    RowError: a conversation that is none.
    ValueError: a missing or unknown key, a last turn that leaves nothing to
      reply to, an unknown check or an argument it cannot use; an empty file.
  """
  items = [_item(row, where) for where, row in formats.read_rows(path)]
  if not items:
    raise ValueError(
      f"{path}: got no rows; expected at least one prompt. "
      "Give another file, or turn the evaluation off."
    )
  return items


def load_sets(where: Any) -> list[Item]:
  """Items of several sets: a path, a glob, or {name: path or glob}.

  Of a named set the groups are called 'name/group', so that two sets may have
  groups of one name.
  """
  if not isinstance(where, Mapping):
    return [item for path in files.find_files(where) for item in load(path)]
  return [
    item._replace(group=f"{name}/{item.group}")
    for name, path in where.items()
    for item in load_sets(path)
  ]


def _item(row: Any, where: str) -> Item:
  keys = set(row) if isinstance(row, dict) else set()
  if "instruction_id_list" in keys:
    row = _from_ifeval(row, where)
    keys = set(row)
  of_text = _TEXT_KEYS <= keys <= _TEXT_KEYS | {"group"}
  if not of_text and not _KEYS <= keys <= _KEYS | {"tools", "group"}:
    raise ValueError(
      f"{where}: got keys {sorted(keys)}; expected messages (or text), checks, "
      "and perhaps group and tools. Add or rename the keys."
    )
  group = row.get("group", "all")
  if not isinstance(group, str) or not group:
    raise ValueError(
      f"{where}: got group {group!r}; expected a name. Name the group."
    )
  if not isinstance(row["checks"], list) or not row["checks"]:
    raise ValueError(
      f"{where}: got checks {row['checks']!r}; expected a list of at least "
      "one. Say what the reply must satisfy."
    )
  for index, check in enumerate(row["checks"]):
    checks.validate(check, f"{where} checks[{index}]")
  if of_text:
    prompt = formats.to_conversation(
      {"text": row["text"]}, format="text", source=where
    )
    return Item(group, prompt, tuple(row["checks"]), where)
  turns = {key: row[key] for key in ("messages", "tools") if key in row}
  prompt = formats.to_conversation(turns, format="messages", source=where)
  if prompt.messages[-1].role not in ("user", "tool"):
    raise ValueError(
      f"{where}: got a last turn of {prompt.messages[-1].role}; expected user "
      "or tool. End the messages where the reply begins."
    )
  return Item(group, prompt, tuple(row["checks"]), where)


def _from_ifeval(row: dict[str, Any], where: str) -> dict[str, Any]:
  """A row of IFEval's published prompts as one of ours."""
  names, kwargs = row["instruction_id_list"], row.get("kwargs")
  if (
    not isinstance(names, list)
    or not isinstance(kwargs, list)
    or len(names) != len(kwargs)
    or "prompt" not in row
  ):
    raise ValueError(
      f"{where}: got instruction_id_list {names!r} with kwargs {kwargs!r}; "
      "expected a prompt and two lists of one length. Mend the row."
    )
  return {
    "group": "ifeval",
    "messages": [{"role": "user", "content": row["prompt"]}],
    # Published rows spell out, as null, all arguments of all instructions.
    "checks": [
      {"check": name, **{k: v for k, v in given.items() if v is not None}}
      for name, given in zip(names, kwargs, strict=True)
    ],
  }
