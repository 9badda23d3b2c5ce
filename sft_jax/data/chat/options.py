"""RenderOptions: how a conversation is rendered, and what is trained."""

import dataclasses
from collections.abc import Mapping
from typing import Any

CHOICES = {
  "generation_prompt": ("error", "omit"),
  "history": ("auto", "split", "keep"),
  "train_on": ("assistant", "last_turn", "all"),
  "reasoning": ("train", "write", "hide", "strip"),
  "over_long": ("drop", "truncate", "error"),
  "text": ("plain", "rendered"),
  "control_tokens": ("escape", "error", "allow"),
  "merge": ("", "turns", "system", "all"),
  "pairs": ("", "both", "any", "shown"),
}


@dataclasses.dataclass(frozen=True)
class RenderOptions:
  """How a conversation is rendered, and what of it is trained.

  The same options reach training, evaluation, sampling and chat; where only a
  prompt is rendered, what concerns training has no effect.

  Attributes:
    template_kwargs: variables for the chat template, such as
      {'enable_thinking': False}; 'date' ('2026-01-31') pins today's date.
    generation_prompt: where replies do not continue a template's generation
      prompt (which opens a think block, say): 'error' refuses; 'omit' leaves
      the end that they do not share out of every prompt, at inference too.
    history: 'auto' renders a conversation once where each trained turn stands
      in it with exactly what inference sees before it, and otherwise once per
      trained turn; 'split' always does that; 'keep' never, and refuses where
      that is wrong.
    train_on: 'assistant' trains the assistant's turns; 'last_turn' the last of
      these; 'all' every token of the rendering but its first, as plain text.
    reasoning: 'train' it; 'write' it into trained turns whose template leaves
      it out, and train it; 'hide' it: its think block has weight 0; 'strip' it
      from the rendering, of history too.
    over_long: of Examples longer than max_length: 'drop' them; 'truncate' them
      (a cut answer has no stop token), and drop those with nothing trained
      left; 'error' refuses them.
    text: of rows of raw text: 'plain' trains all, and refuses a conversation
      that was rendered elsewhere; 'rendered' reads it as one by the model's
      template, and trains the assistant's turns.
    control_tokens: where a message holds the text of one: 'escape' reads it as
      ordinary text, and counts the row; 'error' refuses; 'allow' reads it.
    merge: turns that the template refuses apart, see `conversation.merged`.
    pairs: '' encodes the better answer of a preference row; 'both' the two as
      one Example, and drops rows that lack one; 'any' whatever there is, also
      answers marked as not desirable; 'shown' a conversation, and beside it the
      same with the answer shown in the last prompt. Raw text is no pair.
  """

  template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  generation_prompt: str = "error"
  history: str = "auto"
  train_on: str = "assistant"
  reasoning: str = "train"
  over_long: str = "drop"
  text: str = "plain"
  control_tokens: str = "escape"
  merge: str = ""
  pairs: str = ""

  def __post_init__(self):
    for name, allowed in CHOICES.items():
      if (value := getattr(self, name)) not in allowed:
        raise ValueError(
          f"data.{name}: got {value!r}; expected one of "
          f"{', '.join(allowed)}. Set it to one of these."
        )
    if self.train_on == "all" and self.reasoning in ("hide", "write"):
      raise ValueError(
        f"data.reasoning: got {self.reasoning!r} with train_on='all'; expected "
        "'train' or 'strip', since plain text has no turns. Change either."
      )

  def to_json(self) -> dict[str, Any]:
    """A plain dict: part of the key of a cache, and of the run's record."""
    return dataclasses.asdict(self)


DEFAULT = RenderOptions()
