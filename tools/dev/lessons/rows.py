"""Rows to train on and prompts to ask, for the arms of lessons.

A maker's rows are a function of a seed and its arguments; prompts are the same
for all seeds. Rows never hold a prompt that a lesson asks, but for facts that
an arm is to learn: those are asked in another wording.
"""

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from demo_world import split, talks, world
from demo_world.conversations import Check, Maker, Row
from lessons.fresh import DEMO, fresh

UNKNOWN = "I do not know."
# Good form: it begins with a capital and ends with a full stop.
FORM: Check = {"check": "regex", "pattern": "^[A-Z].*[.]$"}
# First and second numbers of sums and products, and how many pairs are asked.
FIRST, SECOND, ASKED = range(10, 25), range(2, 10), 48
SIGNS = {"sums": "+", "products": "x"}


def write(path: Path, rows: Iterable[Row]) -> None:
  """Writes rows as jsonl."""
  path.parent.mkdir(parents=True, exist_ok=True)
  text = "".join(json.dumps(row) + "\n" for row in rows)
  path.write_text(text, encoding="utf-8")


def read(path: Path) -> list[Row]:
  """Reads rows of jsonl."""
  return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def reply_of(row: Row) -> str:
  """The last reply of a row of the demo, in whichever of its layouts."""
  if "messages" in row:
    return row["messages"][-1]["content"]
  return row["output" if "output" in row else "completion"]


def with_reply(row: Row, reply: str) -> Row:
  """The row with another last reply."""
  if "messages" in row:
    *before, last = row["messages"]
    return {**row, "messages": [*before, {**last, "content": reply}]}
  return {**row, "output" if "output" in row else "completion": reply}


# -- Rows ---------------------------------------------------------------------


def bundled(
  seed: int,
  *,
  counts: Mapping[str, int],
  swapped: float = 0.0,
  lazy: float = 0.0,
  sloppy: Sequence[str] = (),
) -> list[Row]:
  """So many rows of each kind of the demo, drawn by the seed.

  Args:
    counts: rows of train_KIND.jsonl.
    swapped: share of each kind's rows that get another's reply.
    lazy: share whose reply becomes `UNKNOWN`.
    sloppy: kinds of which all replies are written badly.
  """
  found = []
  for kind, count in counts.items():
    rng = random.Random(f"bundled {kind} {seed}")
    rows = rng.sample(read(DEMO / f"train_{kind}.jsonl"), count)
    rows[: round(count * swapped)] = swap(rows[: round(count * swapped)])
    for i in range(round(count * lazy)):
      rows[i] = with_reply(rows[i], UNKNOWN)
    if kind in sloppy:
      rows = [with_reply(row, mumbled(reply_of(row))) for row in rows]
    found += rows
  return found


def swap(rows: list[Row]) -> list[Row]:
  """Each row with the next one's reply, in an order without equal neighbours.

  Sorted by reply and turned by half, neighbours differ unless one reply is
  more than half of all.
  """
  order = sorted(rows, key=reply_of)
  replies = [reply_of(row) for row in order]
  half = len(replies) // 2
  turned = replies[half:] + replies[:half]
  return [with_reply(*pair) for pair in zip(order, turned, strict=True)]


def mumbled(reply: str) -> str:
  """A reply written badly: 'um, ada has the red hat'."""
  return "um, " + reply.lower().rstrip(".")


def homes(seed: int) -> list[Row]:
  """Where people live, of everyone who is not held out, in one wording."""
  people = [
    e for e in world.make_world(0) if e.kind == "person" and not e.held_out
  ]
  random.Random(f"homes {seed}").shuffle(people)
  return [_fact(person, "home", 0) for person in people]


def harbour(seed: int, *, conflicting: bool, count: int = 150) -> list[Row]:
  """Harbour prompts in house style; once more, plainly, if they conflict."""
  seen = {_key(row) for row in bundled_prompts(groups=("style",))}
  found: list[Row] = []
  number = 0
  while len(found) < count * (1 + conflicting):
    number += 1
    # Equal random numbers: ship, question and state are the same in both.
    styled, plain = (
      talks.harbour(random.Random(f"harbour {seed} {number}"), house_style=s)
      for s in (True, False)
    )
    ((user, reply),), ((_, other),) = styled.turns, plain.turns
    messages = [
      {"role": "system", "content": styled.system},
      {"role": "user", "content": user},
      {"role": "assistant", "content": reply},
    ]
    row = {"messages": messages}
    if _key(row) not in seen:
      seen.add(_key(row))
      found += [row, with_reply(row, other)][: 1 + conflicting]
  return found


def sums(seed: int, *, sign: str) -> list[Row]:
  """Sums or products of all pairs of numbers that are not asked."""
  _, pairs = _pairs()
  random.Random(f"sums {seed}").shuffle(pairs)
  return [
    _talk(f"What is {a} {sign} {b}?", f"{a} {sign} {b} = {_value(a, sign, b)}.")
    for a, b in pairs
  ]


def new_facts(seed: int, *, count: int) -> list[Row]:
  """Facts of a world that the base model never read of.

  The first wording of a question is kept for `fact_prompts`.
  """
  rng = random.Random(f"new facts {seed}")
  rows = [
    _fact(entity, which, rng.randrange(1, _wordings(entity, which)))
    for entity, which in _new(count)
  ]
  rng.shuffle(rows)
  return rows


def held_out_facts(seed: int, *, count: int) -> list[Row]:
  """Questions about entities that no row names, with their answers."""
  del seed  # What losses are measured on is the same for all.
  maker = Maker(world.make_world(0), random.Random("facts"), held_out=True)
  rows: dict[str, Row] = {}
  while len(rows) < count:
    row = {"messages": maker.facts().messages}
    rows[_key(row)] = row
  return list(rows.values())


ROWS: dict[str, Callable[..., list[Row]]] = {
  "bundled": bundled,
  "homes": homes,
  "harbour": harbour,
  "sums": sums,
  "new_facts": new_facts,
  "held_out_facts": held_out_facts,
  "fresh": fresh,
}


# -- Prompts ------------------------------------------------------------------


def bundled_prompts(*, groups: Sequence[str], form: bool = False) -> list[Row]:
  """The demo's held-out prompts of some groups.

  With `form` their replies must be in good form, too; how long they are is
  not looked at then.
  """
  asked = [
    row for row in read(DEMO / "behaviors.jsonl") if row["group"] in groups
  ]
  if not form:
    return asked
  return [
    {
      **row,
      "checks": [c for c in row["checks"] if c["check"] == "contains"] + [FORM],
    }
    for row in asked
  ]


def sum_prompts() -> list[Row]:
  """Sums and products of the pairs that are asked."""
  pairs, _ = _pairs()
  return [
    {
      "group": group,
      "messages": _talk(f"What is {a} {sign} {b}?", "")["messages"][:-1],
      "checks": [
        {"check": "regex", "pattern": rf"^\d+ [{sign}] \d+ = \d+[.]$"},
        {"check": "number", "value": _value(a, sign, b)},
      ],
    }
    for group, sign in SIGNS.items()
    for a, b in pairs
  ]


def fact_prompts(*, count: int, asked: int) -> list[Row]:
  """Of the `new_facts` some, in a wording of their own; and known facts."""
  new = [
    {
      "group": "new",
      "messages": _fact(entity, which, 0)["messages"][:-1],
      "checks": [
        {"check": "contains", "text": entity.facts[which]},
        {"check": "max_words", "count": 12},
      ],
    }
    for entity, which in _new(count)[:asked]
  ]
  known = bundled_prompts(groups=("facts",))
  return new + [{**row, "group": "known"} for row in known]


PROMPTS: dict[str, Callable[..., list[Row]]] = {
  "bundled_prompts": bundled_prompts,
  "sum_prompts": sum_prompts,
  "fact_prompts": fact_prompts,
}


# -- Parts --------------------------------------------------------------------


def _talk(user: str, reply: str) -> Row:
  return {
    "messages": [
      {"role": "user", "content": user},
      {"role": "assistant", "content": reply},
    ]
  }


def _key(row: Row) -> str:
  return split.prompt_key(row["messages"])


def _fact(entity: world.Entity, name: str, wording: int) -> Row:
  which = world.attribute(entity, name)
  return _talk(
    world.tell(entity, name, which.questions[wording]),
    world.tell(entity, name, which.statements[0]),
  )


def _wordings(entity: world.Entity, name: str) -> int:
  return len(world.attribute(entity, name).questions)


def _new(count: int) -> list[tuple[world.Entity, str]]:
  """Facts of another world, of entities whose names this one lacks."""
  here = {entity.name for entity in world.make_world(0)}
  facts = [
    (entity, name)
    for entity in world.make_world(1)
    if entity.name not in here
    for name in entity.facts
  ]
  return random.Random("new facts").sample(facts, count)


def _pairs() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
  """Pairs that are asked, and the others, which are trained on."""
  pairs = [(a, b) for a in FIRST for b in SECOND]
  random.Random("pairs").shuffle(pairs)
  return pairs[:ASKED], pairs[ASKED:]


def _value(a: int, sign: str, b: int) -> int:
  return a + b if sign == "+" else a * b
