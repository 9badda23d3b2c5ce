"""Replies: conversations in, the model's next turns out, as Messages."""

import bisect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from sft_jax.common.trees import Tree
from sft_jax.data.chat.options import DEFAULT, RenderOptions
from sft_jax.data.conversation import Conversation, Message, ToolCall
from sft_jax.data.encoding import encode
from sft_jax.data.store.store import Store
from sft_jax.data.tokenizers.tokenizer import Tokenizer
from sft_jax.inference import sampler

_OPEN, _CLOSE = "<think>", "</think>"
_TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class Reply(NamedTuple):
  """One sampled turn.

  Attributes:
    text: the content, without reasoning and tool calls.
    tokens: all that was emitted, without the stop token.
    stopped: whether the model stopped by itself.
    message: the parsed turn, ready to append to the conversation.
  """

  text: str
  tokens: list[int]
  stopped: bool
  message: Message


class Piece(NamedTuple):
  """What has come of a reply since the last piece of it."""

  index: int  # Of its conversation.
  # All it says so far, markers of thinking and tool calls included; until it is
  # done without a character of which bytes are missing, and without what may
  # become a stop string.
  text: str
  reply: Reply | None  # The whole, once it is done; else None.


def generate(
  model: Any,
  params: Any,
  tokenizer: Tokenizer,
  conversations: Sequence[Conversation],
  *,
  max_new_tokens: int,
  progress: Callable[[int], None] = lambda done: None,
  **choices: Any,
) -> list[Reply]:
  """Answers each conversation, in order; the arguments are those of `stream`.

  `progress` is called with how many replies are done, as they grow.

  Raises:
    RowError: a conversation that cannot be a prompt.
    ValueError: no chat template; an argument out of range; more tokens than the
      model has positions.
  """
  choices["max_new_tokens"] = max_new_tokens
  pieces = stream(model, params, tokenizer, conversations, **choices)
  done: dict[int, Reply] = {}
  for piece in pieces:
    if piece.reply:
      done[piece.index] = piece.reply
    progress(len(done))
  return [done[i] for i in sorted(done)]


def stream(
  model: Any,
  params: Any,
  tokenizer: Tokenizer,
  conversations: Sequence[Conversation],
  *,
  max_new_tokens: int,
  stop_strings: Sequence[str] = (),
  options: RenderOptions = DEFAULT,
  batch_size: int = 64,
  every: int = 64,
  **choices: Any,
) -> Iterator[Piece]:
  """Answers conversations together; yields each reply as it grows.

  Args:
    model: `models.transformer.Model`, or anything with its `config`, `decode`,
      `logits` and `init_cache`.
    tokenizer: its chat template renders the prompts, its `stop_ids` end them.
    conversations: each ends in a turn to be answered, or is a raw text to be
      continued.
    max_new_tokens: most tokens of a reply, its stop token included.
    stop_strings: a reply ends where the first of them begins in its text, and
      counts as stopped; `tokens` are those up to the one that completed it.
    options: as in training.
    batch_size: most conversations at once.
    every: tokens of a reply before it is yielded; at most 64.
    **choices: those of `sampler.stream`, such as temperature (0, greedy).
  """
  prompts = [
    encode.prompt_ids(one, tokenizer, options) for one in conversations
  ]
  decode = lambda tokens: tokenizer.decode(tokens, skip_special=False)

  def cut(index: int, tokens: list[int]) -> int | None:
    """How many tokens complete a stop string, if any do."""
    del index
    found = lambda n: _stop_at(decode(tokens[:n]), stop_strings) is not None
    if not found(len(tokens)):
      return None
    # Texts only grow, so the first that has one is found by halving.
    return bisect.bisect_left(range(len(tokens)), True, key=found)

  pieces = sample(
    model, params, tokenizer, prompts,
    max_new_tokens=max_new_tokens, cut=cut if stop_strings else None,
    batch_size=min(batch_size, max(len(prompts), 1)), every=every, **choices,
  )  # fmt: skip
  so_far: dict[int, list[int]] = {}
  for index, new, sampled in pieces:
    tokens = so_far.setdefault(index, [])
    tokens += new
    # Special tokens are kept: thinking and tool calls may be marked by them,
    # and one that the model had no business to emit must show.
    text = decode(tokens)
    text = text[: _stop_at(text, stop_strings)]
    if sampled is None:
      yield Piece(index, _certain(text, stop_strings), None)
      continue
    end = decode(prompts[index][-8:])
    message = parse(text, thinking=end.rstrip().endswith(_OPEN))
    reply = Reply(message.content, *sampled, message)
    yield Piece(index, text, reply)


def sample(
  model: Any,
  params: Any,
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[int]],
  **choices: Any,
) -> Iterator[sampler.Piece]:
  """`sampler.stream` of a model and its tokenizer."""
  functions = (model.decode, model.logits, model.init_cache)
  return sampler.stream(
    *functions,
    params,
    prompts,
    stop_ids=tokenizer.stop_ids,
    vocab_size=tokenizer.vocab_size,
    position_limit=model.config.position_limit,
    **choices,
  )


def _stop_at(text: str, strings: Sequence[str]) -> int | None:
  places = [text.find(one) for one in strings if one in text]
  return min(places, default=None)


def _certain(text: str, strings: Sequence[str]) -> str:
  """The text without an end that the next tokens may change or take back."""
  text = text.rstrip("\ufffd")
  longest = max(map(len, strings), default=1) - 1
  for n in range(min(longest, len(text)), 0, -1):
    if any(one.startswith(text[-n:]) for one in strings):
      return text[:-n]
  return text


def parse(text: str, *, thinking: bool = False) -> Message:
  """The assistant turn that an emitted text stands for.

      '<think>\\nTwo twos.\\n</think>\\n\\n4'
        -> content '4', reasoning 'Two twos.'
      'Let me see.<tool_call>{"name": "f", "arguments": {}}</tool_call>'
        -> content 'Let me see.', tool_calls (ToolCall('f', {}),)

  Thinking that never ends is all reasoning. If any tool call is malformed, all
  stay in the content: half of what the model meant to call is not what it
  meant.

  `thinking`: the prompt has opened the thinking already.
  """
  reasoning = None
  if thinking or text.lstrip().startswith(_OPEN):
    start = text if thinking else text.lstrip().removeprefix(_OPEN)
    reasoning, _, text = start.partition(_CLOSE)
    reasoning = reasoning.strip("\n")
  calls = [_tool_call(body) for body in _TOOL_CALL.findall(text)]
  good = tuple(call for call in calls if call)
  if len(good) < len(calls):
    good = ()
  text = _TOOL_CALL.sub("", text) if good else text
  return Message("assistant", text.strip(), reasoning, good)


def _tool_call(body: str) -> ToolCall | None:
  """`{"name": text, "arguments": object}`; None for anything else."""
  try:
    call = json.loads(body)
  # A model may nest brackets deeper than the parser's stack.
  except (ValueError, RecursionError):
    return None
  call = call if isinstance(call, dict) else {}
  name, arguments = call.get("name"), call.get("arguments")
  if isinstance(name, str) and isinstance(arguments, dict):
    return ToolCall(name, arguments)
  return None


def answer_rows(
  model: Any,
  params: Tree,
  tokenizer: Tokenizer,
  store: Store,
  *,
  number: int,
  max_new_tokens: int,
  mesh: Mesh | None = None,
) -> list[dict[str, Any]]:
  """Greedy replies to the first prompts of a store, at most `number`.

  A prompt is what stands before the first trained token; raw text has none and
  is passed over, and so is what leaves the model no position to answer in.

  Returns {'where', 'prompt', 'row', 'reply', 'stopped'} of each: the text of
  the prompt, of the row's own reply and of the model's, special tokens shown.
  """
  decode = lambda ids: tokenizer.decode(list(ids), skip_special=False)
  limit = model.config.position_limit
  prompts, found = [], []
  for i in range(len(store.index)):
    if len(found) == number:
      break
    example = store.example(i)
    weights = example.loss_weights
    first = int(np.argmax(weights > 0))
    if first <= 1 or (limit and first + max_new_tokens > limit):
      continue
    after = np.flatnonzero(weights[first:] == 0)
    end = first + int(after[0]) if len(after) else len(weights)
    tokens = example.tokens.tolist()
    prompts.append(tokens[:first])
    row = {"where": store.place(i), "prompt": decode(tokens[:first])}
    found.append(row | {"row": decode(tokens[first:end])})
  choices = {"max_new_tokens": max_new_tokens, "mesh": mesh}
  for piece in sample(model, params, tokenizer, prompts, **choices):
    if reply := piece.reply:
      said = {"reply": decode(reply.tokens), "stopped": reply.stopped}
      found[piece.index] |= said
  return found
