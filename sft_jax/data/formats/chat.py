"""Lists of turns, in the spellings of OpenAI and of ShareGPT, to Messages."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sft_jax.data.conversation import Message, RowError
from sft_jax.data.formats import fields
from sft_jax.data.readers.json import loads

# What data sets call the four roles.
ROLES = {
  "system": "system",
  "developer": "system",
  "user": "user",
  "human": "user",
  "assistant": "assistant",
  "gpt": "assistant",
  "model": "assistant",
  "tool": "tool",
  "function": "tool",
  "observation": "tool",
  "ipython": "tool",
}
# Turns of the assistant whose whole content is JSON: calls of tools.
CALLS = ("function_call", "tool_call")
REASONINGS = ("reasoning_content", "reasoning", "thinking")
# What only text can stand for.
MEDIA = ("images", "image", "videos", "video", "audios", "audio")

_THINK = re.compile(r"\s*<think>(.*?)</think>\n*(.*)", re.DOTALL)


def read(
  value: Any, key: str, where: str, names: fields.Names
) -> list[Message]:
  """The turns that a row holds under `key`."""
  return [
    _message(item, f"{where} {key}[{index}]", names)
    for index, item in enumerate(fields.items({key: value}, key, where))
  ]


def spoken(role: str, content: str, **parts: Any) -> Message:
  """A Message whose leading <think> block, if any, became its reasoning.

  '<think>\\nTwo twos.\\n</think>\\n\\n4' is reasoning 'Two twos.', content '4'.
  """
  thinks = role == "assistant" and parts.get("reasoning") is None
  if thinks and (thought := _THINK.fullmatch(content)):
    parts["reasoning"] = thought[1].strip("\n")
    if parts.get("spans"):
      # They count from where the content began.
      before = thought.start(2)
      parts["spans"] = tuple(
        (a - before, b - before) for a, b in parts["spans"]
      )
    content = thought[2]
  return Message(role, content, **parts)


def reasoning(item: Mapping[str, Any], where: str) -> str | None:
  """The item's thinking under a key of its own; None where it has none."""
  found = [key for key in REASONINGS if item.get(key) is not None]
  if not found:
    return None
  return fields.text(item, fields.only(item, found, where), where)


def as_prompt(messages: Iterable[Message]) -> list[Message]:
  """The same turns as what comes before the answer: no longer trained.

  A weight that a turn was given itself stays.
  """
  return [
    dataclasses.replace(one, weight=0.0)
    if one.role == "assistant" and one.weight is None
    else one
    for one in messages
  ]


def refuse_media(item: Mapping[str, Any], where: str) -> None:
  """A picture left out would leave an answer about nothing."""
  if item.keys().isdisjoint(MEDIA):
    return
  for key in MEDIA:
    if item.get(key):
      raise RowError(
        where,
        f"{key} {fields.shown(item[key])}",
        "text alone",
        "Only text can be trained on: drop the row, or the column if the text "
        "stands without it.",
      )


def _message(item: Any, where: str, names: fields.Names) -> Message:
  item = fields.present(item, where)
  if names.keys:
    item = fields.renamed(item, names.keys)
  refuse_media(item, where)
  role = fields.text(item, fields.only(item, ("role", "from"), where), where)
  # An unknown role passes through to be refused by the grammar.
  role = names.roles.get(role, role)
  says = [key for key in ("content", "value") if key in item]
  content = item[fields.only(item, says, where)] if says else ""
  content = fields.content(content, where)
  found = [key for key in ("tool_calls", "function_call") if key in item]
  calls = item[fields.only(item, found, where)] if found else []
  made = spoken(
    "assistant" if role in CALLS else ROLES.get(role, role),
    content,
    reasoning=reasoning(item, where),
    tool_calls=fields.tool_calls(calls, where),
    name=fields.text(item, "name", where) or None,
    tool_call_id=fields.text(item, "tool_call_id", where) or None,
    weight=fields.weight(item, where),
    spans=fields.spans(item, where),
  )
  if role in CALLS:
    calls = fields.tool_calls(loads(made.content, where), where)
    made = dataclasses.replace(made, content="", tool_calls=calls)
  if made.role != "assistant" and made.spans == ():
    made = dataclasses.replace(made, spans=None)
  return made
