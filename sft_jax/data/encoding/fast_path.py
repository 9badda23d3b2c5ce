"""Shapes: conversations alike in form, encoded together and by comparison.

Most conversations of a file are one shape: the same roles, and only texts in
them. The first of a shape is taken apart the careful way (`spans`), which
leaves a skeleton, the template's own text around what is said:

    <|im_start|>user⏎ [   ] <|im_end|>⏎<|im_start|>assistant⏎ [   ] <|im_end|>⏎

For each further one the prompts and turns are rendered as ever. If they are
the skeleton filled in, to the character, then spans and parts are where the
skeleton says. In ids they are found from the special tokens, which cut a
text: what is before one does not change the ids of what is after. So only
the few characters from a special token to where a text begins are encoded by
themselves. In any doubt a conversation is left to the careful way, and what
is made here equals what is made there
(`tests/data/encoding/test_fast_path.py`).
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from sft_jax.data.chat.loss_spans import Rendered
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.chat.renderer import Script
from sft_jax.data.chat.template import ChatTemplate, chat_template
from sft_jax.data.conversation import Conversation, NothingToTrain, RowError
from sft_jax.data.encoding import boundaries
from sft_jax.data.encoding.boundaries import PARTS, Tokens
from sft_jax.data.encoding.encode import Made
from sft_jax.data.encoding.skeletons import Place, Skeleton, take_apart
from sft_jax.data.tokenizers.tokenizer import Tokenizer


def encode_alike(
  conversations: Sequence[Conversation | None],
  tokenizer: Tokenizer,
  options: RenderOptions,
) -> list[Made | None]:
  """Ids, weights and parts of conversations; None where it takes more care."""
  made: list[Made | None] = [None] * len(conversations)
  found: list[tuple[int, _Filled]] = []
  plain = [
    (number, conversation)
    for number, conversation in enumerate(conversations)
    if conversation is not None and _is_plain(conversation, options)
  ]
  if not plain:  # Then there may be no chat template.
    return made
  template = chat_template(tokenizer)
  known = _skeletons(template, repr(options))
  for number, conversation in plain:
    try:
      if (filled := _fill(conversation, template, options, known)) is None:
        continue
      if filled.skeleton.in_ids:
        found.append((number, filled))
        continue
      tokens = boundaries.encode_rendered(
        _rendered(filled), tokenizer, options, conversation
      )
      if len(tokens) == 1:
        made[number] = Made(tokens, filled.skeleton.notes)
    except (RowError, NothingToTrain):
      continue  # The careful way raises it in the row's turn.
  encoded = tokenizer.encode_batch([filled.text for _, filled in found])
  for (number, filled), ids in zip(found, encoded, strict=True):
    if tokens := _tokens(ids, filled, tokenizer):
      made[number] = Made([tokens], filled.skeleton.notes)
  return made


class _Filled(NamedTuple):
  """A skeleton filled in.

  Attributes:
    skeleton: known from another conversation.
    text: the rendering.
    texts: what the turns say, as rendered.
    before: characters that the turns say before each, and in all.
  """

  skeleton: Skeleton
  text: str
  texts: list[str]
  before: list[int]

  def at(self, place: Place) -> int:
    return place.static + self.before[place.texts]


def _is_plain(conversation: Conversation, options: RenderOptions) -> bool:
  """Whether its turns are texts, and nothing else."""
  return (
    options.train_on != "all"
    and not conversation.tools
    and bool(conversation.messages)
    and all(
      message.content.strip()
      and "<think>" not in message.content
      and message.reasoning is None
      and not message.tool_calls
      and message.name is None
      and message.tool_call_id is None
      and message.weight is None
      and message.spans is None
      for message in conversation.messages
    )
  )


def _fill(
  conversation: Conversation,
  template: ChatTemplate,
  options: RenderOptions,
  known: dict[tuple[str, ...], Skeleton | None],
) -> _Filled | None:
  """The rendering, if it is that of a known skeleton."""
  texts = [message.content for message in conversation.messages]
  stripped = [text.strip() for text in texts]
  roles = tuple(message.role for message in conversation.messages)
  if roles not in known:
    known[roles] = take_apart(conversation, stripped, template, options)
  skeleton = known[roles]
  if skeleton is None:
    return None
  script = Script(conversation, template, options)
  last = skeleton.trained[-1]
  text, texts = script.turns(last + 1), texts[: last + 1]
  if text != skeleton.filled(texts):
    texts = stripped[: last + 1]  # As some templates have it.
    if text != skeleton.filled(texts):
      return None
  before = [0, *itertools.accumulate(map(len, texts))]
  filled = _Filled(skeleton, text, texts, before)
  pairs = zip(skeleton.trained, skeleton.spans, strict=True)
  for turn, (start, end, _) in pairs:
    if script.prompt(turn) != text[: filled.at(start)]:
      return None
    if turn != last:
      until = filled.at(end)
      if script.turns(turn + 1)[:until] != text[:until]:
        return None
  # A text and the template may make up a special token together.
  if len(template.control.findall(text)) != skeleton.num_special:
    return None
  return filled


def _rendered(filled: _Filled) -> Rendered:
  """What `spans.render_spans` makes of it."""
  parts = []
  for start, end, part in filled.skeleton.parts:
    a, b = filled.at(start), filled.at(end)
    if part != "stop":  # Without the white space around it.
      core = filled.text[a:b].strip()
      a = filled.text.index(core, a)
      b = a + len(core)
    parts.append((a, b, part))
  spans = tuple(
    (filled.at(start), filled.at(end), weight)
    for start, end, weight in filled.skeleton.spans
  )
  return Rendered(filled.text, spans, tuple(parts), notes=filled.skeleton.notes)


@functools.lru_cache(maxsize=8)
def _skeletons(
  template: ChatTemplate, options: str
) -> dict[tuple[str, ...], Skeleton | None]:
  """The skeletons known, by roles; None where there is none to find."""
  del template, options
  return {}


def _tokens(
  ids: list[int], filled: _Filled, tokenizer: Tokenizer
) -> Tokens | None:
  """The ids with weights and parts; None where a place is inside a token."""
  skeleton = filled.skeleton
  special = np.flatnonzero(_is_special(tokenizer)[ids]).tolist()
  if len(special) != skeleton.num_special:
    return None

  def index(place: Place, space: str = "") -> int:
    """Of the first id after it and white space; -1 where that is inside."""
    if place.special < 0:
      return special[-1 - place.special]
    first = special[place.special - 1]
    header = boundaries.tail_ids(tokenizer, (place.header or "") + space, ())
    last = first + len(header)
    return last if tuple(ids[first:last]) == header else -1

  weights = np.zeros(len(ids), np.float32)
  parts = np.full(len(ids), PARTS.index("template"), np.uint8)
  for start, end, weight in skeleton.spans:
    first, last = index(start), index(end)
    if min(first, last) < 0 or ids[last - 1] not in tokenizer.stop_ids:
      return None
    weights[first:last] = weight
  for start, end, part in skeleton.parts:
    lead = trail = ""
    if part != "stop":  # White space around a text is the template's.
      text = filled.texts[start.texts]
      lead = text[: len(text) - len(text.lstrip())]
      trail = text[len(text.rstrip()) :]
    if lead and start.special < 0:
      return None
    first, last = index(start, lead), index(end)
    if trail:
      space = _space_ids(tokenizer, trail)
      last -= len(space)
      if (
        not space
        or end.special >= 0
        or tuple(ids[last:][: len(space)]) != space
      ):
        return None
    if min(first, last) < 0:
      return None
    parts[first:last] = PARTS.index(part)
  return Tokens(ids, weights, parts)


@functools.lru_cache(maxsize=256)
def _space_ids(tokenizer: Tokenizer, space: str) -> tuple[int, ...]:
  """The ids of white space between two special tokens."""
  special = tokenizer.decode(
    [min(boundaries.special_ids(tokenizer))], skip_special=False
  )
  ids = tokenizer.encode(special + space + special)
  return tuple(ids[1:-1])


@functools.lru_cache(maxsize=8)
def _is_special(tokenizer: Tokenizer) -> Bool[np.ndarray, " vocabulary"]:
  table = np.zeros(tokenizer.vocab_size, bool)
  table[list(boundaries.special_ids(tokenizer))] = True
  return table
