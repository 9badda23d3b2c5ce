"""Rows to Conversations: one function per format, one table."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sft_jax.data import conversation as conversation_lib
from sft_jax.data import fields, rows

Conversation = conversation_lib.Conversation
Message = conversation_lib.Message
NothingToTrain = conversation_lib.NothingToTrain
RowError = conversation_lib.RowError
Row = Mapping[str, Any]

read_rows = rows.read_rows

# Keys that may hold an answer: two filled ones in a row are ambiguous.
ANSWERS = ("output", "response", "completion", "answer")
QUESTIONS = ("prompt", "question")
REASONINGS = ("reasoning_content", "reasoning", "thinking")
SHAREGPT_ROLES = {
  "human": "user",
  "user": "user",
  "gpt": "assistant",
  "assistant": "assistant",
  "function_call": "assistant",
  "observation": "tool",
  "tool": "tool",
  "system": "system",
}
_THINK = re.compile(r"\s*<think>(.*?)</think>\n*(.*)", re.DOTALL)


def to_conversation(
  row: Row, *, format: str = "auto", source: str = ""
) -> Conversation:
  """One row in any supported format as a Conversation.

      {"instruction": "Add.", "input": "2 2", "output": "4"}       alpaca
      {"prompt": "2 + 2 =", "completion": "4"}          prompt_completion
      {"messages": [{"role": "user", "content": "2 + 2?"},
                    {"role": "assistant", "content": "4"}]}      messages
      {"conversations": [{"from": "human", "value": "2 + 2?"},
                         {"from": "gpt", "value": "4"}]}         sharegpt
      {"text": "Two and two are four."}                              text

  Args:
    row: the row; a key whose value is None counts as absent.
    format: a name in `FORMATS`, or 'auto' to tell it from the row's keys.
    source: the row's place, such as 'rows.jsonl:12'; errors name it.

  Raises:
    RowError: a shape that no format, or more than one, claims; a turn that
      breaks the grammar of `conversation.check`.
    NothingToTrain: 'empty answer', in a row of one question and one answer.
      An empty assistant turn among `messages` is a RowError.
  """
  where = source or "row"
  # A null answer is an empty answer; any other null is a key left out.
  present = fields.present(row, where)
  row = {key: None for key in ANSWERS if key in row} | present
  if format == "auto":
    fitting = [name for name, made in FORMATS.items() if made.fits(row)]
  elif format in FORMATS:
    fitting = [format]
  else:
    raise ValueError(
      f"format: got {format!r}; expected auto or one of {', '.join(FORMATS)}. "
      "Set data.format to one of these."
    )
  if len(fitting) != 1:
    raise RowError(
      where,
      f"keys {sorted(row)}, which fit "
      + (" and ".join(fitting) or "no known format"),
      "; or ".join(f"{made.keys} ({name})" for name, made in FORMATS.items()),
      "Name the format (data.format), or rename or drop keys.",
    )
  made = FORMATS[fitting[0]].convert(row, source)
  return conversation_lib.check(made)


def from_alpaca(row: Row, source: str) -> Conversation:
  """instruction, input (optional), and output or response."""
  where = source or "row"
  asked = [fields.text(row, key, where) for key in ("instruction", "input")]
  asked = [part for part in asked if part.strip()]
  return _question_and_answer("\n\n".join(asked), row, source)


def from_prompt_completion(row: Row, source: str) -> Conversation:
  """prompt or question, and completion, response or answer: strings."""
  where = source or "row"
  asked = fields.text(row, fields.only(row, QUESTIONS, where), where)
  return _question_and_answer(asked, row, source)


def from_messages(row: Row, source: str) -> Conversation:
  """OpenAI's form, with tools, tool calls, reasoning and weights."""
  where = source or "row"
  messages = _system(row, where) + [
    _message(item, f"{where} messages[{index}]")
    for index, item in enumerate(fields.items(row, "messages", where))
  ]
  return Conversation(tuple(messages), fields.tools(row, where), source=source)


def from_sharegpt(row: Row, source: str) -> Conversation:
  """conversations of {from, value}; `function_call` values are JSON calls."""
  where = source or "row"
  messages = _system(row, where)
  for index, item in enumerate(fields.items(row, "conversations", where)):
    place = f"{where} conversations[{index}]"
    speaker = fields.text(item, "from", place)
    value = fields.text(item, "value", place)
    weight = fields.weight(item, place)
    # An unknown speaker passes through to be refused by the grammar.
    role = SHAREGPT_ROLES.get(speaker, speaker)
    if speaker == "function_call":
      calls = rows.loads(value, place)
      calls = calls if isinstance(calls, list) else [calls]
      made = tuple(fields.tool_call(call, place) for call in calls)
      messages.append(Message(role, "", tool_calls=made, weight=weight))
    else:
      messages.append(_spoken(role, value, weight=weight))
  return Conversation(tuple(messages), fields.tools(row, where), source=source)


def from_text(row: Row, source: str) -> Conversation:
  """text: raw text, every token of which is trained."""
  text = fields.text(row, "text", source or "row")
  if not text.strip():
    raise NothingToTrain("empty text", source)
  return Conversation(text=text, source=source)


class Format(NamedTuple):
  """How rows of a format are told and turned into Conversations."""

  keys: str
  fits: Callable[[Row], bool]
  convert: Callable[[Row, str], Conversation]


FORMATS = {
  "alpaca": Format(
    "instruction, input?, output | response",
    lambda row: "instruction" in row,
    from_alpaca,
  ),
  "prompt_completion": Format(
    "prompt | question, completion | response | answer",
    lambda row: (
      any(isinstance(row.get(key), str) for key in QUESTIONS)
      and any(key in row for key in ANSWERS)
    ),
    from_prompt_completion,
  ),
  "messages": Format("messages", lambda row: "messages" in row, from_messages),
  "sharegpt": Format(
    "conversations", lambda row: "conversations" in row, from_sharegpt
  ),
  "text": Format("text", lambda row: "text" in row, from_text),
}


def _question_and_answer(asked: str, row: Row, source: str) -> Conversation:
  where = source or "row"
  if not asked.strip():
    raise RowError(
      where, "an empty question", "something asked", "Fill or drop the row."
    )
  if row.get("history"):
    raise RowError(
      where,
      "earlier turns under the key history",
      "one question and one answer",
      "Write the turns out as messages.",
    )
  filled = [key for key in ANSWERS if row.get(key) is not None]
  answer = fields.text(row, fields.only(row, filled or ANSWERS, where), where)
  if not answer.strip():
    raise NothingToTrain("empty answer", source)
  messages = [
    *_system(row, where),
    Message("user", asked),
    _spoken("assistant", answer, weight=fields.weight(row, where)),
  ]
  return Conversation(tuple(messages), fields.tools(row, where), source=source)


def _message(item: Any, where: str) -> Message:
  item = fields.present(item, where)
  if "function_call" in item:
    raise RowError(
      where,
      "the old key function_call",
      "tool_calls",
      "Rewrite it as tool_calls: [{'function': {'name', 'arguments'}}].",
    )
  role = fields.text(item, "role", where)
  reasoning, calls = None, []
  if found := [key for key in REASONINGS if key in item]:
    reasoning = fields.text(item, fields.only(item, found, where), where)
  if "tool_calls" in item:
    calls = fields.items(item, "tool_calls", where)
  return _spoken(
    role,
    fields.content(item.get("content", ""), where),
    reasoning=reasoning,
    tool_calls=tuple(fields.tool_call(call, where) for call in calls),
    name=fields.text(item, "name", where) or None,
    tool_call_id=fields.text(item, "tool_call_id", where) or None,
    weight=fields.weight(item, where),
  )


def _spoken(role: str, content: str, **parts: Any) -> Message:
  """A Message whose leading <think> block, if any, became its reasoning.

  '<think>\\nTwo twos.\\n</think>\\n\\n4' is reasoning 'Two twos.', content '4'.
  """
  thinks = role == "assistant" and parts.get("reasoning") is None
  if thinks and (thought := _THINK.fullmatch(content)):
    parts["reasoning"] = thought[1].strip("\n")
    content = thought[2]
  return Message(role, content, **parts)


def _system(row: Row, where: str) -> list[Message]:
  """The row's own system prompt, where it has one, as a first turn."""
  system = fields.text(row, "system", where)
  return [Message("system", system)] if system.strip() else []
