"""Behavior: held-out prompts with checks, scored before and after."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sft_jax.data.conversation import Conversation, Message, RowError
from sft_jax.data.formats import formats
from sft_jax.data.readers import files
from sft_jax.evals.checks import checks, ifeval
from sft_jax.inference.generate import Reply

Generate = Callable[[list[Conversation]], list[Reply]]
_KEYS = {"messages", "checks"}
_TEXT_KEYS = {"text", "checks"}


class Item(NamedTuple):
  group: str  # The behavior it belongs to.
  prompt: Conversation  # Ends in a user or tool turn, or is a text to continue.
  checks: tuple[dict[str, Any], ...]  # {"check": name, ...}; all must pass.
  where: str  # 'behaviors.jsonl:12', for errors and records.


def load(path: str | Path) -> list[Item]:
  """Reads a behavior set: one item per line of jsonl.

      {"group": "facts", "messages": [{"role": "user", "content": "..."}],
       "checks": [{"check": "contains", "text": "Dorvik"}]}

  `group` may be left out. With `text` in place of the messages, the reply is
  the model's continuation of a raw text, which need not stop by itself. Rows of
  IFEval (prompt, instruction_id_list, kwargs) are taken as they are. Every
  check is validated here, so that none fails after the training.

  Raises:
    RowError: a conversation that is none.
    ValueError: a missing or unknown key, a last turn that leaves nothing to
      reply to, an unknown check or an argument it cannot use; an empty file.
  """
  items = [_item(row, where) for where, row in files.read_rows(path)]
  if not items:
    raise ValueError(
      f"{path}: got no rows; expected at least one prompt. "
      "Give another file, or turn the evaluation off."
    )
  return items


def load_sets(where: Any) -> list[Item]:
  """Items of several sets: a path, a glob, or {name: path or glob}; groups of a
  named one are called 'name/group'."""
  if not isinstance(where, Mapping):
    return [item for path in files.find_files(where) for item in load(path)]
  return [
    item._replace(group=f"{name}/{item.group}")
    for name, path in where.items()
    for item in load_sets(path)
  ]


def _item(row: Any, where: str) -> Item:
  keys = set(row) if isinstance(row, dict) else set()
  if "instruction_id_list" in keys:
    row = _from_ifeval(row, where)
    keys = set(row)
  of_text = _TEXT_KEYS <= keys <= _TEXT_KEYS | {"group"}
  if not of_text and not _KEYS <= keys <= _KEYS | {"tools", "group"}:
    expected = "messages (or text), checks, and perhaps group and tools"
    cure = "Add or rename the keys."
    raise RowError(where, f"keys {sorted(keys)}", expected, cure)
  group, listed = row.get("group", "all"), row["checks"]
  if not isinstance(group, str) or not group:
    raise RowError(where, f"group {group!r}", "a name", "Name the group.")
  if not isinstance(listed, list) or not listed:
    got, cure = f"checks {listed!r}", "Say what the reply must satisfy."
    raise RowError(where, got, "a list of at least one", cure)
  for index, check in enumerate(listed):
    checks.validate(check, f"{where} checks[{index}]")
  kind = "text" if of_text else "messages"
  asked = {key: row[key] for key in ("text", "messages", "tools") if key in row}
  prompt = formats.to_conversation(asked, format=kind, source=where)
  last = prompt.messages[-1].role if prompt.messages else "user"
  if last not in ("user", "tool"):
    got, cure = f"a last turn of {last}", "End where the reply begins."
    raise RowError(where, got, "user or tool", cure)
  return Item(group, prompt, tuple(listed), where)


def _from_ifeval(row: dict[str, Any], where: str) -> dict[str, Any]:
  """A row of IFEval's published prompts as one of ours."""
  names, kwargs = row["instruction_id_list"], row.get("kwargs")
  if (
    not (isinstance(names, list) and isinstance(kwargs, list))
    or len(names) != len(kwargs)
    or "prompt" not in row
  ):
    got = f"instruction_id_list {names!r} with kwargs {kwargs!r}"
    expected = "a prompt and two lists of one length"
    raise RowError(where, got, expected, "Correct the row.")
  return {
    "group": "ifeval",
    "messages": [{"role": "user", "content": row["prompt"]}],
    # Published rows spell out, as null, all arguments of all instructions.
    "checks": [
      {"check": name, **{k: v for k, v in given.items() if v is not None}}
      for name, given in zip(names, kwargs, strict=True)
    ],
  }


class Share(NamedTuple):
  passed: int
  n: int

  @property
  def rate(self) -> float:
    return self.passed / self.n

  @property
  def interval(self) -> tuple[float, float]:
    return wilson(self.passed, self.n)


class Score(NamedTuple):
  n: int
  passed: int  # Stopped by themselves, and failed no check.
  stopped: int  # Stopped by themselves.
  # Of the items with checks of that kind (`checks.kind`), those that failed
  # none, stopped or not. They differ where only the form was learned.
  format: Share | None = None
  content: Share | None = None

  @property
  def rate(self) -> float:
    return Share(self.passed, self.n).rate

  @property
  def interval(self) -> tuple[float, float]:
    return Share(self.passed, self.n).interval


class Scores(NamedTuple):
  """What came of running a behavior set.

  `replies`: one JSON-able record per item, in order: where, group, prompt,
  reply, reasoning, tool_calls, stopped, failed (names of checks), format and
  content (whether its checks of that kind passed; None without any), and
  passed, which is: stopped by itself and nothing failed. IFEval's have
  `instructions`: for each, [name, followed, followed loosely].
  """

  replies: list[dict[str, Any]]

  @property
  def groups(self) -> dict[str, Score]:
    """Scores by group, in the order of the file."""
    members: dict[str, list[dict[str, Any]]] = {}
    for reply in self.replies:
      members.setdefault(reply["group"], []).append(reply)
    return {group: _score(replies) for group, replies in members.items()}

  def metrics(self) -> dict[str, float]:
    """{'behavior/GROUP/pass_rate', '.../stopped', and '.../format' and
    '.../content' where there are such checks}; the group 'all' is all."""
    values = {}
    every = {"all": _score(self.replies)} | self.groups
    for group, score in every.items():
      values[f"behavior/{group}/pass_rate"] = score.rate
      values[f"behavior/{group}/stopped"] = score.stopped / score.n
      for kind in checks.KINDS:
        share = getattr(score, kind)
        if share is not None:
          values[f"behavior/{group}/{kind}"] = share.rate
    return values

  def to_json(self) -> dict[str, Any]:
    """Groups with their rates and intervals, and every reply."""
    groups = {}
    for group, score in self.groups.items():
      kinds = {kind: getattr(score, kind) for kind in checks.KINDS}
      kinds = {kind: share and share._asdict() for kind, share in kinds.items()}
      rate = {"rate": score.rate, "interval": list(score.interval)}
      groups[group] = score._asdict() | kinds | rate
    return {"groups": groups, "replies": self.replies}

  def write(self, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
      file.writelines(json.dumps(reply) + "\n" for reply in self.replies)

  @classmethod
  def from_json(cls, value: dict[str, Any]) -> "Scores":
    """The scores that `to_json` wrote; counts are those of the replies."""
    return cls(value["replies"])


class Comparison(NamedTuple):
  """One group before and after, on the same items."""

  group: str
  before: Score
  after: Score
  gained: int  # Items that passed only after.
  lost: int  # Only before.
  p: float  # Exact two-sided McNemar test of gained = lost.


def run(items: Sequence[Item], generate: Generate) -> Scores:
  replies = generate([item.prompt for item in items])
  pairs = zip(items, replies, strict=True)
  return Scores([_record(item, reply) for item, reply in pairs])


def compare(before: Scores, after: Scores) -> list[Comparison]:
  """Groups paired item by item, in the order of the file.

  Raises ValueError: the scores are of different items.
  """
  places = [[r["where"] for r in s.replies] for s in (before, after)]
  if places[0] != places[1]:
    raise ValueError(
      f"compare: got scores of {len(places[0])} and {len(places[1])} items "
      "that differ; expected the same items in the same order. "
      "Run both on one behavior set."
    )
  pairs = list(zip(before.replies, after.replies, strict=True))
  result = []
  for group, score in before.groups.items():
    mine = [(a["passed"], b["passed"]) for a, b in pairs if a["group"] == group]
    gained, lost = mine.count((False, True)), mine.count((True, False))
    now, p = after.groups[group], mcnemar(gained, lost)
    result.append(Comparison(group, score, now, gained, lost, p))
  return result


def summary_table(
  after: Scores, before: Scores | None = None
) -> list[tuple[str, ...]]:
  """Header and rows of text, of one model or of two on the same items."""
  pairs = {c.group: c for c in compare(before, after)} if before else {}
  head = ("before", "after") if pairs else ("passed",)
  more = ("+ / -", "p") if pairs else ()
  rows = [("behavior", "n", *head, "stops", "format / content", *more)]
  for group, score in after.groups.items():
    c = pairs.get(group)
    kinds = (score.format, score.content)
    rows.append(
      (
        *(group, str(score.n), *([_percent(c.before)] if c else [])),
        *(_percent(score), f"{score.stopped / score.n:.0%}"),
        " / ".join(f"{x.rate:.0%}" if x else "-" for x in kinds),
        *((f"{c.gained} / {c.lost}", f"{c.p:.2g}") if c else ()),
      )
    )
  return rows


def ifeval_accuracy(scores: Scores) -> dict[str, float] | None:
  """IFEval's four figures; None without its instructions.

  Strict and loose shares of prompts whose instructions are all followed, and
  of instructions. Whether a reply stopped by itself plays no part in them.
  """
  found = [r["instructions"] for r in scores.replies if "instructions" in r]
  if not found:
    return None
  every = [verdict for reply in found for verdict in reply]
  means = {}
  for column, manner in ((1, "strict"), (2, "loose")):
    followed = [all(verdict[column] for verdict in one) for one in found]
    means[f"prompt_{manner}"] = sum(followed) / len(found)
    follow = [verdict[column] for verdict in every]
    means[f"instruction_{manner}"] = sum(follow) / len(every)
  return means


def _record(item: Item, reply: Reply) -> dict[str, Any]:
  passed = [checks.passes(reply, check) for check in item.checks]
  verdicts = list(zip(item.checks, passed, strict=True))
  failed = [check["check"] for check, good in verdicts if not good]
  kinds: dict[str, bool | None] = {}
  for kind in checks.KINDS:
    those = [good for check, good in verdicts if checks.kind(check) == kind]
    kinds[kind] = all(those) if those else None
  instructions = []
  for check in item.checks:
    if check["check"] in ifeval.INSTRUCTIONS:
      both = ({**check, "loose": loose} for loose in (False, True))
      followed = (checks.passes(reply, one) for one in both)
      instructions.append((check["check"], *followed))
  prompt: list[dict[str, Any]] = []
  for turn in item.prompt.messages:
    calls = {"tool_calls": _calls(turn)} if turn.tool_calls else {}
    prompt.append({"role": turn.role, "content": turn.content, **calls})
  return {
    "where": item.where,
    "group": item.group,
    "prompt": prompt or [{"role": "text", "content": item.prompt.text}],
    "reply": reply.text,
    "reasoning": reply.message.reasoning,
    "tool_calls": _calls(reply.message),
    "stopped": reply.stopped,
    "failed": failed,
    **kinds,
    # A raw text that is continued need not stop.
    "passed": (reply.stopped or not item.prompt.messages) and not failed,
    **({"instructions": instructions} if instructions else {}),
  }


def _calls(turn: Message) -> list[dict[str, Any]]:
  return [{"name": x.name, "arguments": x.arguments} for x in turn.tool_calls]


def _score(replies: list[dict[str, Any]]) -> Score:
  shares = {}
  for kind in checks.KINDS:
    those = [r[kind] for r in replies if r.get(kind) is not None]
    shares[kind] = Share(sum(those), len(those)) if those else None
  passed, stopped = (sum(r[x] for r in replies) for x in ("passed", "stopped"))
  return Score(len(replies), passed, stopped, **shares)


def _percent(score: Score) -> str:
  low, high = score.interval
  return f"{score.rate:.0%} [{low:.0%}, {high:.0%}]"


def wilson(passed: int, n: int) -> tuple[float, float]:
  """95 % score interval of a proportion (Wilson, 1927), of use at 0 and at n,
  too: wilson(8, 10) is (0.490, 0.943)."""
  z = 1.959963984540054
  centre = passed + z * z / 2
  half = z * math.sqrt(passed * (n - passed) / n + z * z / 4)
  low, high = (centre - half) / (n + z * z), (centre + half) / (n + z * z)
  return max(low, 0.0), min(high, 1.0)


def mcnemar(gained: int, lost: int) -> float:
  """Exact two-sided p of the discordant pairs under a fair coin: mcnemar(5, 0)
  is 2 / 2^5 = 0.0625; with no change it is 1."""
  n = gained + lost
  tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
  return min(1.0, 2 * tail / 2**n)
