"""Text with trained spans: what inference will see, and must emit (Law 1)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from sft_jax.data import conversation as conversation_lib
from sft_jax.data import templates

Conversation = conversation_lib.Conversation
NothingToTrain = conversation_lib.NothingToTrain
RowError = conversation_lib.RowError

HISTORIES = ("auto", "split", "keep")


@dataclasses.dataclass(frozen=True)
class Rendered:
  """Text and what of it is trained.

  Attributes:
    text: the rendering.
    spans: (start, end, weight) in characters, in order: each from the end of
      a generation prompt to the end of the stop token of that turn.
  """

  text: str
  spans: tuple[tuple[int, int, float], ...]


def render_spans(
  conversation: Conversation,
  template: templates.ChatTemplate,
  *,
  history: str = "auto",
  template_kwargs: Mapping[str, Any] | None = None,
) -> list[Rendered]:
  """Renders a conversation for training and marks what is trained (Law 1).

  Trained turn i is rendered twice: `prompt`, the turns before it with the
  generation prompt, as inference sees them; and `full`, the turns up to and
  including it. `full` must go on from `prompt`; the trained span is what it
  adds, up to and including the stop token. With a ChatML template

      [user 'Hi', assistant 'Hello.', user 'Bye', assistant 'Goodbye.']

      <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎
      Hello.<|im_end|>                                          trained
      ⏎<|im_start|>user⏎Bye<|im_end|>⏎<|im_start|>assistant⏎
      Goodbye.<|im_end|>                                        trained
      ⏎

  Turns after the last trained one are left out: they teach nothing.

  Args:
    conversation: at least one assistant turn with a weight above 0.
    template: the model's own.
    history: 'auto' renders the whole once where each trained turn stands in
      it with exactly what inference sees before it, and otherwise once per
      trained turn (templates that drop earlier thinking); 'split' always
      does the latter; 'keep' never, and refuses where that is wrong.
    template_kwargs: see `ChatTemplate.render`.

  Raises:
    RowError: the template refuses the row, leaves out or changes what a turn
      says, or does not go on from its own generation prompt; a message holds
      a control token; a reply has no stop token; 'keep' would be wrong.
    NothingToTrain: no assistant turn, or none with a weight above 0.
  """
  if history not in HISTORIES:
    raise ValueError(
      f"history: got {history!r}; expected one of {', '.join(HISTORIES)}. "
      "Set data.history to one of these."
    )
  turns = [
    index
    for index, message in enumerate(conversation.messages)
    if message.loss_weight > 0
  ]
  if not turns:
    roles = {message.role for message in conversation.messages}
    raise NothingToTrain(
      "no trained turn" if "assistant" in roles else "no assistant turn",
      conversation.source,
    )
  template.refuse_control_tokens(conversation)
  kwargs = dict(template_kwargs or {})
  rendered = [_turn(conversation, template, index, kwargs) for index in turns]
  whole = rendered[-1].text
  if history != "split":
    rewritten = [
      (turn, one)
      for turn, one in zip(turns, rendered, strict=True)
      if not whole.startswith(one.text[: one.spans[0][1]])
    ]
    if not rewritten:
      spans = tuple(one.spans[0] for one in rendered)
      return [Rendered(whole, spans)]
    if history == "keep":
      turn, one = rewritten[0]
      raise RowError(
        conversation.where(turn),
        "a turn that later turns make the template rewrite: "
        + _divergence(one.text, whole),
        "a template that leaves earlier turns as they are (history='keep')",
        "Set data.history to auto or split.",
      )
  return rendered


def _turn(
  conversation: Conversation,
  template: templates.ChatTemplate,
  index: int,
  kwargs: dict[str, Any],
) -> Rendered:
  """The rendering up to turn `index`, with that turn as the one span."""
  where = conversation.where(index)
  message = conversation.messages[index]
  render = functools.partial(
    templates.render_turns, conversation, template, template_kwargs=kwargs
  )
  prompt = render(index, add_generation_prompt=True)
  full = render(index + 1, add_generation_prompt=False)
  if not full.startswith(prompt):
    raise RowError(
      where,
      "a turn that does not go on from its generation prompt: "
      + _divergence(prompt, full),
      "a template whose assistant turn begins with its generation prompt",
      "Inference would see other text than training: set template_kwargs "
      "(such as enable_thinking), or mend the template.",
    )
  reply = full[len(prompt) :]
  said = [message.content, message.reasoning or ""]
  said += [call.name for call in message.tool_calls]
  _refuse_unsaid(said, reply, where)
  for earlier, other in enumerate(conversation.messages[:index]):
    # Templates may rewrite earlier assistant and tool turns (their thinking,
    # their quoting); what was asked must be there.
    if other.role in ("system", "user"):
      _refuse_unsaid([other.content], prompt, conversation.where(earlier))
  end = len(prompt) + template.stop_in(reply, where)
  return Rendered(full, ((len(prompt), end, message.loss_weight),))


def _refuse_unsaid(said: list[str], text: str, where: str) -> None:
  """Raises where the template left out something that a turn says."""
  for part in said:
    if part.strip() not in text:
      raise RowError(
        where,
        f"a template that leaves out or changes {part.strip()[:60]!r}",
        "all that a turn says in the rendered text",
        "Use a template that renders it, or drop it from the row.",
      )


def _divergence(one: str, other: str) -> str:
  """Both texts around the first character in which they differ."""
  pairs = enumerate(zip(one, other, strict=False))
  shorter = min(len(one), len(other))
  at = next((at for at, (a, b) in pairs if a != b), shorter)
  start = max(0, at - 20)
  return f"{one[start : at + 30]!r} against {other[start : at + 30]!r}"
