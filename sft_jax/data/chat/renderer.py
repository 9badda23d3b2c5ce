"""A conversation through its chat template: prompts and turns as text."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from sft_jax.data.chat import sandbox, template_messages, template_probes
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.chat.template_messages import RoleSpan, Sentinels
from sft_jax.data.conversation import Conversation, RowError, text_fault


class _Cut(NamedTuple):
  """What is rendered of a conversation: its first `count` turns, and perhaps
  the generation prompt, a turn that follows, and sentinels around texts."""

  count: int
  prompt: bool
  followed: bool = False
  wrapped: bool = False


class ConversationRenderer:
  """Renders the turns of one conversation, as they are and with sentinels.

  With reasoning='strip' the reasoning is left out, and with 'write' where the
  template leaves it out.

  Attributes:
    reasoning: by turn, the reasoning that is to be written into its reply
      (`trained_turn.fill`); '' where there is none.
    escapes: whether some text must be read as ordinary characters.

  Raises RowError: a control token in a text (see
  `RenderOptions.control_tokens`); tools, and a template that reads none.
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
    messages, kwargs = conversation.messages, options.template_kwargs
    self.reasoning = [""] * len(messages)
    # A template that reads it may write other tags.
    if options.reasoning == "write" and not (
      template.reads_reasoning
      or template_probes.shows_reasoning(template, kwargs)
    ):
      self.reasoning = [(one.reasoning or "").strip() for one in messages]
      conversation = _without_reasoning(conversation)
    if conversation.tools and not template.reads_tools:
      number, where = len(conversation.tools), f"{conversation.place} tools"
      got = f"{number} tools and a chat template that reads none"
      cure = "Use a template with tools, or drop them from the row."
      raise RowError(where, got, "one that shows the model its tools", cure)
    self.conversation = conversation
    self.template, self.options = template, options
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
    sentinels, form = Sentinels(), self.form
    to_messages = template_messages.to_template_messages
    return sentinels, to_messages(self.conversation, form, sentinels.wrap)

  def plan(self, trained: Sequence[int]) -> None:
    """Announces the trained turns, whose renderings then travel together."""
    self._planned = list(trained)

  def job(self, cuts: Sequence[tuple[Any, ...]]) -> sandbox.Job:
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
    """The text of the first `count` turns and what opens the assistant's; with
    generation_prompt='omit', without what no reply begins after."""
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

  def _text(self, cut: _Cut) -> str:
    if cut not in self._texts:
      self._render(self._with_it(cut))
    if self._texts[cut] is None:
      self._render([cut])
    return self._checked(self._texts[cut], cut.count)

  def _with_it(self, cut: _Cut) -> list[_Cut]:
    """The cuts of all planned turns that will be asked for if this one is,
    since each request has a price."""
    after = not cut.prompt
    if cut.count - after not in self._planned:
      return [cut]
    if cut.wrapped or cut.followed:
      return [cut._replace(count=i + after) for i in self._planned]
    pairs = ((_Cut(i, True), _Cut(i + 1, False)) for i in self._planned)
    last = _Cut(self._planned[-1] + 1, False, wrapped=True)
    return [*itertools.chain.from_iterable(pairs), last]

  def _render(self, cuts: Sequence[_Cut]) -> None:
    jobs = []
    parts = [[x for x in cuts if x.wrapped == flag] for flag in (False, True)]
    for some in parts:
      then = [[self._following(x.count)] if x.followed else [] for x in some]
      pairs = zip(some, then, strict=True)
      jobs.append(self.job([(x.count, x.prompt, *more) for x, more in pairs]))
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
    own = {} if calls[0].id is None else {"tool_call_id": calls[0].id}
    return {"role": "tool", "content": "Done.", "name": calls[0].name, **own}

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
  without = lambda message: dataclasses.replace(message, reasoning=None)
  messages = tuple(map(without, conversation.messages))
  return dataclasses.replace(conversation, messages=messages)


def _refuse_rendered(
  conversation: Conversation, template: ChatTemplate, options: RenderOptions
) -> None:
  """Raises where a turn ends with what opens the assistant's turns: its row
  was rendered already, and would be twice."""
  opening = template_probes.opening(template, options.template_kwargs).strip()
  for index, message in enumerate(conversation.messages):
    ends = message.content.rstrip().endswith(opening)
    if message.role == "user" and ends and template.control.search(opening):
      raise RowError(
        conversation.where(index),
        f"a rendered prompt, which ends with {opening!r}",
        "what the user says",
        "Give the row as messages; or join prompt and answer in a column "
        "named text, and set data.text to rendered.",
      )


def refuse_surrogates(text: str, conversation: Conversation) -> None:
  """Raises a RowError where a text is no Unicode: half of a character."""
  if fault := text_fault(text):
    raise RowError(conversation.place, *fault)


def refuse_control_tokens(
  conversation: Conversation, template: ChatTemplate, options: RenderOptions
) -> bool:
  """Whether a text holds a control token that is to be escaped; a RowError of
  one that it must not hold."""
  if options.control_tokens == "allow":
    return False
  as_json = functools.partial(json.dumps, ensure_ascii=False)
  escapes, may_escape = False, options.control_tokens == "escape"

  def check(where: str, *texts: str | None, escapable: bool = False) -> None:
    nonlocal escapes
    if not (found := template.control.search("\n".join(filter(None, texts)))):
      return
    if escapable and may_escape:
      escapes = True
      return
    cure = "Remove it, for the model would read it as structure"
    cure += "." if may_escape else ", or set data.control_tokens to escape."
    got = f"the control token {found[0]!r} in the text"
    raise RowError(where, got, "text without control tokens", cure)

  for index, message in enumerate(conversation.messages):
    where = conversation.where(index)
    check(where, message.content, message.reasoning, escapable=True)
    check(where, message.name, message.tool_call_id)
    for call in message.tool_calls:
      # What has a role span can be escaped: names and texts, but not keys.
      keys = template_messages.map_strings(call.arguments, lambda *_: "")
      check(where, call.id, as_json(keys))
      whole = as_json([call.name, call.arguments])
      check(where, whole, escapable=True)
  if conversation.tools:
    check(f"{conversation.place} tools", as_json(conversation.tools))
  check(f"{conversation.place} text", conversation.text, escapable=True)
  return escapes
