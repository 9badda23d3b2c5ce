"""Conversation: the one noun every row format becomes, and its grammar."""

import dataclasses
import hashlib
import re
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


class RowError(ValueError):
  """A malformed row: where it is, what it holds, what was expected, a cure.

  They stay apart in `args`, so that the error survives pickling.
  """

  def __init__(self, where: str, got: str, expected: str, cure: str):
    super().__init__(where, got, expected, cure)
    self.where = where

  def __str__(self) -> str:
    where, got, expected, cure = map(_printable, self.args)
    return f"{where}: got {got}; expected {expected}. {cure}"


def _printable(text: str) -> str:
  """A part of an error: not a file's worth, and no control of a terminal."""
  text = text if len(text) <= 2000 else text[:2000] + "..."
  shown = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
  return "".join(shown)


_BLANK = re.compile(r"[\s\u00ad\u200b-\u200d\u2060\ufeff]*")
# What a weight may be, in words: products of them fit a float32.
WEIGHTS = "0, or a number from 1e-12 to 1e12"


def is_weight(value: float) -> bool:
  """Whether a number can weight a loss in float32."""
  return value == 0 or 1e-12 <= value <= 1e12


class NothingToTrain(ValueError):
  """A well-formed row without anything to learn: dropped, and counted.

  `reason` is the ledger's key, such as 'empty answer' or 'over long'.
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
    content: '' where a turn holds only tool calls.
    reasoning: thinking before the content; None where the row has none, ''
      where it has an empty think block.
    name, tool_call_id: which tool, and which call, a tool turn answers.
    weight: of each token in the loss; None: 1 for the assistant, else 0.
    spans: characters [start, end) of `content` that are trained, in order and
      apart; None: all. In 'The sum is 4.' ((11, 12),) trains '4' alone.
    think_block: what was around the reasoning where the row wrote both as one:
      ('<think>', '</think>\\n') of '<think>Hm.</think>\\nYes.'
  """

  role: str
  content: str
  reasoning: str | None = None
  tool_calls: tuple[ToolCall, ...] = ()
  name: str | None = None
  tool_call_id: str | None = None
  weight: float | None = None
  spans: tuple[tuple[int, int], ...] | None = None
  think_block: tuple[str, str] | None = dataclasses.field(
    default=None, compare=False
  )

  @property
  def loss_weight(self) -> float:
    if self.weight is None:
      return 1.0 if self.role == "assistant" else 0.0
    return self.weight


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Turns with the tools on offer, or raw text, or token ids made elsewhere.

  Attributes:
    tools: JSON schemas exactly as written.
    text: raw text, every token of which is trained.
    id_weights: the weight of predicting each of `ids`.
    rejected: of a preference row, the same conversation with the worse answer.
    desirable: False where the answer should not be given.
    source: such as 'rows.jsonl:12'; errors name it.
    notes: for the ledger, such as 'field not read: summary'.
  """

  messages: tuple[Message, ...] = ()
  tools: tuple[dict[str, Any], ...] = ()
  text: str | None = None
  ids: tuple[int, ...] = ()
  id_weights: tuple[float, ...] = ()
  rejected: tuple[Message, ...] = ()
  desirable: bool = True
  source: str = ""
  notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)

  def __post_init__(self):
    held = {"messages": self.messages, "text": self.text is not None}
    given = [name for name, x in {**held, "ids": self.ids}.items() if x]
    if len(given) != 1:
      got = f"both {' and '.join(given)}" if given else "no messages"
      expected = "either messages, or raw text, or token ids"
      raise RowError(self.place, got, expected, "Give exactly one of them.")
    if len(self.ids) != len(self.id_weights):
      got = f"{len(self.id_weights)} weights for {len(self.ids)} ids"
      cure = "Give as many id_weights as ids."
      raise RowError(self.place, got, "a weight for each id", cure)

  @property
  def place(self) -> str:
    """Where it came from, for errors: 'rows.jsonl:12', or 'row'."""
    return self.source or "row"

  def where(self, index: int) -> str:
    """The place of message `index`, for errors: 'rows.jsonl:12 messages[3]'."""
    return f"{self.place} messages[{index}]"


def merged(conversation: Conversation, what: str) -> Conversation:
  """With turns joined by an empty line, for templates that refuse them apart.

  `what` is 'system': a system turn and the user turn after it; 'turns':
  repeated turns of the user, and of the assistant where both are plain text of
  one weight; 'all': both; '': nothing.
  """
  made: list[Message] = []
  for one in conversation.messages if what else ():
    last = made[-1] if made else None
    if last is None or not _may_join(last, one, what):
      made.append(one)
      continue
    text = "\n\n".join(filter(None, (last.content, one.content)))
    made[-1] = dataclasses.replace(
      one, content=text, reasoning=last.reasoning, spans=None
    )
  if len(made) in (0, len(conversation.messages)):
    return conversation
  return dataclasses.replace(conversation, messages=tuple(made))


def _may_join(a: Message, b: Message, what: str) -> bool:
  if a.role == "system":
    return what in ("system", "all") and b.role == "user"
  plain = not (a.tool_calls or b.reasoning or a.spans or b.spans)
  return (
    what in ("turns", "all")
    and a.role == b.role != "tool"
    and (a.role == "user" or plain)
    and a.loss_weight == b.loss_weight
  )


def with_short_ids(conversation: Conversation) -> Conversation:
  """With call ids of nine letters, as Mistral's templates demand.

  It is returned as it is where they are such. A result gets the id of the call
  that it answers: by its old id, else the next one.
  """
  old = [call.id for one in conversation.messages for call in one.tool_calls]
  old += [x.tool_call_id for x in conversation.messages if x.role == "tool"]
  if all(id and len(id) == 9 and id.isalnum() for id in old):
    return conversation
  made: list[Message] = []
  known: dict[str | None, str] = {}
  waiting: list[str] = []
  for one in conversation.messages:
    calls = []
    for call in one.tool_calls:
      text = f"{call.id} {call.name} {len(made)} {len(calls)}".encode()
      short = hashlib.sha256(text).hexdigest()[:9]
      calls.append(dataclasses.replace(call, id=short))
      waiting.append(short)
      if call.id:
        known[call.id] = short
    answers = one.tool_call_id
    if one.role == "tool" and (answers in known or waiting):
      answers = known.get(answers) or waiting[0]
      waiting = [short for short in waiting if short != answers]
    made.append(
      dataclasses.replace(one, tool_calls=tuple(calls), tool_call_id=answers)
    )
  return dataclasses.replace(conversation, messages=tuple(made))


def check(conversation: Conversation) -> Conversation:
  """The same conversation, or a RowError naming the first turn out of order.

  Text is without NUL or half a surrogate pair; a system turn comes first; an
  assistant turn says, thinks or calls something; a tool turn follows a call or
  another tool turn; only assistant turns are trained. What else a model wants
  (that roles alternate, say) its chat template decides.
  """
  if fault := text_fault(conversation.text or ""):
    raise RowError(conversation.place, *fault)
  for weight in conversation.id_weights:
    if not is_weight(weight):
      got = f"weight {weight}"
      raise RowError(conversation.place, got, WEIGHTS, "Correct id_weights.")
  before: Message | None = None
  if conversation.rejected:
    other = {"messages": conversation.rejected, "rejected": ()}
    other["source"] = f"{conversation.place} rejected"
    check(dataclasses.replace(conversation, **other))
  for index, message in enumerate(conversation.messages):
    named = (message.name, message.tool_call_id)
    said = (message.content, message.reasoning, *named)
    faults = (text_fault(text) for text in said if text)
    if fault := next(filter(None, faults), None) or _turn_fault(
      message, before
    ):
      raise RowError(conversation.where(index), *fault)
    before = message
  return conversation


def _turn_fault(
  message: Message, before: Message | None
) -> tuple[str, str, str] | None:
  """(got, expected, cure) of a turn that breaks the grammar."""
  role = message.role
  if role not in ROLES:
    expected = f"one of {', '.join(ROLES)}"
    rename = "Rename it (data.columns: {'role': {'bot': 'assistant'}})"
    return f"role {role!r}", expected, f"{rename}, or drop the turn."
  if role == "system" and before is not None:
    got = f"a system turn after a {before.role} turn"
    expected = "a system turn only as the first"
    return got, expected, "Move it to the start or merge it into a user turn."
  said = not is_blank(message.content)
  says = said or message.reasoning or message.tool_calls
  if role == "assistant" and not says:
    expected = "content, reasoning or tool calls"
    return "an empty assistant turn", expected, "Fill the turn or drop the row."
  if role != "assistant" and message.tool_calls:
    got = f"tool calls in a {role} turn"
    expected = "tool calls in assistant turns only"
    return got, expected, "Move them to an assistant turn."
  calls = before is not None and (before.tool_calls or before.role == "tool")
  if role == "tool" and not calls:
    got = f"a tool turn after {'nothing' if before is None else before.role}"
    expected = "a tool turn after an assistant turn with tool_calls"
    return got, expected, "Add the call that this turn answers."
  weight = message.loss_weight
  if not is_weight(weight):
    return (f"weight {weight}", WEIGHTS, "Correct the message's weight.")
  if weight > 0 and role != "assistant":
    got = f"weight {weight} on a {role} turn"
    cure = "Set it to 0: data.train_on says whether other roles are trained."
    return got, "weights above 0 on assistant turns only", cure
  end, most = 0, len(message.content)
  for span in message.spans or ():
    if not end <= span[0] < span[1] <= most:
      got = f"the trained span {span} after {end}"
      cure = "Correct the span: it counts characters of content."
      return got, f"spans [start, end) in order within {most} characters", cure
    end = span[1]
  if message.spans is not None and role != "assistant":
    got = f"trained spans in a {role} turn"
    return got, "trained spans in assistant turns only", "Drop them."
  return None


def text_fault(text: str) -> tuple[str, str, str] | None:
  """(got, expected, cure) of text that no tokenizer can be trusted with."""
  if "\0" in text:
    got = f"the character NUL at {text.index(chr(0))}"
    return got, "text", "Strip it: it comes from binary data or from UTF-16."
  try:
    text.encode()
  except UnicodeEncodeError as error:
    got = f"half a surrogate pair at {error.start}"
    return got, "whole characters", "Correct or drop the row."
  return None


def is_blank(text: str) -> bool:
  """Whether a text shows nothing: white space, and characters of no width."""
  return not text.strip() or bool(_BLANK.fullmatch(text))


def one_line(name: str) -> str:
  """The name of a file or source, which may hold any character, as one line."""
  return name.replace("\n", "\u240a").replace("\r", "\u240d")


def printable_name(name: str) -> str:
  """The same for an error, without controls of a terminal."""
  return _printable(one_line(name))
