"""Messages as the plain dicts that chat templates read."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from sft_jax.data.conversation import Conversation, Message

# What a turn's content is, as a part (`token_roles.TOKEN_ROLES`).
CONTENT = {
  "system": "system",
  "user": "user",
  "assistant": "answer",
  "tool": "tool",
}
Mark = Callable[[str, str], str]


class Form(NamedTuple):
  """What a template wants its messages to look like; see `probes.form`.

  Attributes:
    reasoning_field: it reads reasoning_content (or thinking). Otherwise the
      thinking goes back into the content it came from:
      '<think>\\n...\\n</think>\\n\\n' before it.
    arguments: of tool calls: an 'object', or its 'json' text.
    empty_content: the content of a turn that only calls tools.
  """

  reasoning_field: bool = True
  arguments: str = "object"
  empty_content: str | None = ""


DEFAULT_FORM = Form()


def to_template_messages(
  conversation: Conversation,
  form: Form = DEFAULT_FORM,
  mark: Mark = lambda part, text: text,
) -> list[dict[str, Any]]:
  """Messages as dicts. Keys that a message has no value for are left out,
  since templates ask whether they are defined.

  Args:
    conversation: whose messages.
    form: what the template wants.
    mark: (part, text) -> the text to show for it; see `marks.Marks`.
  """
  return [_plain(message, form, mark) for message in conversation.messages]


def said(message: Message) -> list[tuple[str, str]]:
  """(part, text) of all that `to_template_messages` marks, in order."""
  found: list[tuple[str, str]] = []

  def note(part: str, text: str) -> str:
    found.append((part, text))
    return text

  _plain(message, DEFAULT_FORM, note)
  return found


def _plain(message: Message, form: Form, mark: Mark) -> dict[str, Any]:
  plain: dict[str, Any] = {"role": message.role, "content": ""}
  thought = message.reasoning
  reasoning = "" if thought is None else mark("reasoning", thought)
  content = mark(CONTENT[message.role], message.content)
  if thought is not None:
    if form.reasoning_field:
      plain["reasoning_content"] = plain["thinking"] = reasoning
    else:
      content = f"<think>\n{reasoning}\n</think>\n\n{content}"
  plain["content"] = content
  if message.tool_calls:
    plain["content"] = content or form.empty_content
    plain["tool_calls"] = [
      {
        "type": "function",
        **({} if call.id is None else {"id": call.id}),
        "function": {
          "name": mark("tool_call", call.name),
          "arguments": _arguments(call.arguments, form, mark),
        },
      }
      for call in message.tool_calls
    ]
  for key in ("name", "tool_call_id"):
    if (value := getattr(message, key)) is not None:
      plain[key] = value
  return plain


def _arguments(arguments: dict[str, Any], form: Form, mark: Mark) -> Any:
  marked = leaves(arguments, mark)
  if form.arguments == "json":
    return json.dumps(marked, ensure_ascii=False)
  return marked


def leaves(value: Any, mark: Mark) -> Any:
  """A copy of JSON with every string in it marked; keys stay, for templates
  sort by them."""
  if isinstance(value, str):
    return mark("tool_call", value)
  if isinstance(value, dict):
    return {key: leaves(one, mark) for key, one in value.items()}
  if isinstance(value, list | tuple):
    return [leaves(one, mark) for one in value]
  return value
