"""Conversations in few words, and what of an Example is trained."""

import numpy as np

from sft_jax.data.conversation import Conversation, Message, ToolCall

TRACE = Conversation(
  (
    Message("user", "Look."),
    Message(
      "assistant", "", "Hm.", (ToolCall("look", {"b": 1, "a": "x"}, "id1"),)
    ),
    Message("tool", "A cat.", name="look", tool_call_id="id1"),
  ),
  ({"name": "look"},),
  source="rows.jsonl:3",
)


def chat(*turns):
  """'u:Hi', 'a:Hello.', or whole Messages, as a Conversation."""
  roles = {"s": "system", "u": "user", "a": "assistant"}
  messages = [
    turn if isinstance(turn, Message) else Message(roles[turn[0]], turn[2:])
    for turn in turns
  ]
  return Conversation(tuple(messages), source="rows.jsonl:3")


def runs(weights):
  """[(start, end)] of the runs of weights above 0."""
  edges = np.flatnonzero(np.diff([0, *(weights > 0), 0]))
  return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
