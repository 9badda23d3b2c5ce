"""One trained turn: where it starts after its prompt, and where it stops."""

import functools
import re
from typing import NamedTuple

from sft_jax.data.chat import template_probes
from sft_jax.data.chat.renderer import ConversationRenderer
from sft_jax.data.chat.template_messages import RoleSpan
from sft_jax.data.conversation import RowError

_REPLIES = ("answer", "reasoning", "tool_call")
_OPENED = re.compile(r"<think>\s*\Z")
_EMPTY = re.compile(r"<think>(\s*)</think>\s*")


class TrainedTurn:
  """A rendering that ends with a trained turn.

  Attributes:
    text: what inference sees, then the reply, then what the template adds.
    start: where the reply starts: the end of the prompt.
    stop, end: start and end of its stop token.

  The reply is what the rendering of the turns so far adds to the prompt. Two
  detours, where sentinels make them certain:

  - The template rewrites earlier turns once there is a reply, which is then cut
    out behind the generation prompt and set after what inference sees.
  - The template ends a turn by opening the next (GLM: <|user|>). Then the
    stop token is that of a rendering in which a turn follows.

  Raises RowError: a reply whose start or end is not certain.
  """

  def __init__(self, renderer: ConversationRenderer, index: int):
    self.index, self._renderer = index, renderer
    prompt, full = renderer.prompt(index), renderer.turns(index + 1)
    if not prompt:
      got = "an assistant turn that nothing comes before, not even a prompt"
      cure = "Put a turn before it, or give it the weight 0."
      raise RowError(self.where, got, "something to answer", cure)
    self.text, self.start = full, len(prompt)
    self._full = full
    if renderer.reasoning[index]:
      self._write_reasoning(prompt, renderer.reasoning[index])
    elif not full.startswith(prompt):
      self._transplant(prompt)
    self._find_stop()

  @property
  def where(self) -> str:
    return self._renderer.conversation.where(self.index)

  @functools.cached_property
  def spans(self) -> list[RoleSpan] | None:
    """The role spans of `text`; None where they are not certain."""
    return self._renderer.spans(self.index + 1, self._full)

  def _write_reasoning(self, prompt: str, thought: str) -> None:
    """Puts the reasoning into a rendering without it."""
    filled, spans = fill(prompt, self._full, thought), self.spans
    if filled is None or spans is None:
      raise RowError(
        self.where,
        "a turn whose reasoning cannot be put before its answer: "
        + divergence(prompt, self._full),
        "a generation prompt that reasoning can follow",
        "Set data.template_kwargs (such as enable_thinking), or data.reasoning "
        "to strip.",
      )
    self.text = filled.text
    before = [span for span in spans if span.end <= filled.start]
    own = RoleSpan(filled.start, filled.end, "reasoning", thought)
    after = [span.moved(filled.moved) for span in spans[len(before) :]]
    self.spans = [*before, own, *after]

  def _transplant(self, prompt: str) -> None:
    """Sets the reply of a rewritten conversation after its prompt."""
    renderer, full = self._renderer, self._full
    cure = (
      "Inference would see other text than training: set data.template_kwargs "
      "(such as enable_thinking), or data.generation_prompt to omit, or "
      "correct the template."
    )
    if renderer.conversation.messages[self.index].reasoning:
      cure += " Or set data.reasoning to write, if it opens the reasoning."
    refusal = RowError(
      self.where,
      "a turn that does not begin with its generation prompt: "
      + divergence(prompt, full),
      "a template whose assistant turn begins with its generation prompt",
      cure,
    )
    before = renderer.prompt_spans(self.index, prompt)
    spans = self.spans
    if renderer.options.history == "keep" or not before or not spans:
      raise refusal
    first = len(spans)
    while first and spans[first - 1].role in _REPLIES:
      first -= 1
    if first in (0, len(spans)):
      raise refusal
    earlier, gap_start = spans[first - 1], spans[first - 1].end
    gap = full[gap_start : spans[first].start]
    # What follows the last text of the prompt, or at least its very end.
    tail = prompt[before[-1].end :]
    if before[-1][2:] != earlier[2:]:  # Another role or text.
      raise refusal
    if not (tail.strip() and gap.startswith(tail)):
      history = renderer.turns(self.index)
      tail = prompt.removeprefix(history)
      if tail == prompt or not tail.strip() or gap.count(tail) != 1:
        raise refusal
    start = gap_start + gap.index(tail) + len(tail)
    moved = len(prompt) - start
    self.text = prompt + full[start:]
    self.spans = [*before, *(span.moved(moved) for span in spans[first:])]

  def _find_stop(self) -> None:
    """The first stop token of the reply: there generation would stop."""
    escaped = (self.spans or ()) if self._renderer.escapes else ()
    found = (
      stop.span()
      for stop in self._renderer.template.stop.finditer(self.text, self.start)
      if not any(p.start < stop.end() and stop.start() < p.end for p in escaped)
    )
    self.stop, self.end = next(found, None) or self._stop_of_next_turn()
    token = self.text[self.stop : self.end]
    rest = self._renderer.template.stop.sub("", self.text[self.end :]).strip()
    spans = self.spans if rest else []
    if spans is None or any(span.end > self.stop for span in spans):
      raise RowError(
        self.where,
        f"{rest[:40]!r} after the stop token {token!r}",
        "a reply that ends at its first stop token",
        "Generation would stop there: correct eos_token_id or the template.",
      )

  def _stop_of_next_turn(self) -> tuple[int, int]:
    """Where the template writes the stop token only as the next turn opens."""
    renderer, template = self._renderer, self._renderer.template
    near = template.control.findall(self.text, self.start)
    refusal = RowError(
      self.where,
      f"a reply without a stop token, ending in {self.text[-40:]!r}",
      f"one of {list(template.stop_tokens)}",
      "Add the id of the token that ends a turn"
      + (f" ({near[-1]!r}?)" if near else "")
      + " to eos_token_id in the model folder's generation_config.json.",
    )
    own = [span for span in self.spans or () if span.start >= self.start]
    if not own:
      raise refusal
    try:
      text = renderer.turns(self.index + 1, True)
      after = renderer.spans(self.index + 1, text, True)
    except RowError:
      raise refusal from None
    last = own[-1]
    ends = [span.end for span in after or () if span[2:] == last[2:]]
    rest = self.text[last.end :]
    for suffix in (rest, rest.rstrip()) if ends else ():
      stop = template.stop.match(text, ends[-1] + len(suffix))
      if stop and text.startswith(suffix, ends[-1]):
        begin = last.end + len(suffix)
        self.text = self.text[:begin] + stop[0]
        return begin, begin + len(stop[0])
    raise refusal


def divergence(one: str, other: str) -> str:
  """Both texts around the first character in which they differ."""
  at = template_probes.shared(one, other)
  start = max(0, at - 20)
  return f"{one[start : at + 30]!r} against {other[start : at + 30]!r}"


class Filled(NamedTuple):
  """A rendering with the reasoning in it, at [start, end), its tags outside."""

  text: str
  start: int
  end: int
  moved: int  # How far what comes after the block has moved.


def fill(prompt: str, full: str, thought: str) -> Filled | None:
  """Writes the reasoning into a turn that a template renders without it.

  Some templates (DeepSeek's R1 and V3, Nemotron) cut the think block out of
  every turn, since at inference the model writes it, so it is known:

      prompt   <|User|>2 + 2?<|Assistant|><think>⏎
      full     <|User|>2 + 2?<|Assistant|>4<|end|>
      text     <|User|>2 + 2?<|Assistant|><think>⏎Twos.⏎</think>⏎⏎4<|end|>

  The block begins as the prompt opens it; an empty one is filled. None where
  `full` does not begin with the prompt, or the prompt has closed the reasoning.
  `thought` has no white space around it.
  """
  opened = _OPENED.search(prompt)
  at = opened.start() if opened else len(prompt)
  if not full.startswith(prompt[:at]):
    return None
  empty = _EMPTY.match(full, at)
  if not opened and not empty and prompt.rstrip().endswith("</think>"):
    return None
  opening = "<think>" if empty and not empty[1] else "<think>\n"
  opening = opened[0] if opened else opening
  line = "\n" if opening.endswith("\n") else ""
  closing, until = f"{line}</think>{line}{line}", at
  if empty:
    closing, until = line + full[empty.end(1) : empty.end()], empty.end()
  block, start = opening + thought + closing, at + len(opening)
  text, moved = full[:at] + block + full[until:], len(block) - (until - at)
  return Filled(text, start, start + len(thought), moved)
