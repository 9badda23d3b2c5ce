"""The fast path: rows of one form, tokenized together and by comparison.

Most rows of a file have the same roles, and only texts in them. The first of a
form is rendered by the full path (`loss_spans`), which leaves a render
template, the chat template's own text around what the messages hold:

    <|im_start|>user⏎ [   ] <|im_end|>⏎<|im_start|>assistant⏎ [   ] <|im_end|>⏎

Further rows are rendered as well. Where they are the render template filled in,
to the character, spans and roles are where it says. In ids they are found from
the special tokens, which cut a text: only the few characters from one to where
a text begins are encoded by themselves. In any doubt a row is left to the full
path, whose results it equals (`tests/data/encoding/test_fast_path.py`).
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from sft_jax.data.chat import sandbox, token_roles
from sft_jax.data.chat.loss_spans import Rendered, render_spans
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.chat.renderer import ConversationRenderer
from sft_jax.data.chat.template import ChatTemplate, chat_template
from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.conversation import (
  Conversation,
  Message,
  NothingToTrain,
  RowError,
)
from sft_jax.data.encoding import boundaries
from sft_jax.data.encoding.boundaries import TokenizedRow, Tokens
from sft_jax.data.tokenizers.tokenizer import Tokenizer

# Characters of the template between a special token and a text: a header.
_HEADER = 64


class Position(NamedTuple):
  """A position between characters, in every rendering of a form."""

  texts: int  # How many of the turns' texts are before it.
  static: int  # How many characters of the template are.
  # How many special tokens end at or before it; or -1 - how many end before it,
  # where one starts there.
  special: int
  # The text from the last special token to the position, the token included;
  # None where a turn's text or much of the template is between.
  header: str | None


class RenderTemplate(NamedTuple):
  """What all conversations of a form have in common."""

  # The template's texts before, between and after the contents.
  static: tuple[str, ...]
  trained: tuple[int, ...]  # Indices of the trained turns.
  # (start, end, weight) of each.
  spans: tuple[tuple[Position, Position, float], ...]
  roles: tuple[tuple[Position, Position, str], ...]  # (start, end, token role).
  num_special: int  # Special tokens in it.
  in_ids: bool  # Whether special tokens give all positions.
  notes: frozenset[str]  # See `encode.EncodedRow`.

  @property
  def cuts(self) -> list[tuple[int, bool]]:
    """(count, prompt) of all renderings that are compared."""
    prompts = [(turn, True) for turn in self.trained]
    return prompts + [(turn + 1, False) for turn in self.trained]

  def filled(self, texts: Sequence[str]) -> str:
    """The rendering in which the turns have these texts."""
    pairs = zip(self.static, texts, strict=False)
    return "".join(itertools.chain(*pairs)) + self.static[-1]


def tokenize_rows(
  conversations: Sequence[Conversation],
  tokenizer: Tokenizer,
  options: RenderOptions,
) -> list[TokenizedRow | None]:
  """Tokens of conversations; None for those that take the full path."""
  made: list[TokenizedRow | None] = [None] * len(conversations)
  found: list[tuple[int, _Filled]] = []
  plain = [x for x in enumerate(conversations) if _is_plain(x[1], options)]
  if not plain:  # Then there may be no chat template.
    return made
  template = chat_template(tokenizer)
  known = _known_forms(template, repr(options))
  ready: list[tuple[int, RenderTemplate, ConversationRenderer]] = []
  for number, conversation in plain:
    with contextlib.suppress(RowError, NothingToTrain):
      roles = tuple(message.role for message in conversation.messages)
      if roles not in known:
        known[roles] = _render_template(conversation, template, options)
      if form := known[roles]:
        renderer = ConversationRenderer(conversation, template, options)
        ready.append((number, form, renderer))
  # Renderings of many rows at once, since each request has a price.
  jobs = [renderer.job(form.cuts) for _, form, renderer in ready]
  rendered = sandbox.render(template.source, jobs) if jobs else []
  for (number, form, renderer), texts in zip(ready, rendered, strict=True):
    renderer.take(form.cuts, texts)
    try:
      if (filled := _fill(form, renderer)) is None:
        continue
      if filled.form.in_ids:
        found.append((number, filled))
        continue
      tokens = boundaries.encode_rendered(
        _rendered(filled), tokenizer, options, renderer.conversation
      )
      if len(tokens) == 1:
        made[number] = TokenizedRow(tokens, filled.notes)
    except (RowError, NothingToTrain):
      continue  # The full path raises it in the row's turn.
  encoded = tokenizer.encode_batch([filled.text for _, filled in found])
  for (number, filled), ids in zip(found, encoded, strict=True):
    if tokens := _tokens(ids, filled, tokenizer):
      made[number] = TokenizedRow([tokens], filled.notes)
  return made


class _Filled(NamedTuple):
  form: RenderTemplate  # The render template, known from another conversation.
  text: str  # The rendering.
  texts: list[str]  # Contents of the turns, as rendered.
  before: list[int]  # Characters of contents before each turn, and in all.
  notes: frozenset[str]  # Of the rendering.

  def at(self, position: Position) -> int:
    return position.static + self.before[position.texts]


def _is_plain(conversation: Conversation, options: RenderOptions) -> bool:
  """Whether its turns are texts, and nothing else."""
  messages = conversation.messages
  plain = options.train_on != "all" and messages and not conversation.tools
  return bool(plain) and all(
    one == Message(one.role, one.content)
    and one.content.strip()
    and "<think>" not in one.content
    for one in messages
  )


def _fill(
  form: RenderTemplate, renderer: ConversationRenderer
) -> _Filled | None:
  """The rendering, if it is the render template, filled in."""
  texts = [message.content for message in renderer.conversation.messages]
  stripped = [text.strip() for text in texts]
  last = form.trained[-1]
  text, texts = renderer.turns(last + 1), texts[: last + 1]
  written, notes = texts, form.notes
  if text != form.filled(texts):
    texts = stripped[: last + 1]  # As some templates have it.
    if text != form.filled(texts):
      return None
  before = [0, *itertools.accumulate(map(len, texts))]
  if texts is not written:
    at = 0
    for static, shown, one in zip(form.static, texts, written, strict=False):
      start = at + len(static)
      at = start + len(shown)
      if not token_roles.keeps_white_space(text, start, at, one):
        notes |= {token_roles.WHITE_SPACE_CUT}
  filled = _Filled(form, text, texts, before, notes)
  for turn, (start, end, _) in zip(form.trained, form.spans, strict=True):
    if renderer.prompt(turn) != text[: filled.at(start)]:
      return None
    until = filled.at(end)
    if turn != last and renderer.turns(turn + 1)[:until] != text[:until]:
      return None
  # A text and the template may make up a special token together.
  if len(renderer.template.control.findall(text)) != form.num_special:
    return None
  return filled


def _rendered(filled: _Filled) -> Rendered:
  """What `render_spans` makes of it."""
  roles = []
  for start, end, role in filled.form.roles:
    a, b = filled.at(start), filled.at(end)
    if role != "stop":  # Without the white space around it.
      core = filled.text[a:b].strip()
      a = filled.text.index(core, a)
      b = a + len(core)
    roles.append((a, b, role))
  at, spans = filled.at, filled.form.spans
  made = tuple((at(start), at(end), weight) for start, end, weight in spans)
  return Rendered(filled.text, made, tuple(roles), notes=filled.notes)


def _render_template(
  conversation: Conversation, template: ChatTemplate, options: RenderOptions
) -> RenderTemplate | None:
  """The render template of a conversation, its texts stripped.

  None where it has none: of several renderings, or with a text that is masked,
  escaped, or not where it should be.
  """
  strip = lambda one: dataclasses.replace(one, content=one.content.strip())
  messages = tuple(map(strip, conversation.messages))
  texts = [one.content for one in messages]
  conversation = dataclasses.replace(conversation, messages=messages)
  rendered = render_spans(conversation, template, options)
  if len(rendered) != 1 or rendered[0].special_as_text or rendered[0].masked:
    return None
  (one,) = rendered
  said = [piece for piece in one.role_spans if piece[2] != "stop"]
  texts = texts[: len(said)]
  replies = [i for i, x in enumerate(messages) if x.role == "assistant"]
  trained = replies[-len(one.spans) :]
  shown = [one.text[a:b] for a, b, _ in said]
  if shown != texts or len(said) != trained[-1] + 1:
    return None
  bounds = [0, *itertools.chain(*((a, b) for a, b, _ in said)), len(one.text)]
  special = [match.span() for match in template.control.finditer(one.text)]

  def position(at: int) -> Position:
    texts = sum(start < at for start, _, _ in said)
    static = at - sum(end - start for start, end, _ in said[:texts])
    for number, (start, _) in enumerate(special):
      if start == at:
        return Position(texts, static, -1 - number, "")
    number = sum(end <= at for _, end in special)
    begin, end = special[number - 1] if number else (0, 0)
    near = number and at - end <= _HEADER
    between = any(end < b and a < at for a, b, _ in said)
    header = one.text[begin:at] if near and not between else None
    return Position(texts, static, number, header)

  spans = tuple((position(a), position(b), x) for a, b, x in one.spans)
  roles = tuple((position(a), position(b), x) for a, b, x in one.role_spans)
  positions = itertools.chain(*(two for *two, _ in (*spans, *roles)))
  gaps = zip(bounds[::2], bounds[1::2], strict=True)
  return RenderTemplate(
    static=tuple(one.text[a:b] for a, b in gaps),
    trained=tuple(trained),
    spans=spans,
    roles=roles,
    num_special=len(special),
    in_ids=all(one.header is not None for one in positions),
    notes=one.notes,
  )


@functools.lru_cache(maxsize=8)
def _known_forms(
  template: ChatTemplate, options: str
) -> dict[tuple[str, ...], RenderTemplate | None]:
  """Render templates by the roles of the turns; None where there is none."""
  del template, options
  return {}


def _tokens(
  ids: list[int], filled: _Filled, tokenizer: Tokenizer
) -> Tokens | None:
  """Ids, weights and roles; None where a position is inside a token."""
  form = filled.form
  special = np.flatnonzero(_is_special(tokenizer)[ids]).tolist()
  if len(special) != form.num_special:
    return None

  def index(position: Position, space: str = "") -> int:
    """Of the first id after it and white space; -1 where that is inside."""
    if position.special < 0:
      return special[-1 - position.special]
    first = special[position.special - 1]
    text = (position.header or "") + space
    header = boundaries.tail_ids(tokenizer, text, ())
    last = first + len(header)
    return last if tuple(ids[first:last]) == header else -1

  weights = np.zeros(len(ids), np.float32)
  roles = np.full(len(ids), TOKEN_ROLES.index("template"), np.uint8)
  for start, end, weight in form.spans:
    first, last = index(start), index(end)
    if min(first, last) < 0 or ids[last - 1] not in tokenizer.stop_ids:
      return None
    weights[first:last] = weight
  for start, end, role in form.roles:
    lead = trail = ""
    if role != "stop":  # White space around a text is the template's.
      text = filled.texts[start.texts]
      lead = text[: len(text) - len(text.lstrip())]
      trail = text[len(text.rstrip()) :]
    if lead and start.special < 0:
      return None
    first, last = index(start, lead), index(end)
    if trail:
      space = _space_ids(tokenizer, trail)
      last -= len(space)
      same = tuple(ids[last:][: len(space)]) == space
      if not space or end.special >= 0 or not same:
        return None
    if min(first, last) < 0:
      return None
    roles[first:last] = TOKEN_ROLES.index(role)
  return Tokens(ids, weights, roles)


@functools.lru_cache(maxsize=256)
def _space_ids(tokenizer: Tokenizer, space: str) -> tuple[int, ...]:
  """The ids of white space between two special tokens."""
  first = min(boundaries.special_ids(tokenizer))
  special = tokenizer.decode([first], skip_special=False)
  return tuple(tokenizer.encode(special + space + special)[1:-1])


@functools.lru_cache(maxsize=8)
def _is_special(tokenizer: Tokenizer) -> Bool[np.ndarray, " vocabulary"]:
  table = np.zeros(tokenizer.vocab_size, bool)
  table[list(boundaries.special_ids(tokenizer))] = True
  return table
