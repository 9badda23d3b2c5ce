"""Messages as chat templates read them, and sentinels that find them again.

Words may occur twice, so nothing is searched for: the messages are rendered
again with an invisible sentinel character on either side of each text. If
taking the sentinels out gives the first rendering, they show to the character
what the template put where.
"""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from sft_jax.data.conversation import Conversation, Message

# Around reasoning in a content, where the row does not write its own.
THINK_BLOCK = ("<think>\n", "\n</think>\n\n")
# Sentinels are characters of Unicode's last private plane, which no text uses;
# in JSON that is pure ASCII they are pairs of escaped surrogates.
_FIRST, _LAST = 0x100000, 0x10FFFD
_SENTINEL = re.compile(
  f"[{chr(_FIRST)}-{chr(_LAST)}]"
  r"|\\udb[cdef][0-9a-f]\\ud[cdef][0-9a-f]{2}"
)
_MOST = (_LAST - _FIRST) // 2
Wrap = Callable[[str, str], str]


class Form(NamedTuple):
  """How a template wants its messages; see `template_probes.form`."""

  # It reads reasoning_content (or thinking). Otherwise the reasoning goes back
  # into the content, exactly as the row wrote it.
  reasoning_field: bool = True
  arguments: str = "object"  # Of tool calls: an 'object', or its 'json' text.
  empty_content: str | None = ""  # The content of a turn that only calls tools.


DEFAULT_FORM = Form()


def to_template_messages(
  conversation: Conversation,
  form: Form = DEFAULT_FORM,
  wrap: Wrap = lambda role, text: text,
) -> list[dict[str, Any]]:
  """Messages as dicts, without keys they have no value for, since templates
  ask; `wrap` makes the text to render of (token role, text)."""
  return [_to_dict(message, form, wrap) for message in conversation.messages]


def texts(message: Message) -> list[tuple[str, str]]:
  """(token role, text) of all that `to_template_messages` wraps, in order."""
  found: list[tuple[str, str]] = []

  def note(role: str, text: str) -> str:
    found.append((role, text))
    return text

  _to_dict(message, DEFAULT_FORM, note)
  return found


def _to_dict(message: Message, form: Form, wrap: Wrap) -> dict[str, Any]:
  made: dict[str, Any] = {"role": message.role, "content": ""}
  thought = message.reasoning
  reasoning = "" if thought is None else wrap("reasoning", thought)
  role = "answer" if message.role == "assistant" else message.role
  content = wrap(role, message.content)
  if thought is not None:
    if form.reasoning_field:
      made["reasoning_content"] = made["thinking"] = reasoning
    else:
      before, after = message.think_block or THINK_BLOCK
      content = before + reasoning + after + content
  made["content"] = content
  if message.tool_calls:
    made["content"] = content or form.empty_content
    made["tool_calls"] = []
  for call in message.tool_calls:
    function = {"name": wrap("tool_call", call.name)}
    function["arguments"] = map_strings(call.arguments, wrap)
    if form.arguments == "json":
      arguments = json.dumps(function["arguments"], ensure_ascii=False)
      function["arguments"] = arguments
    own = {} if call.id is None else {"id": call.id}
    made["tool_calls"] += [{"type": "function", **own, "function": function}]
  for key in ("name", "tool_call_id"):
    if (value := getattr(message, key)) is not None:
      made[key] = value
  return made


def map_strings(value: Any, wrap: Wrap) -> Any:
  """A copy of JSON with every string wrapped; keys stay, for templates sort
  by them."""
  if isinstance(value, str):
    return wrap("tool_call", value)
  if isinstance(value, dict):
    return {key: map_strings(one, wrap) for key, one in value.items()}
  if isinstance(value, list | tuple):
    return [map_strings(one, wrap) for one in value]
  return value


class RoleSpan(NamedTuple):
  """A text of the row, in a rendering."""

  # Its characters, without white space around it.
  start: int
  end: int
  role: str  # Its token role.
  written: str  # The text as the row has it; the rendering may have escaped it.

  def moved(self, by: int) -> "RoleSpan":
    return self._replace(start=self.start + by, end=self.end + by)

  def within(self, start: int, end: int) -> bool:
    return start <= self.start and self.end <= end


class Sentinels:
  """Wraps texts, and finds them again in a rendering.

  Equal texts of one role get equal sentinels, since templates compare
  messages. White space around a text stays outside, since templates strip it.
  """

  def __init__(self) -> None:
    self._numbers: dict[tuple[str, str], int] = {}
    self._keys: list[tuple[str, str]] = []
    # Of the rendering before, with which the next often begins, up to a few
    # spans from its end: the text, its number of sentinels, and the spans.
    self._known: tuple[str, int, list[RoleSpan]] = ("", 0, [])

  def wrap(self, role: str, text: str) -> str:
    """The text between two sentinels; blank text as it is."""
    core = text.strip()
    if not core or len(self._keys) == _MOST:
      return text
    number = self._numbers.setdefault((role, core), len(self._keys))
    if number == len(self._keys):
      self._keys.append((role, core))
    at = text.index(core)
    opening, closing = chr(_FIRST + 2 * number), chr(_FIRST + 2 * number + 1)
    return text[:at] + opening + core + closing + text[at + len(core) :]

  def find(self, wrapped: str, text: str) -> list[RoleSpan] | None:
    """The role spans of `text`, in order, from the sentinels in `wrapped`.

    None where that is not certain: the sentinels have changed the rendering,
    or the text has such characters of its own.
    """
    known, removed, spans = self._known
    if not wrapped.startswith(known):
      known, removed, spans = "", 0, []
    spans, opened, closed = spans.copy(), {}, []
    for sentinel in _SENTINEL.finditer(wrapped, len(known)):
      number = ord(json.loads(f'"{sentinel[0]}"')) - _FIRST
      at = sentinel.start() - removed
      removed += len(sentinel[0])
      if number % 2 == 0:
        opened[number // 2] = at
      elif number // 2 < len(self._keys) and number // 2 in opened:
        start = opened.pop(number // 2)
        spans.append(RoleSpan(start, at, *self._keys[number // 2]))
        if not opened:
          closed.append((sentinel.end(), removed, len(spans)))
      else:  # Cut off by the template.
        return None
    if opened or _SENTINEL.search(text) or _SENTINEL.sub("", wrapped) != text:
      return None
    if len(closed) > 8:
      end, removed, count = closed[-8]
      self._known = (wrapped[:end], removed, spans[:count])
    spans.sort()
    return spans


def search(texts: list[tuple[str, str]], rendering: str) -> list[RoleSpan]:
  """Spans of (role, text) pairs that stand in a rendering exactly once: where
  sentinels change it, good enough to count by, not to train by."""
  spans = []
  for role, text in dict.fromkeys(texts):
    core = text.strip()
    if core and rendering.count(core) == 1:
      at = rendering.index(core)
      spans.append(RoleSpan(at, at + len(core), role, core))
  apart: list[RoleSpan] = []
  for span in sorted(spans):
    if not apart or span.start >= apart[-1].end:
      apart.append(span)
  return apart


def as_written(written: str, shown: str) -> bool:
  """Whether `shown` is the text, as it is or as the inside of a JSON string."""
  return shown == written or shown in _in_json(written)


def stands_in(text: str, shown: str) -> bool:
  """Whether a text stands in another, as it is or as in JSON."""
  return text in shown or any(one in shown for one in _in_json(text))


def _in_json(text: str) -> list[str]:
  """A text as it may stand between the quotes of a JSON string."""
  return [json.dumps(text, ensure_ascii=x)[1:-1] for x in (False, True)]
