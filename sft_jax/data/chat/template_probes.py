"""What a chat template does, found by having it render small conversations."""

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from sft_jax.data.chat import template_messages
from sft_jax.data.chat.sandbox import TemplateFailed
from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.conversation import Conversation, Message, ToolCall

# What looks like a token and must not be cut in two: <|end|>, <think>, [INST].
_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_WORDS = re.compile(r"\w+\s+\w+")

_SYSTEM = {"role": "system", "content": "Be brief."}
_ASKED = {"role": "user", "content": "What is the first one?"}
_ANSWERED = {"role": "assistant", "content": "Rain, as it happens."}
_ASKED_AGAIN = {"role": "user", "content": "And what is the second?"}
_CALL = Conversation(
  (
    Message("user", "Look it up."),
    Message(
      "assistant",
      "",
      tool_calls=(ToolCall("look_up", {"what": 'the "rain"'}, "abcdefghi"),),
    ),
  ),
  (
    {
      "type": "function",
      "function": {
        "name": "look_up",
        "description": "Looks something up.",
        "parameters": {
          "type": "object",
          "properties": {"what": {"type": "string", "description": "What."}},
          "required": ["what"],
        },
      },
    },
  ),
)


def form(
  template: ChatTemplate, kwargs: Mapping[str, Any]
) -> template_messages.Form:
  """The form of messages in which a template shows tool calls whole.

  Some want arguments as JSON text, some print None where calls have no
  content; the first form that shows name and arguments is it.
  """
  return _form(template, _key(kwargs))


def omitted(template: ChatTemplate, kwargs: Mapping[str, Any]) -> str:
  """The end of the generation prompt that replies do not begin after.

      prompt    <|User|>Hi<|Assistant|><think>\\n
      rendered  <|User|>Hi<|Assistant|>Hello.<|end|>
      omitted                          <think>\\n

  '' where they agree.
  """
  return _omitted(template, _key(kwargs))


def opening(template: ChatTemplate, kwargs: Mapping[str, Any]) -> str:
  """What opens an assistant's turn: '<|im_start|>assistant\\n', '[/INST]'."""
  return _opening(template, _key(kwargs))


def injected(template: ChatTemplate, kwargs: Mapping[str, Any]) -> str:
  """The system prompt that a template inserts where there is none, or ''.

  It is what stands before the first user turn and not before the second.
  """
  return _injected(template, _key(kwargs))


def shows_reasoning(template: ChatTemplate, kwargs: Mapping[str, Any]) -> bool:
  """Whether the reasoning of a conversation's last turn is rendered."""
  return _shows_reasoning(template, _key(kwargs))


def shared(one: str, other: str) -> int:
  """How many characters two texts begin with in common."""
  pairs = enumerate(zip(one, other, strict=False))
  shorter = min(len(one), len(other))
  return next((at for at, (a, b) in pairs if a != b), shorter)


@functools.lru_cache(maxsize=64)
def _form(template: ChatTemplate, key: str) -> template_messages.Form:
  first = template_messages.Form(reasoning_field=template.reads_reasoning)
  tools = _CALL.tools if template.reads_tools else ()
  for arguments in ("object", "json"):
    for empty in ("", None):
      made = first._replace(arguments=arguments, empty_content=empty)
      sentinels = template_messages.Sentinels()
      shown = template_messages.to_template_messages(_CALL, made)
      wrapped = template_messages.to_template_messages(
        _CALL, made, sentinels.wrap
      )
      try:
        found = sentinels.find(
          template.render(wrapped, tools=tools, **json.loads(key)),
          template.render(shown, tools=tools, **json.loads(key)),
        )
      except TemplateFailed:
        continue
      texts = {span.written for span in found or () if span.role == "tool_call"}
      if texts == {"look_up", 'the "rain"'}:
        return made
  return first


@functools.lru_cache(maxsize=64)
def _omitted(template: ChatTemplate, key: str) -> str:
  kwargs = json.loads(key)
  other = {"role": "assistant", "content": "No, snow."}
  for asked in ([_ASKED], [_SYSTEM, _ASKED]):
    try:
      prompt = template.render(asked, add_generation_prompt=True, **kwargs)
      # Two answers: one may begin as the omitted text does.
      kept = min(
        shared(prompt, template.render(turns, **kwargs))
        for turns in ([*asked, _ANSWERED], [*asked, other])
      )
    except TemplateFailed:
      continue
    for tag in (*_TAG.finditer(prompt), *template.control.finditer(prompt)):
      if tag.start() < kept < tag.end():
        kept = tag.start()
    return prompt[kept:] if _ASKED["content"] in prompt[:kept] else ""
  return ""


@functools.lru_cache(maxsize=64)
def _opening(template: ChatTemplate, key: str) -> str:
  kwargs = json.loads(key)
  try:
    asked = template.render([_ASKED], **kwargs)
    prompt = template.render([_ASKED], add_generation_prompt=True, **kwargs)
  except TemplateFailed:
    return ""
  if prompt != asked and prompt.startswith(asked):
    return prompt[len(asked) :]
  # The user's turn ends with it.
  return prompt.rpartition(_ASKED["content"])[2]


@functools.lru_cache(maxsize=64)
def _injected(template: ChatTemplate, key: str) -> str:
  turns = [_ASKED, _ANSWERED, _ASKED_AGAIN]
  try:
    text = template.render(turns, **json.loads(key))
  except TemplateFailed:
    return ""
  asked, answered, again = (text.find(turn["content"]) for turn in turns)
  if not 0 <= asked < answered < again:
    return ""
  before_first, before_second = text[:asked], text[answered:again]
  same = shared(before_first[::-1], before_second[::-1])
  rest = before_first[: len(before_first) - same]
  longest = max(template.control.split(rest), key=len).strip()
  return longest if _WORDS.search(longest) else ""


@functools.lru_cache(maxsize=64)
def _shows_reasoning(template: ChatTemplate, key: str) -> bool:
  form = template_messages.Form(reasoning_field=template.reads_reasoning)
  thought = "It was not snow."
  turns = (
    Message("user", _ASKED["content"]),
    Message("assistant", _ANSWERED["content"], thought),
  )
  shown = template_messages.to_template_messages(Conversation(turns), form)
  try:
    return thought in template.render(shown, **json.loads(key))
  except TemplateFailed:
    return False


def _key(kwargs: Mapping[str, Any]) -> str:
  return json.dumps(dict(kwargs), sort_keys=True)
