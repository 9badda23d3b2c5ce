"""Rows to Conversations: one function per format, one table."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sft_jax.data import conversation as conversation_lib
from sft_jax.data import rows

Conversation = conversation_lib.Conversation
Message = conversation_lib.Message
NothingToTrain = conversation_lib.NothingToTrain
RowError = conversation_lib.RowError
ToolCall = conversation_lib.ToolCall
Row = Mapping[str, Any]

read_rows = rows.read_rows

# Keys that may hold an answer: two filled ones in a row are ambiguous.
ANSWERS = ("output", "response", "completion", "answer")
QUESTIONS = ("prompt", "question")
# A message's own weight, under the names that data sets give it.
WEIGHTS = ("weight", "loss_weight", "train")
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
  if not isinstance(row, Mapping):
    raise RowError(where, _type(row), "an object", "Wrap it in an object.")
  # A null answer is an empty answer; any other null is a key left out.
  row = {k: v for k, v in row.items() if v is not None or k in ANSWERS}
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
  asked = [_text(row, key, where) for key in ("instruction", "input")]
  asked = [part for part in asked if part.strip()]
  return _question_and_answer("\n\n".join(asked), row, source)


def from_prompt_completion(row: Row, source: str) -> Conversation:
  """prompt or question, and completion, response or answer: strings."""
  key = _only(row, QUESTIONS, source or "row")
  return _question_and_answer(_text(row, key, source or "row"), row, source)


def from_messages(row: Row, source: str) -> Conversation:
  """OpenAI's form, with tools, tool calls, reasoning and weights."""
  where = source or "row"
  messages = [
    _message(item, f"{where} messages[{index}]")
    for index, item in enumerate(_list(row, "messages", where))
  ]
  return Conversation(tuple(messages), _tools(row, where), source=source)


def from_sharegpt(row: Row, source: str) -> Conversation:
  """conversations of {from, value}; `function_call` values are JSON calls."""
  where = source or "row"
  messages = _system(row, where)
  for index, item in enumerate(_list(row, "conversations", where)):
    place = f"{where} conversations[{index}]"
    speaker = _text(item, "from", place)
    value = _text(item, "value", place)
    weight = _weight(item, place)
    # An unknown speaker passes through to be refused by the grammar.
    role = SHAREGPT_ROLES.get(speaker, speaker)
    if speaker == "function_call":
      calls = rows.loads(value, place)
      calls = calls if isinstance(calls, list) else [calls]
      made = tuple(_tool_call(call, place) for call in calls)
      messages.append(Message(role, "", tool_calls=made, weight=weight))
    else:
      messages.append(_spoken(role, value, weight=weight))
  return Conversation(tuple(messages), _tools(row, where), source=source)


def from_text(row: Row, source: str) -> Conversation:
  """text: raw text, every token of which is trained."""
  text = _text(row, "text", source or "row")
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
  answer = _text(row, _only(row, filled or ANSWERS, where), where)
  if not answer.strip():
    raise NothingToTrain("empty answer", source)
  messages = [
    *_system(row, where),
    Message("user", asked),
    _spoken("assistant", answer, weight=_weight(row, where)),
  ]
  return Conversation(tuple(messages), _tools(row, where), source=source)


def _message(item: Any, where: str) -> Message:
  if not isinstance(item, Mapping):
    raise RowError(where, _type(item), "an object", "Give role and content.")
  item = {key: value for key, value in item.items() if value is not None}
  if "function_call" in item:
    raise RowError(
      where,
      "the old key function_call",
      "tool_calls",
      "Rewrite it as tool_calls: [{'function': {'name', 'arguments'}}].",
    )
  role = _text(item, "role", where)
  found = [key for key in REASONINGS if key in item]
  reasoning = _text(item, _only(item, found, where), where) if found else None
  calls = _list(item, "tool_calls", where) if "tool_calls" in item else []
  return _spoken(
    role,
    _content(item.get("content", ""), where),
    reasoning=reasoning,
    tool_calls=tuple(_tool_call(call, where) for call in calls),
    name=_text(item, "name", where) or None,
    tool_call_id=_text(item, "tool_call_id", where) or None,
    weight=_weight(item, where),
  )


def _spoken(role: str, content: str, **fields: Any) -> Message:
  """A Message whose leading <think> block, if any, became its reasoning.

  '<think>\\nTwo twos.\\n</think>\\n\\n4' is reasoning 'Two twos.', content '4'.
  """
  thinks = role == "assistant" and fields.get("reasoning") is None
  if thinks and (thought := _THINK.fullmatch(content)):
    fields["reasoning"] = thought[1].strip("\n")
    content = thought[2]
  return Message(role, content, **fields)


def _content(content: Any, where: str) -> str:
  """Content as one string; a list of text parts is joined."""
  if isinstance(content, str):
    return content
  if not isinstance(content, list):
    raise RowError(
      where, f"content of {_type(content)}", "a string", "Make it a string."
    )
  parts = []
  for part in content:
    kind = part.get("type") if isinstance(part, Mapping) else _type(part)
    text = part.get("text", part.get("value")) if kind == "text" else None
    if not isinstance(text, str):
      raise RowError(
        where,
        f"a content part of type {kind!r}",
        "parts {'type': 'text', 'text': ...}",
        "Only text can be trained on: drop the row.",
      )
    parts.append(text)
  return "".join(parts)


def _tool_call(call: Any, where: str) -> ToolCall:
  """{'function': {'name', 'arguments'}, 'id'?} or the same without wrapping.

  Arguments may be an object or that object as a JSON string; both become the
  object, since templates differ in which of them they can print.
  """
  inner = call.get("function", call) if isinstance(call, Mapping) else None
  if not isinstance(inner, Mapping) or "name" not in inner:
    raise RowError(
      where,
      f"a tool call {str(call)[:80]!r}",
      "an object with name and arguments",
      "Write {'function': {'name': ..., 'arguments': {...}}}.",
    )
  arguments = inner.get("arguments")
  if isinstance(arguments, str) and arguments.strip():
    arguments = rows.loads(arguments, where)
  if not arguments and not isinstance(arguments, list):
    arguments = {}
  if not isinstance(arguments, dict):
    raise RowError(
      where,
      f"tool call arguments of {_type(arguments)}",
      "an object",
      "Name every argument: {'city': 'Paris'}.",
    )
  call_id = _text(call, "id", where) or None
  return ToolCall(_text(inner, "name", where), arguments, call_id)


def _tools(row: Row, where: str) -> tuple[dict[str, Any], ...]:
  """The row's tool schemas; a JSON string of them is read, not rewritten."""
  tools = row.get("tools") or []
  if isinstance(tools, str):
    tools = rows.loads(tools, where) if tools.strip() else []
  if not isinstance(tools, list) or not all(
    isinstance(tool, dict) for tool in tools
  ):
    raise RowError(
      where,
      f"tools {str(tools)[:80]!r}",
      "a list of JSON schemas",
      "Wrap the schemas in a list.",
    )
  return tuple(tools)


def _system(row: Row, where: str) -> list[Message]:
  """The row's own system prompt, where it has one, as a first turn."""
  system = _text(row, "system", where)
  return [Message("system", system)] if system.strip() else []


def _weight(item: Row, where: str) -> float | None:
  found = [key for key in WEIGHTS if item.get(key) is not None]
  if not found:
    return None
  weight = item[_only(item, found, where)]
  if not isinstance(weight, bool | int | float):
    raise RowError(
      where, f"weight {weight!r}", "a number or a boolean", "Correct it."
    )
  return float(weight)


def _only(row: Row, keys: Any, where: str) -> str:
  """The one of `keys` that the row has."""
  found = [key for key in keys if key in row]
  if len(found) != 1:
    raise RowError(
      where,
      f"keys {found or sorted(row)}",
      f"exactly one of {', '.join(keys)}",
      "Rename or drop keys so that one is left.",
    )
  return found[0]


def _text(row: Any, key: str, where: str) -> str:
  """row[key] as a string; '' where it is absent."""
  if not isinstance(row, Mapping):
    raise RowError(where, _type(row), "an object", "Wrap it in an object.")
  value = row.get(key)
  if value is None:
    return ""
  if not isinstance(value, str):
    raise RowError(
      where, f"{key} of {_type(value)}", "a string", "Make it a string."
    )
  return value


def _list(row: Row, key: str, where: str) -> list[Any]:
  value = row.get(key)
  if not isinstance(value, list) or (not value and key != "tool_calls"):
    raise RowError(
      where,
      f"{key} of {_type(value)}" if value else f"no {key}",
      f"a list of {key}",
      "Fill it or drop the row.",
    )
  return value


def _type(value: Any) -> str:
  return f"type {type(value).__name__}"
