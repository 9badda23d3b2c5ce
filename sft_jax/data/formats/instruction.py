"""Rows of a question and its answer, or of a better and a worse answer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sft_jax.data.conversation import (
  Conversation,
  Message,
  NothingToTrain,
  RowError,
  is_blank,
)
from sft_jax.data.formats import chat, fields
from sft_jax.data.formats.fields import Names
from sft_jax.data.readers.json import loads

Row = Mapping[str, Any]

# Keys of one meaning: two filled ones in a row are ambiguous.
ANSWERS = ("output", "response", "completion", "answer")
QUESTIONS = ("prompt", "question", "query")
INPUTS = ("input", "context")
SYSTEMS = ("system", "system_prompt", "systemInstruction", "system_instruction")
# Where a prompt may stand: as turns or as a question.
_TURNS = ("messages", "conversations", "conversation", "instruction")
PROMPTS = (*_TURNS, *QUESTIONS)


def from_alpaca(row: Row, where: str, names: Names) -> Conversation:
  """instruction, input or context, and an answer; history, which is trained."""
  asked = prompt(row, "instruction", where, names)
  return _answered(asked, row, where, names)


def from_prompt_completion(row: Row, where: str, names: Names) -> Conversation:
  """prompt, question or query, and an answer; each a string or a list of turns.

  As in TRL, the turns of a prompt are not trained, whoever speaks.
  """
  found = [key for key in QUESTIONS if key in row]
  key = fields.only(row, found or QUESTIONS, where)
  asked = prompt(row, key, where, names)
  if isinstance(row[key], list):
    asked = chat.weighed(asked, 0.0)
  return _answered(asked, row, where, names)


def from_preference(row: Row, where: str, names: Names) -> Conversation:
  """The chosen side; what it shares with the rejected side is its prompt.

  The prompt is under a key of the other formats, or chosen begins with it; then
  it may stand under several.
  """
  found = [key for key in PROMPTS if key in row]
  chosen = reply(row, "chosen", where, names)
  other = row.get("rejected")
  if isinstance(other, str):
    other = other.strip()
  rejected = reply(row, "rejected", where, names) if other else []
  if chosen[0].role == "assistant":
    if not found:
      expected = "a prompt that chosen answers, or turns that begin with it"
      cure = 'Add one; raw text is columns {"chosen": "text"}.'
      raise RowError(where, f"no prompt in {fields.shown(row)}", expected, cure)
    key = fields.only(row, found, where)
    before = prompt(row, key, where, names)
    if before[-1].role == "assistant":
      got = f"an assistant turn at the end of {key}, and chosen"
      cure = "Drop one of the two, or name the format (data.format: messages)."
      expected = "turns up to the one that chosen answers"
      raise RowError(where, got, expected, cure)
    return _pair(before, chosen, rejected, row, where)
  # The whole conversation; a prompt beside it repeats its beginning.
  said = [one for one in chosen if one.role != "system"]
  for key in found:
    again = prompt(row, key, where, names)
    again = [one for one in again if one.role != "system"]
    if said[: len(again)] != again:
      got = f"a {key} with which chosen does not begin"
      expected = "chosen as the answer alone, or as the whole conversation"
      raise RowError(where, got, expected, "Drop one of the two columns.")
  shared = max(i for i, one in enumerate(chosen) if one.role != "assistant")
  if rejected and rejected[0].role != "assistant":
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), shared)
    rejected = rejected[shared:]
  return _pair(chosen[:shared], chosen[shared:], rejected, row, where)


def _pair(
  before: list[Message],
  chosen: list[Message],
  rejected: list[Message],
  row: Row,
  where: str,
) -> Conversation:
  """Both sides after their prompt; there may be no other side."""
  before = chat.weighed(before, 0.0)
  made = finished([*before, *chosen], row, where)
  if not rejected:
    return made
  other = finished([*before, *rejected], row, where)
  return dataclasses.replace(made, rejected=other.messages)


def prompt(row: Row, key: str, where: str, names: Names) -> list[Message]:
  """row[key] as turns: a list of them, or a question, with what it is about
  (input, context), after its history."""
  if isinstance(row.get(key), list):
    return chat.read(row[key], key, where, names)
  parts = [fields.text(row, key, where)]
  if found := [key for key in INPUTS if row.get(key)]:
    parts.append(fields.text(row, fields.only(row, found, where), where))
  question = "\n\n".join(part for part in parts if part.strip())
  if not question:
    got, cure = "an empty question", "Fill or drop the row."
    raise RowError(where, got, "something asked", cure)
  return [*_history(row, where), Message("user", question)]


def reply(row: Row, key: str, where: str, names: Names) -> list[Message]:
  """An answer as turns: a string, one turn, or several."""
  value = row[fields.only(row, [key], where)]
  if isinstance(value, Mapping):
    value = [value]
  if isinstance(value, list):
    return chat.read(value, key, where, names)
  answer = fields.text(row, key, where)
  thought = chat.reasoning(row, where, names)
  if is_blank(answer):
    raise NothingToTrain("empty answer", where)
  return [chat.spoken("assistant", answer, reasoning=thought)]


def finished(messages: list[Message], row: Row, where: str) -> Conversation:
  """The turns, after the row's own system prompt, with its tools."""
  chat.refuse_media(row, where)
  kwargs = row.get("chat_template_kwargs") or {}
  if isinstance(kwargs, str):
    kwargs = loads(kwargs, f"{where} chat_template_kwargs")
  given = list(kwargs.values()) if isinstance(kwargs, Mapping) else [kwargs]
  if any(x is not None for x in given):
    got = f"chat_template_kwargs {fields.shown(kwargs)}"
    cure = "Set data.template_kwargs, and drop the column."
    raise RowError(where, got, "template arguments of the whole run", cure)
  if found := [key for key in SYSTEMS if row.get(key)]:
    system = chat.text_of(row[fields.only(row, found, where)], where)
    if system.strip():
      messages = [Message("system", system), *messages]
  return Conversation(tuple(messages), fields.tools(row, where), source=where)


def _answered(
  asked: list[Message], row: Row, where: str, names: Names
) -> Conversation:
  filled = [key for key in ANSWERS if row.get(key) is not None]
  key = fields.only(row, filled or ANSWERS, where)
  return finished(asked + reply(row, key, where, names), row, where)


def _history(row: Row, where: str) -> list[Message]:
  """Earlier turns: [[question, answer], ...], the oldest first."""
  made = []
  pairs = fields.items(row, "history", where) if row.get("history") else []
  for index, pair in enumerate(pairs):
    if not isinstance(pair, list) or list(map(type, pair)) != [str, str]:
      got, expected = fields.shown(pair), "[question, answer], both strings"
      raise RowError(
        f"{where} history[{index}]", got, expected, "Correct or drop the row."
      )
    made += [Message("user", pair[0]), chat.spoken("assistant", pair[1])]
  return made
