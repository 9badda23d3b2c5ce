"""Skeletons: the template's own text around what a conversation says."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from sft_jax.data.chat import loss_spans as spans
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.conversation import Conversation

# Characters of the template between a special token and a text: a header.
_HEADER = 64


class Place(NamedTuple):
  """A place between the characters of every rendering of a shape.

  Attributes:
    texts: how many of the turns' texts are before it.
    static: how many characters of the template are.
    special: how many special tokens end at or before it; or -1 - how many
      end before it, where one starts there.
    header: the text from the last of these to the place, itself included;
      None where a turn's text or much of the template is between.
  """

  texts: int
  static: int
  special: int
  header: str | None


class Skeleton(NamedTuple):
  """What all conversations of a shape have in common.

  Attributes:
    static: the template's texts before, between and after what is said.
    trained: indices of the trained turns.
    spans: (start, end, weight) of each.
    parts: (start, end, part).
    num_special: special tokens in it.
    in_ids: whether these tell where everything is.
    notes: see `encode.EncodedRow`.
  """

  static: tuple[str, ...]
  trained: tuple[int, ...]
  spans: tuple[tuple[Place, Place, float], ...]
  parts: tuple[tuple[Place, Place, str], ...]
  num_special: int
  in_ids: bool
  notes: frozenset[str]

  def filled(self, texts: Sequence[str]) -> str:
    """The rendering in which the turns say these texts."""
    pairs = zip(self.static, texts, strict=False)
    return "".join(itertools.chain(*pairs)) + self.static[-1]


def take_apart(
  conversation: Conversation,
  texts: list[str],
  template: ChatTemplate,
  options: RenderOptions,
) -> Skeleton | None:
  """The skeleton of a conversation with these texts, which are stripped.

  None where it has none: of several renderings, or with something said that
  is muted, escaped, or not where it should be.
  """
  messages = tuple(
    dataclasses.replace(message, content=text)
    for message, text in zip(conversation.messages, texts, strict=True)
  )
  conversation = dataclasses.replace(conversation, messages=messages)
  rendered = spans.render_spans(conversation, template, options)
  if len(rendered) != 1 or rendered[0].literal or rendered[0].muted:
    return None
  (one,) = rendered
  said = [piece for piece in one.pieces if piece[2] != "stop"]
  texts = texts[: len(said)]
  trained = [
    index
    for index, message in enumerate(conversation.messages)
    if message.role == "assistant"
  ][-len(one.spans) :]
  shown = [one.text[a:b] for a, b, _ in said]
  if shown != texts or len(said) != trained[-1] + 1:
    return None
  bounds = [0, *itertools.chain(*((a, b) for a, b, _ in said)), len(one.text)]
  special = [match.span() for match in template.control.finditer(one.text)]

  def place(at: int) -> Place:
    texts = sum(start < at for start, _, _ in said)
    static = at - sum(end - start for start, end, _ in said[:texts])
    for number, (start, _) in enumerate(special):
      if start == at:
        return Place(texts, static, -1 - number, "")
    number = sum(end <= at for _, end in special)
    begin, end = special[number - 1] if number else (0, 0)
    near = number and at - end <= _HEADER
    between = any(end < b and a < at for a, b, _ in said)
    header = one.text[begin:at] if near and not between else None
    return Place(texts, static, number, header)

  edges = tuple((place(a), place(b), weight) for a, b, weight in one.spans)
  parts = tuple((place(a), place(b), part) for a, b, part in one.pieces)
  places = itertools.chain(*(two for *two, _ in (*edges, *parts)))
  return Skeleton(
    static=tuple(
      one.text[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True)
    ),
    trained=tuple(trained),
    spans=edges,
    parts=parts,
    num_special=len(special),
    in_ids=all(place.header is not None for place in places),
    notes=one.notes,
  )
