"""Rows to Examples: rendered conversations, raw text and given ids."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from sft_jax.data.chat import loss_spans, renderer
from sft_jax.data.chat.options import DEFAULT, RenderOptions
from sft_jax.data.chat.template import chat_template, with_tokens
from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.conversation import (
  Conversation,
  NothingToTrain,
  RowError,
  merged,
  with_short_ids,
)
from sft_jax.data.encoding import boundaries, fast_path
from sft_jax.data.encoding.boundaries import TokenizedRow, Tokens
from sft_jax.data.tokenizers.tokenizer import Tokenizer

# In the source of Mistral's templates: how long an id of a call must be.
_SHORT_IDS = "length != 9"


@dataclasses.dataclass(frozen=True)
class Example:
  """One document to train on.

  Attributes:
    loss_weights: of *predicting* tokens[i] from those before it; first 0.
    roles: of each token, an index of `TOKEN_ROLES`; 'template' is what no
      message holds, or what is not certain.
    rejected: so many at the end are a document of their own, the worse answer
      after its prompt (options.pairs); all of them, if the answer is bad.
  """

  tokens: Int32[np.ndarray, " n"]
  loss_weights: Float32[np.ndarray, " n"]
  roles: UInt8[np.ndarray, " n"]
  rejected: int = 0


class EncodedRow(NamedTuple):
  """What became of one row: Examples, and counts of those dropped, by reason.

  `notes` of the ledger, 1 each, are 'injected system prompt', 'empty think
  block', 'text changed by the template', 'split history', 'cut answer',
  'escaped control token', 'merged turns'.
  """

  examples: list[Example]
  dropped: dict[str, int]
  notes: dict[str, int]


def encode(
  conversation: Conversation,
  tokenizer: Tokenizer,
  *,
  max_length: int,
  **options: Any,
) -> list[Example]:
  """The Examples of a conversation; see `encode_row`.

  `options` are fields of `options.RenderOptions`, such as history='split'.

  Raises NothingToTrain: none is left; its reason is the ledger's key.
  """
  how = RenderOptions(**options)
  row = encode_row(conversation, tokenizer, how, max_length=max_length)
  if not row.examples:
    raise NothingToTrain(next(iter(row.dropped)), conversation.source)
  return row.examples


def encode_rows(
  conversations: Sequence[Conversation],
  tokenizer: Tokenizer,
  options: RenderOptions,
  *,
  max_length: int,
) -> Iterator[EncodedRow | RowError | NothingToTrain]:
  """What `encode_row` returns or raises for each conversation, in order.

  Rows of one form (the same roles, and only texts in them) take the fast
  path, which gives the same; all others take the full path, one by one. With
  options.pairs a row's Example holds both of its sides, see `Example.rejected`.
  """
  if options.pairs:
    yield from _encode_pairs(conversations, tokenizer, options, max_length)
    return
  rows = [merged(one, options.merge) for one in conversations]
  ready = fast_path.tokenize_rows(rows, tokenizer, options)
  for conversation, row in zip(conversations, ready, strict=True):
    try:
      yield encode_row(
        conversation, tokenizer, options, max_length=max_length, tokenized=row
      )
    except (RowError, NothingToTrain) as error:
      yield error


def _encode_pairs(
  conversations: Sequence[Conversation],
  tokenizer: Tokenizer,
  options: RenderOptions,
  max_length: int,
) -> Iterator[EncodedRow | RowError | NothingToTrain]:
  """Both sides of each row by themselves, then as one Example."""
  apart = dataclasses.replace(options, pairs="")
  if options.pairs == "shown":
    conversations = [_with_answer_shown(one) for one in conversations]
  sides = [
    dataclasses.replace(one, messages=turns, rejected=(), desirable=True)
    for one in conversations
    for turns in (
      (one.messages, one.rejected) if one.rejected else [one.messages]
    )
  ]
  encoded = encode_rows(sides, tokenizer, apart, max_length=max_length)
  for one in conversations:
    found = [next(encoded) for _ in range(1 + bool(one.rejected))]
    try:
      yield _joined(one, found, options, max_length)
    except (RowError, NothingToTrain) as error:
      yield error


# How a prompt shows its answer to the model that teaches it (arXiv 2601.19897).
_SHOWN = (
  "{prompt}\n\nHere is one good answer:\n{answer}\n\nNow give your own answer."
)


def _with_answer_shown(conversation: Conversation) -> Conversation:
  """Beside the conversation the same after a prompt that holds its answer; ()
  where the last turns are not a user's and a text."""
  turns = conversation.messages
  texts = [one.role for one in turns[-2:]] == ["user", "assistant"]
  if not (texts and turns[-1].content.strip()):
    return dataclasses.replace(conversation, rejected=())
  asked, answer = turns[-2:]
  prompt = _SHOWN.format(prompt=asked.content, answer=answer.content)
  shown = dataclasses.replace(asked, content=prompt)
  return dataclasses.replace(
    conversation, rejected=(*turns[:-2], shown, answer)
  )


def _joined(
  conversation: Conversation,
  sides: Sequence[EncodedRow | RowError | NothingToTrain],
  options: RenderOptions,
  max_length: int,
) -> EncodedRow:
  """The row of a conversation whose sides were encoded."""
  for side in sides:
    if isinstance(side, Exception):
      raise side
  first, *other = [one for one in sides if isinstance(one, EncodedRow)]
  where = conversation.source or "row"
  if conversation.text is not None:
    return first
  if not other:
    if options.pairs != "any":
      lacks = "rejected answer" if options.pairs == "both" else "answer to show"
      raise NothingToTrain(f"no {lacks}", where)
    if conversation.desirable:
      return first
    bad = [
      dataclasses.replace(one, rejected=len(one.tokens))
      for one in first.examples
    ]
    return first._replace(examples=bad)
  dropped = first.dropped | other[0].dropped
  notes = first.notes | other[0].notes
  if not (first.examples and other[0].examples):
    return EncodedRow([], dropped, notes)
  if len(first.examples) + len(other[0].examples) > 2:
    raise RowError(
      where,
      "an answer of several turns that must be encoded apart",
      "one sequence for each side of a pair",
      "Set data.train_on to last_turn.",
    )
  pair = (*first.examples, *other[0].examples)
  if options.pairs == "shown":
    trained = [side.tokens[side.loss_weights != 0].tolist() for side in pair]
    if trained[0] != trained[1]:
      return EncodedRow([], {"answer encoded otherwise if shown": 1}, notes)
  length = sum(len(side.tokens) for side in pair)
  if length > max_length and options.over_long == "error":
    raise RowError(
      where,
      f"a pair of {length} tokens",
      f"at most {max_length}",
      "Raise data.seq_len, or set data.over_long to drop.",
    )
  if length > max_length:
    return EncodedRow([], {"over long": 1}, notes)
  fields = ("tokens", "loss_weights", "roles")
  joined = [np.concatenate([getattr(x, name) for x in pair]) for name in fields]
  both = Example(*joined, rejected=len(pair[1].tokens))
  return EncodedRow([both], dropped, notes)


def encode_row(
  conversation: Conversation,
  tokenizer: Tokenizer,
  options: RenderOptions,
  *,
  max_length: int,
  tokenized: TokenizedRow | None = None,
) -> EncodedRow:
  """Encodes a conversation by Law 1, or a raw text whole.

  The tokens of each trained turn, up to and including its stop token, get the
  turn's weight:

      text    <s> user: Hi \\n assistant: Hello there </s>
      ids      1   9   4    3     7         20   21    2
      weights  0   0   0    0     0          1    1    1

  The ids before a trained turn are those that `prompt_ids` gives inference.
  Where one token would join the prompt's end to the reply's start, the two
  are encoded apart, and a conversation of several such turns becomes one
  Example per trained turn (an error under history='keep').

  Raw text is BOS (where the tokenizer has one), its ids and EOS, all trained,
  in windows of max_length (`_text_windows`), whatever `over_long` says.

  `tokenized` is what the fast path made of it; None takes the full path.

  Raises:
    RowError: see `loss_spans.render_spans`; too long under over_long='error'.
    NothingToTrain: the conversation has no trained turn.
    ValueError: `max_length` below 2; the tokenizer has no chat template.
  """
  if max_length < 2:
    got = f"data.seq_len: got {max_length}"
    raise ValueError(f"{got}; expected at least 2. Correct it.")
  if not conversation.desirable:
    raise NothingToTrain("kto_tag false", conversation.source)
  if conversation.text is not None and options.text == "plain":
    windows, notes = _text_windows(conversation, tokenizer, options, max_length)
    notes = dict.fromkeys(notes, 1)
    return EncodedRow([_example(window) for window in windows], {}, notes)
  apart, conversation = conversation, merged(conversation, options.merge)
  if tokenized is None:
    tokenized = _tokenize(conversation, tokenizer, options)
  notes = {*tokenized.notes, *(["merged turns"] * (conversation is not apart))}
  examples, dropped = [], collections.Counter()
  for one in tokenized.tokens:
    _check_bos(one.ids, tokenizer, conversation)
    long = len(one.ids) > max_length
    if long and options.over_long == "error":
      got = f"{len(one.ids)} tokens"
      cure = "Raise data.seq_len, or set data.over_long to drop or truncate."
      raise RowError(conversation.place, got, f"at most {max_length}", cure)
    if long and options.over_long == "drop":
      dropped["over long"] += 1
      continue
    cut = slice(max_length)
    example = _example(Tokens(one.ids[cut], one.weights[cut], one.roles[cut]))
    if example.loss_weights.any():
      examples.append(example)
      notes |= {"cut answer"} if long else set()
    else:
      dropped["over long" if long else "nothing trained"] += 1
  return EncodedRow(examples, dict(dropped), dict.fromkeys(sorted(notes), 1))


def _tokenize(
  conversation: Conversation, tokenizer: Tokenizer, options: RenderOptions
) -> TokenizedRow:
  """The full path."""
  if conversation.ids:
    return TokenizedRow([_given_ids(conversation, tokenizer)], frozenset())
  template, before = chat_template(tokenizer), conversation
  if _SHORT_IDS in template.source:
    conversation = with_short_ids(conversation)
  if conversation.text is None:
    rendered = loss_spans.render_spans(conversation, template, options)
  else:
    rendered = [loss_spans.rendered_text(conversation, template, options)]
  made, notes = [], set()
  for one in rendered:
    made += boundaries.encode_rendered(one, tokenizer, options, conversation)
    notes |= one.notes
  notes |= {"split history"} if len(made) > 1 else set()
  notes |= {"renamed ids of calls"} if conversation is not before else set()
  escaped = any(text.special_as_text for text in rendered)
  notes |= {"escaped control token"} if escaped else set()
  return TokenizedRow(made, frozenset(notes))


def prompt_ids(
  conversation: Conversation,
  tokenizer: Tokenizer,
  options: RenderOptions = DEFAULT,
) -> list[int]:
  """What inference sees: the turns so far and the generation prompt, as ids.

  A raw text is BOS (where the tokenizer has one) and its ids. An assistant
  turn at the end is continued: its content ends the prompt.

  Raises RowError: see `loss_spans.render_spans`.
  """
  if conversation.text is not None:
    ids, _ = _text_ids(conversation, tokenizer, options)
    bos = _bos(tokenizer)
    return ids if bos == ids[:1] else bos + ids
  if conversation.ids:
    return list(conversation.ids)
  conversation = merged(conversation, options.merge)
  template = chat_template(tokenizer)
  if _SHORT_IDS in template.source:
    conversation = with_short_ids(conversation)
  prompt = loss_spans.prompt(conversation, template, options)
  ids, _ = tokenizer.encode_with_offsets(prompt.text, prompt.special_as_text)
  _check_bos(ids, tokenizer, conversation)
  return ids


def _check_bos(
  ids: list[int], tokenizer: Tokenizer, conversation: Conversation
) -> None:
  bos = tokenizer.bos_id
  if bos is not None and ids[:2] == [bos, bos]:
    got = f"two BOS tokens (id {bos}) at the start"
    cure = "Correct the chat template: it writes BOS twice."
    raise RowError(conversation.place, got, "one", cure)


def _example(tokens: Tokens) -> Example:
  loss_weights = tokens.weights.astype(np.float32)
  # Nothing is before the first token to predict it from.
  loss_weights[0] = 0
  return Example(np.array(tokens.ids, np.int32), loss_weights, tokens.roles)


def _text_windows(
  conversation: Conversation,
  tokenizer: Tokenizer,
  options: RenderOptions,
  max_length: int,
) -> TokenizedRow:
  """A raw text and its EOS, all trained, in windows of `max_length`.

  Each starts with the last token of the one before, so that every token is
  predicted exactly once. With max_length 4:

      <s> a b c
              c d e f
                    f </s>

  Raises RowError: a control token in the text; half of a character.
  """
  text_ids, notes = _text_ids(conversation, tokenizer, options)
  bos = _bos(tokenizer)
  start = text_ids if bos == text_ids[:1] else bos + text_ids
  end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  if text_ids and text_ids[-1] in (*end, *tokenizer.stop_ids):
    start, end = start[:-1], start[-1:]  # The text has its own.
  ids = start + end
  roles = np.full(len(ids), TOKEN_ROLES.index("text"), np.uint8)
  roles[: len(bos)] = TOKEN_ROLES.index("template")
  roles[len(start) :] = TOKEN_ROLES.index("stop")
  weights = np.ones(len(ids), np.float32)
  starts = range(0, len(ids) - 1, max_length - 1)
  cuts = [slice(at, at + max_length) for at in starts]
  windows = [Tokens(ids[cut], weights[cut], roles[cut]) for cut in cuts]
  return TokenizedRow(windows, notes)


def _given_ids(conversation: Conversation, tokenizer: Tokenizer) -> Tokens:
  """A row tokenized elsewhere, as it is.

  Raises RowError: an unknown id, a weight below 0; NothingToTrain: none above.
  """
  ids, size = list(conversation.ids), tokenizer.vocab_size
  strange = next((one for one in ids if not 0 <= one < size), None)
  if strange is not None:
    expected = f"ids from 0 to {size - 1}, those of {tokenizer.folder}"
    cure = "Tokenize the row with this model's tokenizer."
    raise RowError(conversation.place, f"the id {strange}", expected, cure)
  weights = np.array(conversation.id_weights, np.float32)
  if not np.isfinite(weights).all() or (weights < 0).any():
    got, cure = "a weight below 0 or not finite", "Correct the row's weights."
    raise RowError(conversation.place, got, "weights of at least 0", cure)
  if not weights[1:].any():
    raise NothingToTrain("no trained token", conversation.source)
  roles = np.full(len(ids), TOKEN_ROLES.index("text"), np.uint8)
  return Tokens(ids, weights, roles)


def _bos(tokenizer: Tokenizer) -> list[int]:
  return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _text_ids(
  conversation: Conversation, tokenizer: Tokenizer, options: RenderOptions
) -> tuple[list[int], frozenset[str]]:
  """The ids of a raw text, by the options for control tokens, and notes."""
  text = conversation.text or ""
  renderer.refuse_surrogates(text, conversation)
  # Raw text needs no template, only to know what the control tokens are.
  template = with_tokens(tokenizer, tokenizer.chat_template or "")
  if tokenizer.chat_template and options.control_tokens != "allow":
    loss_spans.refuse_rendered(conversation, template, options)
  if not renderer.refuse_control_tokens(conversation, template, options):
    return tokenizer.encode_with_offsets(text)[0], frozenset()
  # At its ends, they are what a text begins and ends with.
  bos = tokenizer.named_tokens.get("bos_token", "")
  start = len(bos) if bos and text.startswith(bos) else 0
  ends = [one for one in template.stop_tokens if text.endswith(one)]
  end = len(text) - max(map(len, ends), default=0)
  notes = {"BOS or stop token written in a text"} if start or ends else set()
  if template.control.search(text[start:end]):
    notes.add("escaped control token")
  ids, _ = tokenizer.encode_with_offsets(text, ((start, end),))
  return ids, frozenset(notes)
