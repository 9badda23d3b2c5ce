"""Conversation: the one noun every row format becomes, and its grammar."""

import dataclasses
import math
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


class RowError(ValueError):
  """A malformed row: where it is, what it holds, what was expected, a cure.

  The four parts stay apart in `args`, so the error survives pickling between
  processes; `str` joins them into one line.
  """

  def __init__(self, where: str, got: str, expected: str, cure: str):
    super().__init__(where, got, expected, cure)
    self.where = where

  def __str__(self) -> str:
    where, got, expected, cure = self.args
    return f"{where}: got {got}; expected {expected}. {cure}"


class NothingToTrain(ValueError):
  """A well-formed row that has nothing to learn from.

  Such a row is dropped and counted, not an error of the run.

  Attributes:
    reason: the ledger's key, such as 'empty answer' or 'over long'.
  """

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(reason, detail)
    self.reason = reason

  def __str__(self) -> str:
    reason, detail = self.args
    return f"{reason}: {detail}" if detail else reason


@dataclasses.dataclass(frozen=True)
class ToolCall:
  """One call of a tool; `arguments` keeps its keys in the order written."""

  name: str
  arguments: dict[str, Any]
  id: str | None = None


@dataclasses.dataclass(frozen=True)
class Message:
  """One turn.

  Attributes:
    role: one of `ROLES`.
    content: what is said; '' where a turn holds only tool calls.
    reasoning: the thinking before the content; None where the row has none,
      '' where it has an empty think block.
    tool_calls: what an assistant turn calls.
    name, tool_call_id: which tool, and which call, a tool turn answers.
    weight: of each of its tokens in the loss; None is the role's default
      (assistant 1, others 0).
  """

  role: str
  content: str
  reasoning: str | None = None
  tool_calls: tuple[ToolCall, ...] = ()
  name: str | None = None
  tool_call_id: str | None = None
  weight: float | None = None

  @property
  def loss_weight(self) -> float:
    if self.weight is None:
      return 1.0 if self.role == "assistant" else 0.0
    return self.weight


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Turns with the tools on offer, or one raw text to train on whole.

  Attributes:
    messages: the turns; empty where `text` is given.
    tools: JSON schemas exactly as written.
    text: raw text, every token of which is trained; None for a conversation.
    source: where it came from, such as 'rows.jsonl:12'; errors name it.
  """

  messages: tuple[Message, ...] = ()
  tools: tuple[dict[str, Any], ...] = ()
  text: str | None = None
  source: str = ""

  def __post_init__(self):
    if (self.text is None) == (not self.messages):
      raise RowError(
        self.source or "row",
        "both messages and text" if self.messages else "no messages",
        "either messages or raw text",
        "Give exactly one of them.",
      )

  def where(self, index: int) -> str:
    """The place of message `index`, for errors: 'rows.jsonl:12 messages[3]'."""
    return f"{self.source or 'row'} messages[{index}]"


def check(conversation: Conversation) -> Conversation:
  """The same conversation, or a RowError naming the first turn out of order.

  The grammar: known roles; a system turn only first; an assistant turn says,
  thinks or calls something; a tool turn follows an assistant turn that calls
  a tool, or another tool turn; only assistant turns may be trained. What else
  a model wants (that roles alternate, say) its chat template decides.
  """
  before: Message | None = None
  for index, message in enumerate(conversation.messages):
    if fault := _fault(message, before):
      raise RowError(conversation.where(index), *fault)
    before = message
  return conversation


def _fault(
  message: Message, before: Message | None
) -> tuple[str, str, str] | None:
  """(got, expected, cure) of a turn that breaks the grammar."""
  role = message.role
  if role not in ROLES:
    return (
      f"role {role!r}",
      f"one of {', '.join(ROLES)}",
      "Rename the role or drop the turn.",
    )
  if role == "system" and before is not None:
    return (
      f"a system turn after a {before.role} turn",
      "a system turn only as the first",
      "Move it to the start or merge it into a user turn.",
    )
  says = message.content or message.reasoning or message.tool_calls
  if role == "assistant" and not says:
    return (
      "an empty assistant turn",
      "content, reasoning or tool calls",
      "Fill the turn or drop the row.",
    )
  if role != "assistant" and message.tool_calls:
    return (
      f"tool calls in a {role} turn",
      "tool calls in assistant turns only",
      "Move them to an assistant turn.",
    )
  calls = before is not None and (before.tool_calls or before.role == "tool")
  if role == "tool" and not calls:
    return (
      f"a tool turn after {'nothing' if before is None else before.role}",
      "a tool turn after an assistant turn with tool_calls",
      "Add the call that this turn answers.",
    )
  weight = message.loss_weight
  if not math.isfinite(weight) or weight < 0:
    return (
      f"weight {weight}",
      "a finite weight of at least 0",
      "Correct the message's weight.",
    )
  if weight > 0 and role != "assistant":
    return (
      f"weight {weight} on a {role} turn",
      "weights above 0 on assistant turns only",
      "Training on other roles is not supported: set the weight to 0.",
    )
  return None
