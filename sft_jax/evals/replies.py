"""Replies: conversations in, the model's next turns out, as Messages.

The prompt is rendered by the very function that training renders with
(`encode.prompt_ids`), and what the model emits is parsed back into the noun
that training rows are made of.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sft_jax import sampler
from sft_jax.data import encode
from sft_jax.data.conversation import Conversation, Message, ToolCall
from sft_jax.data.tokenizers import Tokenizer

_OPEN, _CLOSE = "<think>", "</think>"
_TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class Reply(NamedTuple):
  """One sampled turn.

  Attributes:
    text: what is said: the content, without thinking and tool calls.
    tokens: all that was emitted, without the stop token.
    stopped: whether the model stopped by itself.
    message: the parsed turn, ready to append to the conversation.
  """

  text: str
  tokens: list[int]
  stopped: bool
  message: Message


def generate(
  model: Any,
  params: Any,
  tokenizer: Tokenizer,
  conversations: Sequence[Conversation],
  *,
  max_new_tokens: int,
  temperature: float | int = 0.0,
  top_k: int = 0,
  top_p: float | int = 1.0,
  seed: int = 0,
  template_kwargs: Mapping[str, Any] | None = None,
  batch_size: int = 64,
) -> list[Reply]:
  """Answers each conversation, in order.

  Args:
    model: `models.transformer.Model`, or anything with its `decode`, `logits`
      and `init_cache`.
    tokenizer: its chat template renders the prompts, its `stop_ids` end them.
    conversations: each ends in a turn to be answered, or is a raw text to be
      continued.
    max_new_tokens: most tokens of a reply, its stop token included.
    temperature, top_k, top_p, seed: see `sampler.generate`; 0 is greedy.
    template_kwargs: as in training, such as enable_thinking.
    batch_size: most conversations at once.

  Raises:
    RowError: a conversation that cannot be a prompt.
    ValueError: no chat template; an argument out of range.
  """
  prompts = [
    encode.prompt_ids(one, tokenizer, template_kwargs=template_kwargs)
    for one in conversations
  ]
  sampled = sampler.generate(
    model.decode,
    model.logits,
    model.init_cache,
    params,
    prompts,
    stop_ids=tokenizer.stop_ids,
    max_new_tokens=max_new_tokens,
    vocab_size=tokenizer.vocab_size,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    seed=seed,
    batch_size=min(batch_size, max(len(prompts), 1)),
  )
  replies = []
  for prompt, (tokens, stopped) in zip(prompts, sampled, strict=True):
    # Special tokens are kept: thinking and tool calls may be marked by them,
    # and one that the model had no business to emit must show.
    text = tokenizer.decode(tokens, skip_special=False)
    end = tokenizer.decode(prompt[-8:], skip_special=False)
    message = parse(text, thinking=end.rstrip().endswith(_OPEN))
    replies.append(Reply(message.content, tokens, stopped, message))
  return replies


def parse(text: str, *, thinking: bool = False) -> Message:
  """The assistant turn that an emitted text stands for.

      '<think>\\nTwo twos.\\n</think>\\n\\n4'
        -> content '4', reasoning 'Two twos.'
      'Let me see.<tool_call>{"name": "f", "arguments": {}}</tool_call>'
        -> content 'Let me see.', tool_calls (ToolCall('f', {}),)

  Thinking that never ends is all reasoning. If any tool call is malformed, all
  of them stay in the content and `tool_calls` is empty: half of what the model
  meant to call is not what it meant.

  Args:
    thinking: the prompt has opened the thinking already.
  """
  reasoning = None
  if thinking or text.lstrip().startswith(_OPEN):
    start = text if thinking else text.lstrip().removeprefix(_OPEN)
    reasoning, _, text = start.partition(_CLOSE)
    reasoning = reasoning.strip("\n")
  calls = [_tool_call(body) for body in _TOOL_CALL.findall(text)]
  good = [call for call in calls if call is not None]
  if len(good) < len(calls):
    good = []
  if good:
    text = _TOOL_CALL.sub("", text)
  return Message("assistant", text.strip(), reasoning, tuple(good))


def _tool_call(body: str) -> ToolCall | None:
  """`{"name": text, "arguments": object}`; None for anything else."""
  try:
    call = json.loads(body)
  # A model may nest brackets deeper than the parser's stack.
  except (ValueError, RecursionError):
    return None
  if not isinstance(call, dict):
    return None
  name, arguments = call.get("name"), call.get("arguments")
  if not isinstance(name, str) or not isinstance(arguments, dict):
    return None
  return ToolCall(name, arguments)
