"""A conversation through its chat template: prompts and turns as text."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from sft_jax.data.chat import sandbox, template_messages, template_probes
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.chat.template_messages import RoleSpan, Sentinels
from sft_jax.data.conversation import Conversation, RowError


class _Cut(NamedTuple):
  """What is rendered of a conversation: its first `count` turns, and perhaps
  the generation prompt, a turn that follows, and sentinels around texts."""

  count: int
  prompt: bool
  followed: bool = False
  wrapped: bool = False


class ConversationRenderer:
  """Renders the turns of one conversation, as they are and with sentinels.

  Args:
    conversation: with reasoning='strip', its reasoning is left out, and with
      'write' where the template leaves it out.
    template: the model's own.
    options: see `RenderOptions`.

  Attributes:
    reasoning: by turn, the reasoning that is to be written into its reply
      (`trained_turn.fill`); '' where there is none.
    escapes: whether some text must be read as ordinary characters.

  Raises:
    RowError: a control token in a text (see `RenderOptions.control_tokens`);
      tools, and a template that reads none.
  """

  def __init__(
    self,
    conversation: Conversation,
    template: ChatTemplate,
    options: RenderOptions,
  ):
    if options.reasoning == "strip":
      conversation = _without_reasoning(conversation)
    self.escapes = refuse_control_tokens(conversation, template, options)
    if self.escapes:
      _refuse_rendered(conversation, template, options)
    self.reasoning = [""] * len(conversation.messages)
    if (
      options.reasoning == "write"
      and not template.reads_reasoning  # Its tags may be others.
      and not template_probes.shows_reasoning(template, options.template_kwargs)
    ):
      self.reasoning = [
        (message.reasoning or "").strip() for message in conversation.messages
      ]
      conversation = _without_reasoning(conversation)
    if conversation.tools and not template.reads_tools:
      raise RowError(
        f"{conversation.source or 'row'} tools",
        f"{len(conversation.tools)} tools and a chat template that reads none",
        "a template that shows the model its tools",
        "Use a template with tools, or drop them from the row.",
      )
    self.conversation, self.template = conversation, template
    self.options = options
    self._planned: list[int] = []
    self._texts: dict[_Cut, str | Exception | None] = {}

  @functools.cached_property
  def form(self) -> template_messages.Form:
    if any(message.tool_calls for message in self.conversation.messages):
      return template_probes.form(self.template, self.options.template_kwargs)
    return template_messages.Form(reasoning_field=self.template.reads_reasoning)

  @functools.cached_property
  def _messages(self) -> list[dict[str, Any]]:
    return template_messages.to_template_messages(self.conversation, self.form)

  @functools.cached_property
  def _wrapped(self) -> tuple[Sentinels, list[dict[str, Any]]]:
    sentinels = Sentinels()
    made = template_messages.to_template_messages(
      self.conversation, self.form, sentinels.wrap
    )
    return sentinels, made

  def plan(self, trained: Sequence[int]) -> None:
    """Announces the trained turns, whose renderings then travel together."""
    self._planned = list(trained)

  def job(self, cuts: Sequence[tuple[int, bool]]) -> sandbox.Job:
    """The renderings of first turns; see `take`."""
    tools, kwargs = self.conversation.tools, self.options.template_kwargs
    return self.template.job(self._messages, cuts, tools, kwargs)

  def take(
    self,
    cuts: Sequence[tuple[int, bool]],
    texts: Sequence[str | Exception | None],
  ) -> None:
    """Accepts the texts of `job(cuts)`."""
    for cut, text in zip(cuts, texts, strict=True):
      self._texts[_Cut(*cut)] = text

  def turns(self, count: int, followed: bool = False) -> str:
    """The text of the first `count` turns, and of a turn that might follow."""
    return self._text(_Cut(count, False, followed))

  def prompt(self, count: int) -> str:
    """The text of the first `count` turns and what opens the assistant's.

    With generation_prompt='omit', without the end that no reply begins after
    (`template_probes.omitted`).
    """
    return self._without_omitted(self._text(_Cut(count, True)))

  def spans(
    self, count: int, text: str, followed: bool = False
  ) -> list[RoleSpan] | None:
    """The role spans of `turns(count, followed)`, if they are certain."""
    wrapped = self._text(_Cut(count, False, followed, True))
    return self._wrapped[0].find(wrapped, text)

  def prompt_spans(self, count: int, text: str) -> list[RoleSpan] | None:
    """The role spans of `prompt(count)`, if they are certain."""
    wrapped = self._text(_Cut(count, True, wrapped=True))
    return self._wrapped[0].find(self._without_omitted(wrapped), text)

  def _without_omitted(self, prompt: str) -> str:
    if self.options.generation_prompt == "omit":
      kwargs = self.options.template_kwargs
      return prompt.removesuffix(template_probes.omitted(self.template, kwargs))
    return prompt

  def _text(self, cut: "_Cut") -> str:
    if cut not in self._texts:
      self._render(self._with_it(cut))
    if self._texts[cut] is None:
      self._render([cut])
    return self._checked(self._texts[cut], cut.count)

  def _with_it(self, cut: "_Cut") -> list["_Cut"]:
    """The cuts of all planned turns that will be asked for if this one is,
    since each request has a price."""
    if cut.count - (not cut.prompt) not in self._planned:
      return [cut]
    if cut.wrapped or cut.followed:
      return [cut._replace(count=i + (not cut.prompt)) for i in self._planned]
    made = [
      one for i in self._planned for one in (_Cut(i, True), _Cut(i + 1, False))
    ]
    return [*made, _Cut(self._planned[-1] + 1, False, wrapped=True)]

  def _render(self, cuts: Sequence["_Cut"]) -> None:
    parts = [[x for x in cuts if x.wrapped == flag] for flag in (False, True)]
    jobs = [
      self.job(
        [
          (x.count, x.prompt, *([self._following(x.count)] * x.followed))
          for x in some
        ]
      )
      for some in parts
    ]
    if parts[1]:
      jobs[1] = jobs[1]._replace(messages=self._wrapped[1])
    made = sandbox.render(self.template.source, jobs)
    for some, texts in zip(parts, made, strict=True):
      self._texts.update(zip(some, texts, strict=True))

  def _following(self, count: int) -> dict[str, Any]:
    """A turn that might come after the first `count`."""
    calls = self.conversation.messages[count - 1].tool_calls
    if not calls:
      return {"role": "user", "content": "Go on."}
    return {
      "role": "tool",
      "content": "Done.",
      "name": calls[0].name,
      **({} if calls[0].id is None else {"tool_call_id": calls[0].id}),
    }

  def _checked(self, text: str | Exception | None, count: int) -> str:
    """A refusal of the template is a RowError."""
    if isinstance(text, sandbox.TemplateFailed):
      raise RowError(
        self.conversation.where(max(count - 1, 0)),
        f"refused by {self.template.name}: {text}",
        "turns that the template accepts",
        "Change or drop the row, or use another template.",
      ) from text
    if not isinstance(text, str):
      assert text is not None  # `render` gives each cut by itself a result.
      raise text
    refuse_surrogates(text, self.conversation)
    return text


def _without_reasoning(conversation: Conversation) -> Conversation:
  messages = tuple(
    dataclasses.replace(message, reasoning=None)
    for message in conversation.messages
  )
  return dataclasses.replace(conversation, messages=messages)


def _refuse_rendered(
  conversation: Conversation, template: ChatTemplate, options: RenderOptions
) -> None:
  """Raises where a turn ends with what opens the assistant's turns: its row
  was rendered already, and would be twice."""
  opening = template_probes.opening(template, options.template_kwargs).strip()
  for index, message in enumerate(conversation.messages):
    if (
      message.role == "user"
      and template.control.search(opening)
      and message.content.rstrip().endswith(opening)
    ):
      raise RowError(
        conversation.where(index),
        f"a rendered prompt, which ends with {opening!r}",
        "what the user says",
        "Give the row as messages; or join prompt and answer in a column "
        "named text, and set data.text to rendered.",
      )


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
      "Correct the row's encoding, or drop it.",
    ) from error


def refuse_control_tokens(
  conversation: Conversation, template: ChatTemplate, options: RenderOptions
) -> bool:
  """Raises a RowError where a text holds a control token it must not hold.

  Returns:
    Whether a text holds a control token that is to be escaped.
  """
  if options.control_tokens == "allow":
    return False
  escapes = False

  def check(text: str, where: str, escapable: bool = False) -> None:
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
    check(f"{message.content}\n{message.reasoning or ''}", where, True)
    if message.name or message.tool_call_id:
      check(f"{message.name or ''}\n{message.tool_call_id or ''}", where)
    for call in message.tool_calls:
      # What has a role span can be escaped: names and texts, but not keys.
      keys = template_messages.map_strings(
        call.arguments, lambda role, text: ""
      )
      check(f"{call.id or ''}\n{sandbox.tojson(keys)}", where)
      check(sandbox.tojson([call.name, call.arguments]), where, True)
  place = conversation.source or "row"
  if conversation.tools:
    check(sandbox.tojson(conversation.tools), f"{place} tools")
  if conversation.text is not None:
    check(conversation.text, f"{place} text", True)
  return escapes
