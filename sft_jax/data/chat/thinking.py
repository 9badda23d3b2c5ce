"""Thinking that a template leaves out of a reply, written where it belongs.

Some templates (DeepSeek's R1 and V3, Nemotron) cut the think block out of every
turn, the last included, since they were written for inference alone: there
the model writes the block itself. So what it must emit is known all the same.
"""

import re
from typing import NamedTuple

_OPENED = re.compile(r"<think>\s*\Z")
_EMPTY = re.compile(r"<think>(\s*)</think>\s*")


class Filled(NamedTuple):
  """A rendering with the thinking in it.

  Attributes:
    text: the rendering.
    start, end: the thinking, its tags not included.
    moved: how far what comes after the block has moved.
  """

  text: str
  start: int
  end: int
  moved: int


def fill(prompt: str, full: str, thought: str) -> Filled | None:
  """A turn's rendering without thinking, with its thinking.

      prompt   <|User|>2 + 2?<|Assistant|><think>⏎
      full     <|User|>2 + 2?<|Assistant|>4<|end|>
      text     <|User|>2 + 2?<|Assistant|><think>⏎Twos.⏎</think>⏎⏎4<|end|>

  The block begins as the prompt opens it. Where the rendering has an empty
  block, that one is filled.

  Args:
    prompt: what inference sees.
    full: the turns up to and including this one, without its thinking.
    thought: the thinking, without white space around it.

  Returns:
    None where `full` does not go on from the prompt, or the prompt has closed
    the thinking already.
  """
  opened = _OPENED.search(prompt)
  at = opened.start() if opened else len(prompt)
  if not full.startswith(prompt[:at]):
    return None
  empty = _EMPTY.match(full, at)
  if not opened and not empty and prompt.rstrip().endswith("</think>"):
    return None
  if opened:
    opening = opened[0]
  else:
    opening = "<think>" if empty and not empty[1] else "<think>\n"
  line = "\n" if opening.endswith("\n") else ""
  closing, until = f"{line}</think>{line}{line}", at
  if empty:
    closing = line + full[empty.end(1) : empty.end()]
    until = empty.end()
  block = opening + thought + closing
  start = at + len(opening)
  return Filled(
    full[:at] + block + full[until:],
    start,
    start + len(thought),
    len(block) - (until - at),
  )
