"""What a chat template does, found by having it render small conversations."""

import functools
import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

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
_LOOK_UP = {
  "name": "look_up",
  "description": "Looks something up.",
  "parameters": {
    "type": "object",
    "properties": {"what": {"type": "string", "description": "What."}},
    "required": ["what"],
  },
}
_CALLED = ToolCall("look_up", {"what": 'the "rain"'}, "abcdefghi")
_CALL = Conversation(
  (Message("user", "Look it up."), Message("assistant", "", None, (_CALLED,))),
  ({"type": "function", "function": _LOOK_UP},),
)

_T = TypeVar("_T")


def _probe(failed: _T) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
  """Asks once for each template and its variables; `failed` where the template
  refuses to render what it is asked with."""

  def wrapper(function: Callable[..., _T]) -> Callable[..., _T]:
    @functools.lru_cache(maxsize=64)
    def cached(template: ChatTemplate, key: str) -> _T:
      try:
        return function(template, json.loads(key))
      except TemplateFailed:
        return failed

    @functools.wraps(function)
    def probe(template: ChatTemplate, kwargs: Mapping[str, Any]) -> _T:
      return cached(template, json.dumps(dict(kwargs), sort_keys=True))

    return probe

  return wrapper


@_probe(template_messages.DEFAULT_FORM)
def form(
  template: ChatTemplate, kwargs: dict[str, Any]
) -> template_messages.Form:
  """The form of messages in which a template shows tool calls whole.

  Some want arguments as JSON text, some print None where calls have no
  content; the first form that shows name and arguments is it.
  """
  first = template_messages.Form(reasoning_field=template.reads_reasoning)
  tools = _CALL.tools if template.reads_tools else ()
  for arguments, empty in itertools.product(("object", "json"), ("", None)):
    made = first._replace(arguments=arguments, empty_content=empty)
    sentinels = template_messages.Sentinels()
    to_dicts = template_messages.to_template_messages
    to_messages = functools.partial(to_dicts, _CALL, made)
    try:
      found = sentinels.find(
        template.render(to_messages(sentinels.wrap), tools=tools, **kwargs),
        template.render(to_messages(), tools=tools, **kwargs),
      )
    except TemplateFailed:
      continue
    texts = {span.written for span in found or () if span.role == "tool_call"}
    if texts == {"look_up", 'the "rain"'}:
      return made
  return first


@_probe("")
def omitted(template: ChatTemplate, kwargs: dict[str, Any]) -> str:
  """The end of the generation prompt that replies do not begin after, or ''.

  prompt    <|User|>Hi<|Assistant|><think>\\n
  rendered  <|User|>Hi<|Assistant|>Hello.<|end|>
  omitted                          <think>\\n
  """
  other = {"role": "assistant", "content": "No, snow."}
  for asked in ([_ASKED], [_SYSTEM, _ASKED]):
    try:
      prompt = template.render(asked, add_generation_prompt=True, **kwargs)
      # Two answers: one may begin as the omitted text does.
      kept = min(
        shared(prompt, template.render([*asked, turn], **kwargs))
        for turn in (_ANSWERED, other)
      )
    except TemplateFailed:
      continue
    for tag in (*_TAG.finditer(prompt), *template.control.finditer(prompt)):
      if tag.start() < kept < tag.end():
        kept = tag.start()
    return prompt[kept:] if _ASKED["content"] in prompt[:kept] else ""
  return ""


@_probe("")
def opening(template: ChatTemplate, kwargs: dict[str, Any]) -> str:
  """What opens an assistant's turn: '<|im_start|>assistant\\n', '[/INST]'."""
  asked = template.render([_ASKED], **kwargs)
  prompt = template.render([_ASKED], add_generation_prompt=True, **kwargs)
  if prompt != asked and prompt.startswith(asked):
    return prompt[len(asked) :]
  # The user's turn ends with it.
  return prompt.rpartition(_ASKED["content"])[2]


@_probe("")
def injected(template: ChatTemplate, kwargs: dict[str, Any]) -> str:
  """The system prompt that a template inserts where there is none, or '': what
  stands before the first user turn and not before the second."""
  turns = [_ASKED, _ANSWERED, _ASKED_AGAIN]
  text = template.render(turns, **kwargs)
  asked, answered, again = (text.find(turn["content"]) for turn in turns)
  if not 0 <= asked < answered < again:
    return ""
  before_first, before_second = text[:asked], text[answered:again]
  same = shared(before_first[::-1], before_second[::-1])
  rest = before_first[: len(before_first) - same]
  longest = max(template.control.split(rest), key=len).strip()
  return longest if _WORDS.search(longest) else ""


@_probe(False)
def shows_reasoning(template: ChatTemplate, kwargs: dict[str, Any]) -> bool:
  """Whether the reasoning of a conversation's last turn is rendered."""
  form = template_messages.Form(reasoning_field=template.reads_reasoning)
  answer = Message("assistant", _ANSWERED["content"], "It was no snow.")
  turns = (Message("user", _ASKED["content"]), answer)
  shown = template_messages.to_template_messages(Conversation(turns), form)
  return "It was no snow." in template.render(shown, **kwargs)


def shared(one: str, other: str) -> int:
  """How many characters two texts begin with in common."""
  pairs = enumerate(zip(one, other, strict=False))
  shorter = min(len(one), len(other))
  return next((at for at, (a, b) in pairs if a != b), shorter)
