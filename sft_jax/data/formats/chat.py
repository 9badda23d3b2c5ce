"""Lists of turns, in the spellings of many vendors, to Messages.

OpenAI (chat and responses), ShareGPT, Hermes, Anthropic, Gemini, OpenRouter,
DeepSeek and Qwen: docs/data_formats.md shows a row of each.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sft_jax.data.conversation import Message, RowError, ToolCall
from sft_jax.data.formats import fields
from sft_jax.data.formats.fields import NOT_READ, Names
from sft_jax.data.readers.json import loads

# What data sets call the four roles, in small letters.
ROLES = {
  **dict.fromkeys(("system", "developer"), "system"),
  **dict.fromkeys(("user", "human"), "user"),
  **dict.fromkeys(("assistant", "gpt", "model"), "assistant"),
  **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
# Turns of the assistant whose whole content is JSON: calls of tools.
CALLS = ("function_call", "tool_call")
REASONINGS = (
  *("reasoning_content", "reasoning", "thinking", "thought", "thoughts"),
  "reasoning_details",
)
# What only text can stand for.
MEDIA = ("images", "image", "videos", "video", "audios", "audio")

_TEXTS = ("text", "input_text", "output_text", "refusal", None)
_REASONING_TEXTS = (
  *("thinking", "reasoning", "reasoning_text", "summary_text"),
  *("reasoning.text", "reasoning.summary"),
)
_ENCRYPTED = ("redacted_thinking", "reasoning.encrypted")
# The keys of a part that may hold its text.
_SAYS = ("text", "value", "thinking", "reasoning", "summary", "refusal")
# Of a part without a type: any other key may be a picture.
_PLAIN_PART = {"text", "value", "thought", "thoughtSignature"}
# What Hermes and Qwen write into the text of a turn.
_CALL_TEXT = re.compile(r"\s*<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_RESULT_TEXT = re.compile(
  r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL
)
_THINK = re.compile(r"\s*<think>(.*?)</think>\n*(.*)", re.DOTALL)


class _Parts(NamedTuple):
  """What the parts of a turn's content say, by kind."""

  text: str
  reasoning: str | None = None
  calls: tuple[ToolCall, ...] = ()
  results: tuple[Message, ...] = ()


def read(value: Any, key: str, where: str, names: Names) -> list[Message]:
  """The turns that a row holds under `key`."""
  turns: list[Message] = []
  loose = False  # Whether the item before was a part of a turn by itself.
  for index, item in enumerate(fields.items({key: value}, key, where)):
    place = f"{where} {key}[{index}]"
    made = _loose_item(item, place, names)
    was_loose, loose = loose, made is not None
    made = [made] if made else _messages(item, place, names)
    both = turns and turns[-1].role == made[0].role == "assistant"
    if both and (loose or was_loose):
      turns[-1] = _joined(turns[-1], made.pop(0))
    turns += made
  answered = any(one.role == "tool" for one in turns)
  if answered and not any(one.tool_calls for one in turns):
    turns = _calls_of_text(turns, where, names)
  return turns


def spoken(role: str, content: str, **parts: Any) -> Message:
  """A Message whose leading <think> block, if any, became its reasoning.

  '<think>\\nTwo twos.\\n</think>\\n\\n4' is reasoning 'Two twos.', content '4'.
  """
  thinks = role == "assistant" and parts.get("reasoning") is None
  if thinks and (thought := _THINK.fullmatch(content)):
    parts["reasoning"] = inner = thought[1].strip("\n")
    begin = thought.start(1) + thought[1].index(inner)
    between = content[begin + len(inner) : thought.start(2)]
    parts["think_block"] = (content[:begin], between)
    if spans := parts.get("spans"):  # They count from where the content began.
      cut = thought.start(2)
      parts["spans"] = tuple((a - cut, b - cut) for a, b in spans)
    content = thought[2]
  return Message(role, content, **parts)


def reasoning(item: Mapping[str, Any], where: str, names: Names) -> str | None:
  """The item's thinking under a key of its own, or, as OpenRouter writes it,
  the same text under several; None where it has none."""
  found = {}
  for key in REASONINGS:
    if isinstance(value := item.get(key), list | Mapping):
      value = _thought(_parts(value, where, names))
    if value is not None:
      found[key] = value
  # In parts, and whole: the parts do not say what was between them.
  if len({"".join(str(value).split()) for value in found.values()}) == 1:
    found = dict([*found.items()][:1])
  if not found:
    return None
  return fields.text(found, fields.only(found, list(found), where), where)


def _thought(parts: "_Parts") -> str | None:
  """The reasoning in parts, or what parts of plain text say in its place."""
  return parts.text or None if parts.reasoning is None else parts.reasoning


def weighed(messages: Iterable[Message], weight: float) -> list[Message]:
  """The same turns, with a weight for those of the assistant without one."""
  own = lambda one: one.role != "assistant" or one.weight is not None
  give = lambda one: dataclasses.replace(one, weight=weight)
  return [one if own(one) else give(one) for one in messages]


def refuse_media(item: Mapping[str, Any], where: str) -> None:
  """A picture left out would leave an answer about nothing."""
  for key in MEDIA:
    if item.get(key):
      raise RowError(
        where,
        f"{key} {fields.shown(item[key])}",
        "text alone",
        "Only text can be trained on: drop the row, or the column if the text "
        "stands without it.",
      )


def _messages(item: Any, where: str, names: Names) -> list[Message]:
  """The turns of one item: itself, after the results of tools that it holds."""
  item = fields.present(item, where)
  if names.keys:
    item = fields.Fields(fields.renamed(item, names.keys))
  refuse_media(item, where)
  role = fields.text(item, fields.only(item, ("role", "from"), where), where)
  # An unknown role passes through to be refused by the grammar.
  role = names.roles.get(role, role)
  role = ROLES.get(role.strip().lower(), role)
  is_call = role.lower() in CALLS
  keys = ("content", "value", "parts")
  keys = keys if any(key in item for key in keys) else ("refusal",)
  said = fields.one_of(item, keys, where, "")
  if role == "tool" and (
    isinstance(said, dict | int | float) or _is_data(said)
  ):
    said = fields.json_text(said, where)
  parts = _Parts(said) if isinstance(said, str) else _parts(said, where, names)
  calls = fields.one_of(item, ("tool_calls", "function_call"), where, [])
  thoughts = {reasoning(item, where, names), parts.reasoning} - {None}
  if len(thoughts) > 1:
    raise RowError(
      where, "different reasoning twice", "it in one place", "Drop one of them."
    )
  made = spoken(
    "assistant" if is_call else role,
    parts.text,
    reasoning=next(iter(thoughts), None),
    tool_calls=(*fields.tool_calls(calls, where), *parts.calls),
    name=fields.text(item, "name", where) or None,
    tool_call_id=fields.text(item, "tool_call_id", where) or None,
    weight=fields.weight(item, where),
    spans=fields.spans(item, where),
  )
  if is_call:
    calls = fields.tool_calls(loads(made.content, where), where)
    made = dataclasses.replace(made, content="", tool_calls=calls)
  if made.role != "assistant" and made.spans == ():
    made = dataclasses.replace(made, spans=None)
  names.notes.update(map(NOT_READ.format, fields.unread(item)))
  alone = parts.results and not made.content and made.role != "assistant"
  return [*parts.results, *([] if alone else [made])]


def _is_data(said: Any) -> bool:
  """Whether a list is what a tool gave, and no list of parts."""
  kinds = {"type", "text", "functionResponse", "function_response"}
  is_part = lambda one: isinstance(one, Mapping) and kinds & one.keys()
  return isinstance(said, list) and not any(map(is_part, said))


def _parts(value: Any, where: str, names: Names) -> _Parts:
  """The parts of a content list.

  Raises RowError: a part that is no text; an order that would change, since a
  Message has reasoning, text and calls in this order.
  """
  value = [value] if isinstance(value, Mapping) else value
  if not isinstance(value, list):
    got = f"content of {fields.kind(value)}"
    raise RowError(where, got, "a string", "Make it a string.")
  # Of each kind: results, reasoning, text, calls.
  made: tuple[list, list, list, list] = ([], [], [], [])
  last = 0
  for part in value:
    held = fields.present(part, where) if isinstance(part, Mapping) else {}
    kind = held.get("type")
    text = next((held[x] for x in _SAYS if isinstance(held.get(x), str)), None)
    for key in ("summary", "thinking"):  # OpenAI's responses, Mistral's.
      if isinstance(held.get(key), list):
        text = _thought(_parts(held[key], where, names))
    if kind is None and not held.keys() <= _PLAIN_PART:
      text = None
    call = held.get("functionCall") or held.get("function_call")
    result = held.get("functionResponse") or held.get("function_response")
    if kind in _ENCRYPTED:
      names.notes.add(NOT_READ.format(kind))
      continue
    if kind == "tool_use" or isinstance(call, Mapping):
      given = call or held
      given = {**given, "arguments": given.get("args") or given.get("input")}
      rank, one = 3, fields.tool_call(given, where)
    elif kind == "tool_result" or isinstance(result, Mapping):
      rank, one = 0, _result(result or held, where, names)
    elif kind in _REASONING_TEXTS or held.get("thought") is True:
      rank, one = 1, text
    else:
      rank, one = 2, text if kind in _TEXTS else None
    if one is None:
      got = f"a content part {fields.shown(part)}"
      cure = "Only text can be trained on: drop the row."
      raise RowError(where, got, "parts {'type': 'text', 'text': ...}", cure)
    if rank < last and one:
      got = f"a content part {fields.shown(part)} after others"
      expected = "results of tools, reasoning, text and calls in this order"
      raise RowError(where, got, expected, "Split the turn into several.")
    made[rank].append(one)
    last = rank if one else last
  results, thoughts, texts, calls = made
  thought = "\n".join(thoughts) if thoughts else None
  return _Parts("".join(texts), thought, tuple(calls), tuple(results))


def text_of(value: Any, where: str) -> str:
  """A system prompt: a string, parts of text, or Gemini's {'parts': [...]}."""
  if isinstance(value, Mapping):
    value = value.get("parts")
  if isinstance(value, str):
    return value
  return _parts(value, where, fields.to_names({})).text


def _result(part: Mapping[str, Any], where: str, names: Names) -> Message:
  """What a tool answered, in a part of Anthropic's or of Gemini's."""
  said = part.get("content", part.get("response", ""))
  if isinstance(said, list):
    said = _parts(said, where, names).text
  elif not isinstance(said, str):
    said = fields.json_text(said, where)
  name = fields.text(part, "name", where) or None
  call_id = fields.text(part, "tool_use_id", where) or None
  return Message("tool", said, name=name, tool_call_id=call_id)


def _loose_item(item: Any, where: str, names: Names) -> Message | None:
  """A part of a turn that OpenAI's responses have as an item of their own."""
  if not isinstance(item, Mapping):
    return None
  if item.get("channel") == "analysis" and item.get("role") == "assistant":
    said = item.get("content")  # OpenAI's harmony.
    if isinstance(said, list):
      said = _thought(_parts(said, where, names))
    if isinstance(said, str):
      return Message("assistant", "", reasoning=said)
  if "role" in item or "from" in item:
    return None
  call_id = item.get("call_id")
  if (kind := item.get("type")) == "reasoning":
    listed = item.get("content") or item.get("summary") or []
    thought = _thought(_parts(listed, where, names))
    if thought is None:
      names.notes.add(NOT_READ.format("reasoning.encrypted_content"))
    return Message("assistant", "", reasoning=thought)
  if kind == "function_call":
    call = fields.tool_call({**item, "id": call_id}, where)
    return Message("assistant", "", tool_calls=(call,))
  if kind == "function_call_output":
    said = item.get("output")
    said = said if isinstance(said, str) else fields.json_text(said, where)
    return Message("tool", said, tool_call_id=call_id)
  return None


def _joined(a: Message, b: Message) -> Message:
  """Two items that are one turn of the assistant."""
  thoughts = [one.reasoning for one in (a, b) if one.reasoning is not None]
  reasoning = "\n".join(thoughts) if thoughts else None
  content, calls = a.content + b.content, a.tool_calls + b.tool_calls
  parts = {"content": content, "reasoning": reasoning, "tool_calls": calls}
  return dataclasses.replace(b, **parts)


def _calls_of_text(
  turns: list[Message], where: str, names: Names
) -> list[Message]:
  """Calls and results of tools that are written as text, as Hermes does.

  '<tool_call>{...}</tool_call>' in an assistant turn becomes a call, and what
  is in '<tool_response>' the content of a tool turn.
  """
  made: list[Message] = []
  for one in turns:
    found = _CALL_TEXT.findall(one.content) if one.role == "assistant" else []
    rest = _CALL_TEXT.sub("", one.content).rstrip()
    if found and one.spans is None and one.content.startswith(rest):
      calls = tuple(fields.tool_call(loads(x, where), where) for x in found)
      one = dataclasses.replace(one, content=rest, tool_calls=calls)
      names.notes.add("tool calls read from <tool_call> text")
    results = _RESULT_TEXT.findall(one.content) if one.role == "tool" else []
    if not results or _RESULT_TEXT.sub("", one.content):
      results = [one.content]
    made += [dataclasses.replace(one, content=text) for text in results]
  return made
