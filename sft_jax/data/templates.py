"""Conversations to text, by the model's own chat template."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sft_jax.data import conversation as conversation_lib
from sft_jax.data import jinja

Conversation = conversation_lib.Conversation
Message = conversation_lib.Message
RowError = conversation_lib.RowError

# Names under which templates read the thinking of a turn. `reasoning_content`
# and `thinking` are filled in both, as transformers does.
_READS_REASONING = re.compile(
  r"reasoning_content|[.'\"](?:thinking|reasoning)\b"
)


class ChatTemplate:
  """A model's Jinja chat template and the special tokens it writes.

  Args:
    source: the Jinja text.
    special_tokens: variables that the template may read, such as
      {'bos_token': '<s>', 'eos_token': '</s>'}.
    stop_tokens: texts at which generation stops.
    control_tokens: texts that no message may contain, since the tokenizer
      would read them as structure; stop tokens are always among them.
  """

  def __init__(
    self,
    source: str,
    special_tokens: Mapping[str, str] | None = None,
    *,
    stop_tokens: Sequence[str] = (),
    control_tokens: Sequence[str] = (),
  ):
    self.source = source
    self.special_tokens = dict(special_tokens or {})
    self.stop_tokens = tuple(stop_tokens)
    self.control_tokens = tuple(control_tokens)
    self.reads_reasoning = bool(_READS_REASONING.search(source))
    self.reads_tools = bool(re.search(r"\btools\b", source))
    self._template = jinja.compile(source)

  @functools.cached_property
  def _stop(self) -> re.Pattern[str]:
    return _any_of(self.stop_tokens)

  @functools.cached_property
  def _control(self) -> re.Pattern[str]:
    return _any_of({*self.stop_tokens, *self.control_tokens})

  def render(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = False,
    **kwargs: Any,
  ) -> str:
    """The text of `messages` (see `to_template_messages`), as transformers'.

    Args:
      messages: plain dicts.
      tools: JSON schemas; none is passed to the template as None.
      add_generation_prompt: end with what opens an assistant turn.
      **kwargs: more variables, such as enable_thinking. `date`
        ('2026-01-31') is what strftime_now reads.

    Raises:
      jinja.TemplateFailed: the template refuses these messages; its own words.
      ValueError: the template asks for today's date and none is pinned.
    """
    variables = {
      **self.special_tokens,
      "messages": messages,
      "tools": list(tools) or None,
      "documents": None,
      "add_generation_prompt": add_generation_prompt,
      **kwargs,
    }
    return jinja.render(self._template, variables)

  def stop_in(self, reply: str, where: str) -> int:
    """Length of a reply up to and including its stop token.

    '4<|im_end|>\\n' -> 11. Generation ends at the first stop token, so a
    template that goes on after it cannot be learnt from, except for white
    space and further stop tokens.
    """
    stop = self._stop.search(reply)
    if stop is None:
      near = _any_of(self.control_tokens).findall(reply)
      raise RowError(
        where,
        f"a reply without a stop token, ending in {reply[-40:]!r}",
        f"one of {list(self.stop_tokens)}",
        "Add the id of the token that ends a turn"
        + (f" ({near[-1]!r}?)" if near else "")
        + " to eos_token_id in the model folder's generation_config.json.",
      )
    if rest := self._stop.sub("", reply[stop.end() :]).strip():
      raise RowError(
        where,
        f"{rest[:40]!r} after the stop token {stop[0]!r}",
        "a reply that ends at its first stop token",
        "Generation would stop there: correct eos_token_id or the template.",
      )
    return stop.end()

  def refuse_control_tokens(self, conversation: Conversation) -> None:
    """Raises a RowError where a message holds a control token's text."""

    def look(said: str, where: str) -> None:
      if found := self._control.search(said):
        raise RowError(
          where,
          f"the control token {found[0]!r} in the text",
          "text without control tokens",
          "Remove it: the model would read it as structure.",
        )

    for index, message in enumerate(conversation.messages):
      calls = [(call.name, call.arguments) for call in message.tool_calls]
      parts = (message.content, message.reasoning or "", message.name or "")
      look("\n".join(parts), conversation.where(index))
      if calls:
        look(jinja.tojson(calls), conversation.where(index))
    place = conversation.source or "row"
    if conversation.tools:
      look(jinja.tojson(conversation.tools), f"{place} tools")
    if conversation.text is not None:
      look(conversation.text, f"{place} text")


def to_template_messages(
  conversation: Conversation, *, reasoning_field: bool = True
) -> list[dict[str, Any]]:
  """Messages as the plain dicts that chat templates read.

  Keys that a message has no value for are left out, since templates ask
  whether they are defined; content is always a string.

  Args:
    conversation: whose messages.
    reasoning_field: the template reads reasoning_content (or thinking).
      Otherwise the thinking goes back into the content it came from:
      '<think>\\n...\\n</think>\\n\\n' before it.
  """
  return [_plain(message, reasoning_field) for message in conversation.messages]


def _plain(message: Message, reasoning_field: bool) -> dict[str, Any]:
  plain: dict[str, Any] = {"role": message.role, "content": message.content}
  if message.reasoning is not None:
    if reasoning_field:
      plain["reasoning_content"] = plain["thinking"] = message.reasoning
    else:
      thought = f"<think>\n{message.reasoning}\n</think>\n\n"
      plain["content"] = thought + message.content
  if message.tool_calls:
    plain["tool_calls"] = [
      {
        "type": "function",
        **({} if call.id is None else {"id": call.id}),
        "function": {"name": call.name, "arguments": call.arguments},
      }
      for call in message.tool_calls
    ]
  for key in ("name", "tool_call_id"):
    if (value := getattr(message, key)) is not None:
      plain[key] = value
  return plain


def render_prompt(
  conversation: Conversation,
  template: ChatTemplate,
  *,
  template_kwargs: Mapping[str, Any] | None = None,
) -> str:
  """The conversation so far and the generation prompt: what inference sees."""
  template.refuse_control_tokens(conversation)
  return render_turns(
    conversation,
    template,
    len(conversation.messages),
    add_generation_prompt=True,
    template_kwargs=template_kwargs,
  )


def render_turns(
  conversation: Conversation,
  template: ChatTemplate,
  count: int,
  *,
  add_generation_prompt: bool,
  template_kwargs: Mapping[str, Any] | None = None,
) -> str:
  """The text of the first `count` turns; a refusal is a RowError."""
  if conversation.tools and not template.reads_tools:
    raise RowError(
      f"{conversation.source or 'row'} tools",
      f"{len(conversation.tools)} tools and a chat template that reads none",
      "a template that shows the model its tools",
      "Use a template with tools, or drop them from the row.",
    )
  messages = to_template_messages(
    conversation, reasoning_field=template.reads_reasoning
  )[:count]
  try:
    return template.render(
      messages,
      tools=conversation.tools,
      add_generation_prompt=add_generation_prompt,
      **(template_kwargs or {}),
    )
  except jinja.TemplateFailed as error:
    raise RowError(
      conversation.where(max(count - 1, 0)),
      f"refused by the chat template: {error}",
      "turns that the template accepts",
      "Change or drop the row, or use another template.",
    ) from error


def _any_of(texts: Any) -> re.Pattern[str]:
  """Matches any of the texts, the longest first; of none, nothing."""
  longest_first = sorted(texts, key=len, reverse=True)
  return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
