"""Rows to Conversations: one function per format, one table."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sft_jax.data import conversation
from sft_jax.data.conversation import Conversation, NothingToTrain, RowError
from sft_jax.data.formats import chat, fields, instruction, pretokenized
from sft_jax.data.formats.fields import Names

Row = Mapping[str, Any]


def to_conversation(
  row: Row | Conversation,
  *,
  format: str = "auto",
  columns: Mapping[str, Any] | None = None,
  source: str = "",
) -> Conversation:
  """One row in any supported format as a Conversation.

      {"instruction": "Add.", "input": "2 2", "output": "4"}       alpaca
      {"prompt": "2 + 2 =", "completion": "4"}          prompt_completion
      {"messages": [{"role": "user", "content": "2 + 2?"},
                    {"role": "assistant", "content": "4"}]}      messages
      {"conversations": [{"from": "human", "value": "2 + 2?"},
                         {"from": "gpt", "value": "4"}]}         messages
      {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}     preference
      {"text": "Two and two are four."}                              text
      {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}             tokens

  docs/data_formats.md shows every key and spelling.

  Args:
    row: a key whose value is None counts as absent; a Conversation is checked.
    format: a name in `FORMATS`, or 'auto' to tell it from the row's keys.
    columns: what the data set's names mean here: {"query": "prompt"} for a
      column; under 'messages', the keys of a turn, {"messages": {"speaker":
      "role"}}; under 'role', the roles, {"role": {"bot": "assistant"}}.
    source: the row's place, such as 'rows.jsonl:12'; errors name it.

  Raises:
    RowError: a shape that no format, or more than one, claims; a value that is
      not of its kind; see `conversation.check` too.
    NothingToTrain: an empty answer to a single question (among messages it is
      a RowError); an empty text; tokens without a trained one.
    ValueError: an unknown format or malformed columns.
  """
  where = source or "row"
  if isinstance(row, Conversation):
    if source:
      row = dataclasses.replace(row, source=source)
    return conversation.check(row)
  if not isinstance(row, Mapping):
    row = fields.present(row, where)
  names = fields.to_names(columns or {})
  if columns:
    row = fields.renamed(row, names.columns)
  # A null answer is an empty answer; any other null is a key left out.
  nulls = [key for key, held in row.items() if held is None]
  left = {key: row[key] for key in nulls if key not in instruction.ANSWERS}
  row = fields.Fields({x: held for x, held in row.items() if x not in left})
  if format == "auto":
    format = _format_of(row, where, [*map(str, nulls)])
  elif format not in FORMATS:
    raise ValueError(
      f"format: got {format!r}; expected auto or one of {', '.join(FORMATS)}. "
      "Set data.format to one of these."
    )
  row.read.clear()
  made = FORMATS[format].convert(row, where, names)
  if made.messages:
    made = _weighed(made, row, where, names)
  names.notes.update(map(fields.NOT_READ.format, fields.unread(row)))
  notes = tuple(sorted(names.notes))
  return conversation.check(
    dataclasses.replace(made, source=source, notes=notes)
  )


def _from_turns(
  row: Row, where: str, names: Names, *, keys: tuple[str, ...]
) -> Conversation:
  """Turns of {role, content} or {from, value}, with tools and weights."""
  key = fields.only(row, keys, where)
  messages = chat.read(row[key], key, where, names)
  return instruction.finished(messages, row, where)


def from_text(row: Row, where: str, names: Names) -> Conversation:
  """text: raw text, every token of which is trained."""
  del names  # It has no turns.
  text = fields.text(row, fields.only(row, ("text",), where), where)
  if conversation.is_blank(text):
    raise NothingToTrain("empty text", where)
  return Conversation(text=text, source=where)


class Format(NamedTuple):
  """How rows of a format are recognized, and made Conversations."""

  keys: str
  fits: Callable[[Row], bool]
  convert: Callable[[Row, str, Names], Conversation]


_ANSWERS, _QUESTIONS = {*instruction.ANSWERS}, {*instruction.QUESTIONS}
_TURNS, _SHAREGPT = ("messages", "contents"), ("conversations", "conversation")
_has_chosen = lambda row: isinstance(row.get("chosen"), str | list | Mapping)

FORMATS = {
  "alpaca": Format(
    "instruction, input?, output | response",
    lambda row: (
      "instruction" in row
      and bool(row.keys() & _ANSWERS or not _has_chosen(row))
    ),
    instruction.from_alpaca,
  ),
  "prompt_completion": Format(
    "prompt | question | query, completion | response | answer",
    lambda row: bool(row.keys() & _QUESTIONS and row.keys() & _ANSWERS),
    instruction.from_prompt_completion,
  ),
  "messages": Format(
    "messages",
    lambda row: (
      ("messages" in row or isinstance(row.get("contents"), list))
      and not _has_chosen(row)
    ),
    functools.partial(_from_turns, keys=_TURNS),
  ),
  "sharegpt": Format(
    "conversations",
    lambda row: bool(row.keys() & {*_SHAREGPT}) and not _has_chosen(row),
    functools.partial(_from_turns, keys=_SHAREGPT),
  ),
  "preference": Format(
    "chosen, rejected, prompt | messages | conversations",
    _has_chosen,
    instruction.from_preference,
  ),
  "text": Format("text", lambda row: "text" in row, from_text),
  "tokens": Format(
    "input_ids, labels",
    lambda row: "input_ids" in row,
    pretokenized.from_tokens,
  ),
}


def _format_of(row: Row, where: str, nulls: list[str]) -> str:
  """The one format that a row fits; text beside another is a copy of it."""
  fitting = [name for name, made in FORMATS.items() if made.fits(row)]
  if len(fitting) > 1 and "tokens" not in fitting:
    fitting = [name for name in fitting if name != "text"]
  if len(fitting) == 1:
    return fitting[0]
  choices = {name: FORMATS[name] for name in fitting} or FORMATS
  raise RowError(
    where,
    f"{fields.shown(row)}, which fits "
    + (" and ".join(fitting) or "no known format")
    + (f"; null under {', '.join(nulls)}" if nulls else ""),
    "; or ".join(f"{made.keys} ({name})" for name, made in choices.items()),
    "Name the format (data.format), or rename keys (data.columns).",
  )


def _weighed(
  made: Conversation, row: Row, where: str, names: Names
) -> Conversation:
  """With what the row as a whole says about its worth."""
  # An unpaired preference of LLaMA-Factory: is the answer a good one?
  if row.get("kto_tag") is False:
    made = dataclasses.replace(made, desirable=False)
  if isinstance(row.get("label"), bool):
    names.notes.add(
      "label not read; where it marks good answers, rename it to kto_tag "
      "(data.columns)"
    )
  if (weight := fields.row_weight(row, where, names)) is None:
    return made
  sides = (made.messages, made.rejected)
  messages, rejected = (tuple(chat.weighed(x, weight)) for x in sides)
  return dataclasses.replace(made, messages=messages, rejected=rejected)
