"""Synthesis: rows to train on, written by a teacher and kept when they pass.

Rejection sampling: the teacher answers each prompt up to so many times, and a
reply becomes a row when it stopped by itself and every check of its prompt
passes (as in STaR, arXiv:2203.14465). Nothing is silent: prompts = overlapping
+ solved + unsolved, and attempts = kept + refused, each by its first reason.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sft_jax.data.audit import overlap, row_texts, text_hashing
from sft_jax.data.chat import template_messages
from sft_jax.data.conversation import Conversation, NothingToTrain, RowError
from sft_jax.data.formats import formats
from sft_jax.evals.behaviors import Item
from sft_jax.evals.checks import checks
from sft_jax.inference.generate import Reply

KEEP = ("first", "shortest", "all", "pairs")

# (conversations, a seed for each) -> a reply to each.
Sample = Callable[[list[Conversation], list[int]], list[Reply]]


@dataclasses.dataclass
class Group:
  """What became of the prompts of one group."""

  prompts: int = 0  # All of them.
  overlapping: int = 0  # Not asked, for an evaluation set asks the same.
  solved: int = 0  # Prompts of which at least one row came.
  attempts: int = 0  # Replies sampled.
  kept: int = 0  # Replies that became rows.
  # The others, by reason.
  refused: dict[str, int] = dataclasses.field(default_factory=dict)

  def refuse(self, reason: str) -> None:
    self.refused[reason] = self.refused.get(reason, 0) + 1


class Synthesis(NamedTuple):
  """Rows, and the account of them."""

  # In the order of the prompts: messages, tools where there are any, and
  # `synthetic`: teacher, prompt (its place), group, attempt and seed. Only the
  # teacher's turn is trained on: earlier ones have weight 0.
  rows: list[dict[str, Any]]
  groups: dict[str, Group]  # By name.

  def to_json(self) -> dict[str, Any]:
    return {name: dataclasses.asdict(g) for name, g in self.groups.items()}


def seed_of(seed: int, where: str, attempt: int) -> int:
  """A seed for one attempt at one prompt, whatever is asked beside it."""
  text = json.dumps([seed, where, attempt]).encode()
  made = hashlib.blake2b(text, digest_size=4).digest()
  return int.from_bytes(made, "little") >> 1


def overlapping(
  items: Sequence[Item], against: Sequence[Item]
) -> Sequence[bool]:
  """Which prompts an evaluation set gives away, or is given away by: the same
  words, or half of the runs of 13 (`audit.overlap`)."""
  if not against:
    return [False] * len(items)
  return overlap.find_overlap([_asked(against)], [_asked(items)]).found.tolist()


def _asked(items: Sequence[Item]) -> overlap.Rows:
  turns = [map(row_texts.message_text, item.prompt.messages) for item in items]
  words = text_hashing.split(["\n\n".join(texts) for texts in turns])
  return overlap.Rows(words, words)


def synthesize(
  items: Sequence[Item],
  sample: Sample,
  *,
  teacher: str,
  attempts: int,
  keep: str = "first",
  seed: int = 0,
  against: Sequence[Item] = (),
  usable: Callable[[Conversation], None] = lambda conversation: None,
  log: Callable[[str], None] = print,
) -> Synthesis:
  """Asks the teacher, and keeps what passes.

  Args:
    attempts: most replies to a prompt.
    keep: 'first' asks until a reply passes; 'shortest' asks always and keeps
      the shortest that passes (in tokens, the earliest of equals); 'all'
      keeps all different ones; 'pairs' asks until one passes and another
      fails a check, and makes them the chosen and rejected of one row.
    against: evaluation items; prompts that overlap with them are not asked.
    usable: raises RowError where a conversation cannot be trained on.

  Raises ValueError: a `keep` that is not known, or no attempt.
  """
  if keep not in KEEP or attempts < 1:
    raise ValueError(
      f"synthesize: got keep {keep!r} and {attempts} attempts; expected one of "
      f"{', '.join(KEEP)} and at least one attempt. Correct them."
    )
  groups: dict[str, Group] = collections.defaultdict(Group)
  open_: list[int] = []
  for i, known in enumerate(overlapping(items, against)):
    group = groups[items[i].group]
    group.prompts += 1
    group.overlapping += known
    if not known:
      open_.append(i)
  passed: dict[int, list[tuple[int, Reply]]] = {i: [] for i in open_}
  failed: dict[int, Reply] = {}
  for attempt in range(attempts):
    done = lambda i: (
      passed[i] and (keep == "first" or (keep == "pairs" and i in failed))
    )
    asked = [i for i in open_ if not done(i)]
    if not asked:
      break
    seeds = [seed_of(seed, items[i].where, attempt) for i in asked]
    replies = sample([items[i].prompt for i in asked], seeds)
    for i, reply in zip(asked, replies, strict=True):
      group = groups[items[i].group]
      group.attempts += 1
      reason = _refused(items[i], reply, usable)
      known = (reply.message == before.message for _, before in passed[i])
      if not reason and keep == "all" and any(known):
        reason = "repeated"
      if reason:
        group.refuse(reason)
        unchecked = items[i]._replace(checks=())
        if (
          keep == "pairs"
          and i not in failed
          and not _refused(unchecked, reply, usable)
        ):
          failed[i] = reply
      else:
        passed[i].append((attempt, reply))
    solved = f"{sum(map(bool, passed.values())):,} of {len(open_):,}"
    log(f"round {attempt + 1} of {attempts}: {solved} prompts solved")
  rows = []
  for i in open_:
    item, kept = items[i], passed[i]
    group = groups[item.group]
    if keep == "shortest" and kept:
      for _ in kept[1:]:
        group.refuse("not the shortest")
      kept = [min(kept, key=lambda one: len(one[1].tokens))]
    if keep == "pairs":
      most = int(i in failed)
      for _ in kept[most:]:
        group.refuse("more than a pair" if most else "no other failed")
      kept = kept[:most]
    group.solved += bool(kept)
    group.kept += len(kept)
    for attempt, reply in kept:
      about = {
        "teacher": teacher,
        "prompt": item.where,
        "group": item.group,
        "attempt": attempt,
        "seed": seed_of(seed, item.where, attempt),
      }
      row = _row(item.prompt, reply)
      if keep == "pairs":
        worse = _row(item.prompt, failed[i])["messages"]
        row |= {"chosen": row["messages"][-1:], "rejected": worse[-1:]}
        row["messages"] = row["messages"][:-1]
      rows.append(row | {"synthetic": about})
  return Synthesis(rows, dict(groups))


def _refused(
  item: Item, reply: Reply, usable: Callable[[Conversation], None]
) -> str:
  """The first reason not to keep a reply; '' is none."""
  if not reply.stopped:
    return "did not stop"
  for one in item.checks:
    if not checks.passes(reply, one):
      return f"check {one['check']}"
  if not (reply.text.strip() or reply.message.tool_calls):
    return "says nothing"
  try:
    # As it is read again: a teacher may say what no row may hold, such as NUL.
    row = _row(item.prompt, reply)
    usable(formats.to_conversation(row, format="messages", source=item.where))
  except (RowError, NothingToTrain):
    return "cannot be trained on"
  return ""


def _row(prompt: Conversation, reply: Reply) -> dict[str, Any]:
  """A row of the format `messages`; earlier assistant turns weigh nothing."""
  turns = prompt.messages
  zero = lambda one: dataclasses.replace(one, weight=0.0)
  before = [zero(x) if x.role == "assistant" else x for x in turns]
  whole = dataclasses.replace(prompt, messages=(*before, reply.message))
  turns = template_messages.to_template_messages(whole)
  for turn, message in zip(turns, whole.messages, strict=True):
    turn.pop("thinking", None)  # Templates have two names for it; rows one.
    if message.weight is not None:
      turn["weight"] = message.weight
  row: dict[str, Any] = {"messages": turns}
  return row | ({"tools": list(prompt.tools)} if prompt.tools else {})


def lines(made: Synthesis) -> list[tuple[str, ...]]:
  """Header and rows of text, by group."""
  rows: list[tuple[str, ...]] = [
    ("group", "n", "overlap", "solved", "replies", "kept", "refused")
  ]
  for name, g in made.groups.items():
    counts = (g.prompts, g.overlapping, g.solved, g.attempts, g.kept)
    reasons = sorted(g.refused.items(), key=lambda reason: -reason[1])
    refused = ", ".join(f"{why} {n:,}" for why, n in reasons)
    rows.append((name, *(f"{n:,}" for n in counts), refused))
  return rows


def check_sums(made: Synthesis) -> None:
  """Raises a ValueError unless all prompts and replies are accounted for."""
  for name, g in made.groups.items():
    sums = (g.attempts, g.kept + sum(g.refused.values()))
    unsolved = g.prompts - g.overlapping - g.solved
    if sums[0] != sums[1] or unsolved < 0:
      raise ValueError(
        f"synthesis of {name}: got {sums[1]} replies accounted for, expected "
        f"{sums[0]}. This is a fault of the program; report it."
      )
  rows = sum(g.kept for g in made.groups.values())
  assert rows == len(made.rows), (rows, len(made.rows))
