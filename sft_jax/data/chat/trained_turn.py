"""One trained turn: where it starts after its prompt, and where it stops."""

from typing import Any

from sft_jax.data.chat import template_probes, thinking
from sft_jax.data.chat.marks import Piece
from sft_jax.data.chat.renderer import Script
from sft_jax.data.conversation import RowError

# A turn that might come next, by whether a tool is called.
_NEXT = {"role": "user", "content": "Go on."}
_REPLIES = ("answer", "reasoning", "tool_call")


class Turn:
  """A rendering that ends with a trained turn.

  Attributes:
    index: of its message.
    text: what inference sees, then the reply, then what the template adds.
    start: where the reply starts: the end of the prompt.
    stop, end: start and end of its stop token.

  The reply is what the rendering of the turns so far adds to the prompt. Two
  detours, where marks make them certain:

  - The template rewrites earlier turns once there is a reply. Then the reply
    is cut out behind the generation prompt and set after what inference sees.
  - The template ends a turn by opening the next (GLM: <|user|>). Then the
    stop token is that of a rendering in which a turn follows.

  Thinking that the template leaves out and the options ask for is put in first
  (`thinking.fill`).

  Raises:
    RowError: a reply whose start or end is not certain.
  """

  def __init__(self, script: Script, index: int):
    self.index = index
    self._script = script
    self._pieces: list[Piece] | None = None
    self._located = False
    prompt, full = script.prompt(index), script.turns(index + 1)
    if not prompt:
      raise RowError(
        self.where,
        "an assistant turn that nothing comes before, not even a prompt",
        "something to answer",
        "Put a turn before it, or give it the weight 0.",
      )
    self.text, self.start = full, len(prompt)
    self._full = full
    if script.thoughts[index]:
      self._think(prompt, script.thoughts[index])
    elif not full.startswith(prompt):
      self._transplant(prompt)
    self._find_stop()

  @property
  def where(self) -> str:
    return self._script.conversation.where(self.index)

  @property
  def pieces(self) -> list[Piece] | None:
    """What the turns say in `text`; None where that is not certain."""
    if not self._located:
      self._pieces = self._script.pieces(self.index + 1, self._full)
      self._located = True
    return self._pieces

  def _think(self, prompt: str, thought: str) -> None:
    """Puts the thinking into a rendering without it."""
    filled = thinking.fill(prompt, self._full, thought)
    pieces = self.pieces
    if filled is None or pieces is None:
      raise RowError(
        self.where,
        "a turn whose thinking cannot be put before its answer: "
        + divergence(prompt, self._full),
        "a generation prompt that thinking can follow",
        "Set data.template_kwargs (such as enable_thinking), or data.reasoning "
        "to strip.",
      )
    self.text = filled.text
    before = [piece for piece in pieces if piece.end <= filled.start]
    self._pieces = [
      *before,
      Piece(filled.start, filled.end, "reasoning", thought),
      *(
        piece._replace(
          start=piece.start + filled.moved, end=piece.end + filled.moved
        )
        for piece in pieces[len(before) :]
      ),
    ]

  def _transplant(self, prompt: str) -> None:
    """Sets the reply of a rewritten conversation after its prompt."""
    script, full = self._script, self._full
    refusal = RowError(
      self.where,
      "a turn that does not go on from its generation prompt: "
      + divergence(prompt, full),
      "a template whose assistant turn begins with its generation prompt",
      "Inference would see other text than training: set data.template_kwargs "
      "(such as enable_thinking), or data.generation_prompt to omit, or mend "
      "the template."
      + (
        " Or set data.reasoning to write, if it opens the thinking."
        if script.conversation.messages[self.index].reasoning
        else ""
      ),
    )
    before = script.prompt_pieces(self.index, prompt)
    pieces = self.pieces
    if script.options.history == "keep" or not before or not pieces:
      raise refusal
    first = len(pieces)
    while first and pieces[first - 1].part in _REPLIES:
      first -= 1
    if first in (0, len(pieces)):
      raise refusal
    earlier, gap_start = pieces[first - 1], pieces[first - 1].end
    gap = full[gap_start : pieces[first].start]
    # What follows the last text of the prompt, or at least its very end.
    tail = prompt[before[-1].end :]
    if (before[-1].part, before[-1].said) != (earlier.part, earlier.said):
      raise refusal
    if not (tail.strip() and gap.startswith(tail)):
      history = script.turns(self.index)
      tail = prompt.removeprefix(history)
      if tail == prompt or not tail.strip() or gap.count(tail) != 1:
        raise refusal
    start = gap_start + gap.index(tail) + len(tail)
    moved = len(prompt) - start
    self.text = prompt + full[start:]
    self._pieces = [
      *before,
      *(
        piece._replace(start=piece.start + moved, end=piece.end + moved)
        for piece in pieces[first:]
      ),
    ]

  def _find_stop(self) -> None:
    """The first stop token of the reply: there generation would stop."""
    found = self._stops(self.start)
    if found is None:
      found = self._stop_of_next_turn()
    self.stop, self.end = found
    token = self.text[self.stop : self.end]
    rest = self._script.template.stop.sub("", self.text[self.end :]).strip()
    if rest and (
      self.pieces is None or any(p.end > self.stop for p in self.pieces)
    ):
      raise RowError(
        self.where,
        f"{rest[:40]!r} after the stop token {token!r}",
        "a reply that ends at its first stop token",
        "Generation would stop there: correct eos_token_id or the template.",
      )

  def _stops(self, start: int) -> tuple[int, int] | None:
    said = (self.pieces or ()) if self._script.escapes else ()
    for stop in self._script.template.stop.finditer(self.text, start):
      if not any(p.start < stop.end() and stop.start() < p.end for p in said):
        return stop.span()
    return None

  def _stop_of_next_turn(self) -> tuple[int, int]:
    """Where the template writes the stop token only as the next turn opens."""
    script, template = self._script, self._script.template
    near = template.control.findall(self.text, self.start)
    refusal = RowError(
      self.where,
      f"a reply without a stop token, ending in {self.text[-40:]!r}",
      f"one of {list(template.stop_tokens)}",
      "Add the id of the token that ends a turn"
      + (f" ({near[-1]!r}?)" if near else "")
      + " to eos_token_id in the model folder's generation_config.json.",
    )
    own = [piece for piece in self.pieces or () if piece.start >= self.start]
    if not own:
      raise refusal
    try:
      then = [self._next()]
      text = script.turns(self.index + 1, then)
      after = script.pieces(self.index + 1, text, then)
    except RowError:
      raise refusal from None
    same = [
      piece
      for piece in after or ()
      if (piece.part, piece.said) == (own[-1].part, own[-1].said)
    ]
    if not same:
      raise refusal
    rest = self.text[own[-1].end :]
    for suffix in (rest, rest.rstrip()):
      if text.startswith(suffix, same[-1].end):
        at = same[-1].end + len(suffix)
        if stop := template.stop.match(text, at):
          begin = own[-1].end + len(suffix)
          self.text = self.text[:begin] + stop[0]
          return begin, begin + len(stop[0])
    raise refusal

  def _next(self) -> dict[str, Any]:
    calls = self._script.conversation.messages[self.index].tool_calls
    if not calls:
      return _NEXT
    return {
      "role": "tool",
      "content": "Done.",
      "name": calls[0].name,
      **({} if calls[0].id is None else {"tool_call_id": calls[0].id}),
    }


def divergence(one: str, other: str) -> str:
  """Both texts around the first character in which they differ."""
  at = template_probes.shared(one, other)
  start = max(0, at - 20)
  return f"{one[start : at + 30]!r} against {other[start : at + 30]!r}"
