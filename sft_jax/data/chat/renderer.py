"""A conversation before its chat template: prompts and turns as text."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from sft_jax.data.chat import jinja, marks, template_messages, template_probes
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.conversation import Conversation, RowError


class Script:
  """Renders the turns of one conversation, plain and marked.

  Args:
    conversation: with reasoning='strip', its thinking is left out, and with
      'write' where the template leaves it out.
    template: the model's own.
    options: see `RenderOptions`.

  Attributes:
    thoughts: by turn, the thinking that is to be written into its reply
      (`thinking.fill`); '' where there is none.

  Raises:
    RowError: a control token in what is said (see
      `RenderOptions.control_tokens`); tools, and a template that reads none.
  """

  def __init__(
    self,
    conversation: Conversation,
    template: ChatTemplate,
    options: RenderOptions,
  ):
    if options.reasoning == "strip":
      conversation = _without_thinking(conversation)
    # Whether some text must be read as ordinary characters.
    self.escapes = refuse_control_tokens(conversation, template, options)
    self.thoughts = [""] * len(conversation.messages)
    if (
      options.reasoning == "write"
      and not template.reads_reasoning  # Its tags may be others.
      and not template_probes.shows_thinking(template, options.template_kwargs)
    ):
      self.thoughts = [
        (message.reasoning or "").strip() for message in conversation.messages
      ]
      conversation = _without_thinking(conversation)
    if conversation.tools and not template.reads_tools:
      raise RowError(
        f"{conversation.source or 'row'} tools",
        f"{len(conversation.tools)} tools and a chat template that reads none",
        "a template that shows the model its tools",
        "Use a template with tools, or drop them from the row.",
      )
    self.conversation, self.template = conversation, template
    self.options = options

  @functools.cached_property
  def _form(self) -> template_messages.Form:
    if any(message.tool_calls for message in self.conversation.messages):
      return template_probes.form(self.template, self.options.template_kwargs)
    return template_messages.Form(reasoning_field=self.template.reads_reasoning)

  @functools.cached_property
  def _plain(self) -> list[dict[str, Any]]:
    return template_messages.to_template_messages(self.conversation, self._form)

  @functools.cached_property
  def _marked(self) -> tuple[marks.Marks, list[dict[str, Any]]]:
    ink = marks.Marks()
    made = template_messages.to_template_messages(
      self.conversation, self._form, ink.mark
    )
    return ink, made

  def turns(self, count: int, then: Sequence[dict[str, Any]] = ()) -> str:
    """The text of the first `count` turns, and of plain ones after them."""
    return self._render([*self._plain[:count], *then], count)

  def prompt(self, count: int) -> str:
    """The text of the first `count` turns and what opens the assistant's.

    With generation_prompt='omit', without the end that replies do not go on
    from (`probes.omitted`).
    """
    return self._cut(self._render(self._plain[:count], count, True))

  def pieces(
    self, count: int, text: str, then: Sequence[dict[str, Any]] = ()
  ) -> list[marks.Piece] | None:
    """Where what the turns say stands in `turns(count, then)`, if certain."""
    ink, made = self._marked
    return ink.find(self._render([*made[:count], *then], count), text)

  def prompt_pieces(self, count: int, text: str) -> list[marks.Piece] | None:
    """Where what the turns say stands in `prompt(count)`, if certain."""
    ink, made = self._marked
    return ink.find(self._cut(self._render(made[:count], count, True)), text)

  def _cut(self, prompt: str) -> str:
    if self.options.generation_prompt == "omit":
      kwargs = self.options.template_kwargs
      return prompt.removesuffix(template_probes.omitted(self.template, kwargs))
    return prompt

  def _render(
    self, turns: list[dict[str, Any]], count: int, prompt: bool = False
  ) -> str:
    """A refusal of the template is a RowError."""
    try:
      text = self.template.render(
        turns,
        tools=self.conversation.tools,
        add_generation_prompt=prompt,
        **self.options.template_kwargs,
      )
    except jinja.TemplateFailed as error:
      raise RowError(
        self.conversation.where(max(count - 1, 0)),
        f"refused by the chat template: {error}",
        "turns that the template accepts",
        "Change or drop the row, or use another template.",
      ) from error
    refuse_surrogates(text, self.conversation)
    return text


def _without_thinking(conversation: Conversation) -> Conversation:
  messages = tuple(
    dataclasses.replace(message, reasoning=None)
    for message in conversation.messages
  )
  return dataclasses.replace(conversation, messages=messages)


def refuse_surrogates(text: str, conversation: Conversation) -> None:
  """Raises a RowError where a text is no Unicode: half of a character."""
  if text.isascii():
    return
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise RowError(
      conversation.source or "row",
      f"the lone surrogate {text[error.start]!r}",
      "text of whole characters",
      "Mend the row's encoding, or drop it.",
    ) from error


def refuse_control_tokens(
  conversation: Conversation, template: ChatTemplate, options: RenderOptions
) -> bool:
  """Raises a RowError where a text holds a control token it must not hold.

  Returns:
    Whether a turn says the text of a control token that is to be escaped.
  """
  if options.control_tokens == "allow":
    return False
  escapes = False

  def look(text: str, where: str, escapable: bool = False) -> None:
    nonlocal escapes
    if found := template.control.search(text):
      if escapable and options.control_tokens == "escape":
        escapes = True
        return
      raise RowError(
        where,
        f"the control token {found[0]!r} in the text",
        "text without control tokens",
        "Remove it: the model would read it as structure."
        if options.control_tokens == "escape"
        else "Remove it, for the model would read it as structure, or set "
        "data.control_tokens to escape.",
      )

  for index, message in enumerate(conversation.messages):
    where = conversation.where(index)
    look(f"{message.content}\n{message.reasoning or ''}", where, True)
    if message.name or message.tool_call_id:
      look(f"{message.name or ''}\n{message.tool_call_id or ''}", where)
    for call in message.tool_calls:
      # What is marked can be escaped: names and texts, but not keys.
      keys = template_messages.leaves(call.arguments, lambda part, text: "")
      look(f"{call.id or ''}\n{jinja.tojson(keys)}", where)
      look(jinja.tojson([call.name, call.arguments]), where, True)
  place = conversation.source or "row"
  if conversation.tools:
    look(jinja.tojson(conversation.tools), f"{place} tools")
  if conversation.text is not None:
    look(conversation.text, f"{place} text", True)
  return escapes
