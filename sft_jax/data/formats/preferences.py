"""Preference rows: the chosen side is trained, the rejected one is not."""

from collections.abc import Mapping
from typing import Any

from sft_jax.data.conversation import Conversation, RowError
from sft_jax.data.formats import chat, fields, instruction
from sft_jax.data.formats.columns import Names

Row = Mapping[str, Any]

# Where a prompt may stand: as turns or as a question.
PROMPTS = (
  *("messages", "conversations", "conversation", "instruction"),
  *instruction.QUESTIONS,
)


def from_preference(row: Row, source: str, names: Names) -> Conversation:
  """The chosen side; what it shares with the rejected side is its prompt.

  The prompt is under a key of the other formats, or chosen begins with it; then
  it may be told again under several.
  """
  where = source or "row"
  found = [key for key in PROMPTS if key in row]
  chosen = instruction.reply(row, "chosen", source, names)
  if chosen[0].role == "assistant":
    if not found:
      raise RowError(
        where,
        f"no prompt in {fields.shown(row)}",
        "a prompt that chosen answers, or turns that begin with it",
        'Add one; raw text is columns {"chosen": "text"}.',
      )
    key = fields.only(row, found, where)
    before = instruction.prompt(row, key, where, names)
    if before[-1].role == "assistant":
      raise RowError(
        where,
        f"an assistant turn at the end of {key}, and chosen",
        "turns up to the one that chosen answers",
        "Drop one of the two, or name the format (data.format: messages).",
      )
    return instruction.finished([*chat.as_prompt(before), *chosen], row, source)
  # The whole conversation; a prompt beside it is its beginning, told again.
  said = [one for one in chosen if one.role != "system"]
  for key in found:
    before = instruction.prompt(row, key, where, names)
    again = [one for one in before if one.role != "system"]
    if said[: len(again)] != again:
      raise RowError(
        where,
        f"a {key} with which chosen does not begin",
        "chosen as the answer alone, or as the whole conversation",
        "Drop one of the two columns.",
      )
  shared = max(i for i, one in enumerate(chosen) if one.role != "assistant")
  if isinstance(row.get("rejected"), list):
    rejected = chat.read(row["rejected"], "rejected", where, names)
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), shared)
  messages = [*chat.as_prompt(chosen[:shared]), *chosen[shared:]]
  return instruction.finished(messages, row, source)
