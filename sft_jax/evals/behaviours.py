"""Behaviour: held-out prompts with checks, scored before and after."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sft_jax.data import formats
from sft_jax.data.conversation import Conversation
from sft_jax.evals import checks
from sft_jax.evals.replies import Reply

Generate = Callable[[list[Conversation]], list[Reply]]
_KEYS = {"messages", "checks", "group"}


class Item(NamedTuple):
  """One prompt and what its reply must satisfy.

  Attributes:
    group: the behaviour it belongs to.
    prompt: ends in a user or tool turn.
    checks: `{"check": name, ...arguments}`; all must pass.
    where: 'behaviours.jsonl:12', for errors and records.
  """

  group: str
  prompt: Conversation
  checks: tuple[dict[str, Any], ...]
  where: str


class Score(NamedTuple):
  """Counts of one group."""

  n: int
  passed: int
  stopped: int

  @property
  def rate(self) -> float:
    return self.passed / self.n

  @property
  def interval(self) -> tuple[float, float]:
    return wilson(self.passed, self.n)


class Scores(NamedTuple):
  """What came of running a behaviour set.

  Attributes:
    replies: one JSON-able record per item, in order: where, group, prompt,
      reply, reasoning, tool_calls, stopped, failed (names of checks), and
      passed, which is: stopped by itself and nothing failed.
  """

  replies: list[dict[str, Any]]

  @property
  def groups(self) -> dict[str, Score]:
    """Scores by group, in the order of the file."""
    counts: dict[str, list[int]] = {}
    for reply in self.replies:
      count = counts.setdefault(reply["group"], [0, 0, 0])
      count[0] += 1
      count[1] += reply["passed"]
      count[2] += reply["stopped"]
    return {group: Score(*count) for group, count in counts.items()}

  def to_json(self) -> dict[str, Any]:
    """Groups with their rates and intervals, and every reply."""
    groups = {
      group: {
        **score._asdict(),
        "rate": score.rate,
        "interval": list(score.interval),
      }
      for group, score in self.groups.items()
    }
    return {"groups": groups, "replies": self.replies}

  @classmethod
  def from_json(cls, value: dict[str, Any]) -> "Scores":
    """The scores that `to_json` wrote; counts are made anew of the replies."""
    return cls(value["replies"])


class Comparison(NamedTuple):
  """One group before and after, on the same items.

  Attributes:
    gained, lost: items that passed only after, only before.
    p: exact two-sided McNemar test of gained = lost.
  """

  group: str
  before: Score
  after: Score
  gained: int
  lost: int
  p: float


def load(path: str | Path) -> list[Item]:
  """Reads a behaviour set: one item per line of jsonl.

      {"group": "facts", "messages": [{"role": "user", "content": "..."}],
       "checks": [{"check": "contains", "text": "Dorvik"}]}

  Every check is validated here, so that none fails after the training.

  Raises:
    RowError: a conversation that is none.
    ValueError: a missing or unknown key, a last turn that leaves nothing to
      reply to, an unknown check or an argument it cannot use; an empty file.
  """
  items = [_item(row, where) for where, row in formats.read_rows(path)]
  if not items:
    raise ValueError(
      f"{path}: got no rows; expected at least one prompt. "
      "Give another file, or turn the evaluation off."
    )
  return items


def run(items: Sequence[Item], generate: Generate) -> Scores:
  """Generates a reply to each item and checks it."""
  replies = generate([item.prompt for item in items])
  return Scores(
    [_record(item, reply) for item, reply in zip(items, replies, strict=True)]
  )


def compare(before: Scores, after: Scores) -> list[Comparison]:
  """Groups paired item by item, in the order of the file.

  Raises:
    ValueError: the scores are of different items.
  """
  places = [[r["where"] for r in s.replies] for s in (before, after)]
  if places[0] != places[1]:
    raise ValueError(
      f"compare: got scores of {len(places[0])} and {len(places[1])} items "
      "that differ; expected the same items in the same order. "
      "Run both on one behaviour set."
    )
  pairs = list(zip(before.replies, after.replies, strict=True))
  result = []
  for group, score in before.groups.items():
    changes = [
      (a["passed"], b["passed"]) for a, b in pairs if a["group"] == group
    ]
    gained, lost = changes.count((False, True)), changes.count((True, False))
    p = mcnemar(gained, lost)
    now = after.groups[group]
    result.append(Comparison(group, score, now, gained, lost, p))
  return result


def table(comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
  """Header and rows of text, ready to print."""
  header = ("behaviour", "n", "before", "after", "stops", "gained", "lost", "p")
  return [
    header,
    *(
      (
        c.group,
        str(c.after.n),
        _percent(c.before),
        _percent(c.after),
        f"{c.after.stopped / c.after.n:.0%}",
        str(c.gained),
        str(c.lost),
        f"{c.p:.2g}",
      )
      for c in comparisons
    ),
  ]


def wilson(passed: int, n: int) -> tuple[float, float]:
  """95 % score interval of a proportion (Wilson, 1927).

  wilson(8, 10) is (0.490, 0.943); unlike the normal interval it stays within
  [0, 1] and is of use at 0 and at n.
  """
  z = 1.959963984540054
  centre = passed + z * z / 2
  half = z * math.sqrt(passed * (n - passed) / n + z * z / 4)
  low, high = (centre - half) / (n + z * z), (centre + half) / (n + z * z)
  return max(low, 0.0), min(high, 1.0)


def mcnemar(gained: int, lost: int) -> float:
  """Exact two-sided p of the discordant pairs under a fair coin.

  mcnemar(5, 0) is 2 / 2^5 = 0.0625; with no change it is 1.
  """
  n = gained + lost
  tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
  return min(1.0, 2 * tail / 2**n)


def _item(row: Any, where: str) -> Item:
  keys = set(row) if isinstance(row, dict) else set()
  if not keys >= _KEYS or not keys <= _KEYS | {"tools"}:
    raise ValueError(
      f"{where}: got keys {sorted(keys)}; expected messages, checks, group "
      "and perhaps tools. Add or rename the keys."
    )
  if not isinstance(row["group"], str) or not row["group"]:
    raise ValueError(
      f"{where}: got group {row['group']!r}; expected a name. Name the group."
    )
  if not isinstance(row["checks"], list) or not row["checks"]:
    raise ValueError(
      f"{where}: got checks {row['checks']!r}; expected a list of at least "
      "one. Say what the reply must satisfy."
    )
  for index, check in enumerate(row["checks"]):
    checks.validate(check, f"{where} checks[{index}]")
  turns = {key: row[key] for key in ("messages", "tools") if key in row}
  prompt = formats.to_conversation(turns, format="messages", source=where)
  if prompt.messages[-1].role not in ("user", "tool"):
    raise ValueError(
      f"{where}: got a last turn of {prompt.messages[-1].role}; expected user "
      "or tool. End the messages where the reply begins."
    )
  return Item(row["group"], prompt, tuple(row["checks"]), where)


def _record(item: Item, reply: Reply) -> dict[str, Any]:
  failed = [c["check"] for c in item.checks if not checks.passes(reply, c)]
  return {
    "where": item.where,
    "group": item.group,
    "prompt": [
      {"role": turn.role, "content": turn.content}
      for turn in item.prompt.messages
    ],
    "reply": reply.text,
    "reasoning": reply.message.reasoning,
    "tool_calls": [
      {"name": call.name, "arguments": call.arguments}
      for call in reply.message.tool_calls
    ],
    "stopped": reply.stopped,
    "failed": failed,
    "passed": reply.stopped and not failed,
  }


def _percent(score: Score) -> str:
  low, high = score.interval
  return f"{score.rate:.0%} [{low:.0%}, {high:.0%}]"
