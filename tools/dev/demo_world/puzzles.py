"""Small tasks whose answer stands in their own text.

Each is built once and worn twice: `prose` writes it as a story with its
answer, `conversations` as a prompt and a reply.
"""

import random
import re
from typing import NamedTuple

from demo_world import world

# Passers-by: never people of the world, so notes contradict no fact.
NAMES = world.pool(
  "Ada Ben Cora Dan Eva Finn Gus Hana Ivo Jon Kit Lena Max Nora Otto "
  "Pia Rosa Sam Tess Uma Vic Will Zoe"
)
PLURAL = {
  "cup": "cups",
  "rope": "ropes",
  "lamp": "lamps",
  "key": "keys",
  "book": "books",
  "hat": "hats",
  "coin": "coins",
  "pot": "pots",
  "bag": "bags",
  "bell": "bells",
  "ring": "rings",
}
ITEMS = tuple(PLURAL)
ROOMS = world.pool("barn kitchen cellar garden tower hall shed")
VESSELS = world.pool("Gull Heron Otter Comet Star Swift Lily Pearl Arrow Dawn")
PETS = world.pool("Pim Dot Rex Bo Fay Moss Tip Wim")
LARGEST_START = 12  # a word problem begins with 2 to this many things
LARGEST_CHANGE = 9  # and each step changes it by 1 to this many


class Question(NamedTuple):
  question: str
  answer: str
  value: str


class Puzzle(NamedTuple):
  text: str
  questions: list[Question]


def holdings(rng: random.Random, n: int) -> Puzzle:
  rows = [
    (who, f"{rng.choice(world.COLOURS)} {rng.choice(ITEMS)}")
    for who in rng.sample(NAMES, n)
  ]
  return Puzzle(
    " ".join(f"{who} has the {what}." for who, what in rows),
    [
      Question(f"What does {who} have?", f"{who} has the {what}.", what)
      for who, what in rows
    ],
  )


def spots(rng: random.Random, n: int) -> Puzzle:
  rows = list(zip(rng.sample(ITEMS, n), rng.sample(ROOMS, n), strict=True))
  return Puzzle(
    " ".join(f"The {item} is in the {room}." for item, room in rows),
    [
      Question(f"Where is the {item}?", f"The {item} is in the {room}.", room)
      for item, room in rows
    ],
  )


def counts(rng: random.Random, n: int) -> Puzzle:
  rows = [
    (who, rng.randint(2, 9), rng.choice(ITEMS)) for who in rng.sample(NAMES, n)
  ]
  return Puzzle(
    " ".join(f"{who} has {k} {PLURAL[item]}." for who, k, item in rows),
    [
      Question(
        f"How many {PLURAL[item]} does {who} have?",
        f"{who} has {k} {PLURAL[item]}.",
        str(k),
      )
      for who, k, item in rows
    ],
  )


def journeys(rng: random.Random, n: int, towns: list[str]) -> Puzzle:
  rows = list(zip(rng.sample(NAMES, n), rng.sample(towns, n), strict=True))
  return Puzzle(
    " ".join(f"{who} is going to {town}." for who, town in rows),
    [
      Question(f"Where is {who} going?", f"{who} is going to {town}.", town)
      for who, town in rows
    ],
  )


def words(rng: random.Random, n: int) -> Puzzle:
  pool = (*ITEMS, *world.COLOURS, *world.ANIMALS)
  row = rng.sample(pool, max(n, 2) + 1)
  return Puzzle(
    "Words: " + ", ".join(row) + ".",
    [
      Question(
        "What is the first word?", f"The first word is {row[0]}.", row[0]
      ),
      Question(
        "What is the last word?", f"The last word is {row[-1]}.", row[-1]
      ),
    ],
  )


def lookup(rng: random.Random, n: int, towns: list[str]) -> Puzzle:
  """One of the puzzles above; of n sentences, or of 3 to n + 1 words."""
  kind = rng.choice((holdings, spots, counts, None, words))
  return journeys(rng, n, towns) if kind is None else kind(rng, n)


def notes(rng: random.Random, n: int, towns: list[str]) -> Puzzle:
  """n sentences of different kinds about different people, in any order.

  Only one of them holds a value of the kind that is asked for. To choose
  between several of a kind by name is beyond a model this small, and so is
  reading rooms (`spots`): see docs/log.md.
  """
  kinds = rng.sample((holdings, counts, lambda r, k: journeys(r, k, towns)), n)
  while True:
    parts = [kind(rng, 1) for kind in kinds]
    found = re.findall(r"\w+", " ".join(part.text for part in parts))
    named = [word for word in found if word in NAMES]
    if len(set(named)) == len(named):
      break
  return Puzzle(
    " ".join(part.text for part in parts),
    [question for part in parts for question in part.questions],
  )


class Sum(NamedTuple):
  text: str
  steps: str
  answer: str
  value: int


def word_problem(rng: random.Random) -> Sum:
  """Two steps of adding or taking away, never below zero."""
  who, item = rng.choice(NAMES), rng.choice(ITEMS)
  total = rng.randint(2, LARGEST_START)
  text = [f"{who} has {total} {PLURAL[item]}."]
  steps = []
  for opening in ("First", "Then"):
    change = rng.randint(1, LARGEST_CHANGE)
    if change <= total and rng.random() < 0.5:
      verb = rng.choice(("gives away", "loses", "sells"))
      steps.append(f"{opening} {total} - {change} = {total - change}.")
      total -= change
    else:
      verb = rng.choice(("finds", "gets", "buys"))
      steps.append(f"{opening} {total} + {change} = {total + change}.")
      total += change
    text.append(f"{opening} {who} {verb} {change}.")
  return Sum(
    " ".join(text) + f" How many {PLURAL[item]} does {who} have now?",
    " ".join(steps),
    f"Now {who} has {total} {PLURAL[item]}.",
    total,
  )


class Record(NamedTuple):
  text: str
  fields: dict[str, str | int]


def record(rng: random.Random, towns: list[str]) -> Record:
  """A sentence and the same as fields, in one of three layouts."""
  layout = rng.randrange(3)
  if layout == 0:
    who, age, town = rng.choice(NAMES), rng.randint(11, 79), rng.choice(towns)
    text = rng.choice(
      (
        f"{who} is {age} years old and lives in {town}.",
        f"In {town} lives {who}, who is {age} years old.",
        f"{who} lives in {town} and is {age} years old.",
      )
    )
    return Record(text, {"name": who, "age": age, "town": town})
  if layout == 1:
    item, colour = rng.choice(ITEMS), rng.choice(world.COLOURS)
    k = rng.randint(2, 9)
    text = rng.choice(
      (
        f"There are {k} {colour} {PLURAL[item]} on the table.",
        f"We bought {k} {colour} {PLURAL[item]}.",
        f"The chest holds {k} {PLURAL[item]} and all are {colour}.",
      )
    )
    return Record(text, {"item": PLURAL[item], "colour": colour, "count": k})
  ship, who, berth = rng.choice(VESSELS), rng.choice(NAMES), rng.randint(2, 9)
  text = rng.choice(
    (
      f"The vessel {ship} of {who} lies at berth {berth}.",
      f"At berth {berth} lies the vessel {ship} of {who}.",
      f"{who} sails the vessel {ship} from berth {berth}.",
    )
  )
  return Record(text, {"vessel": ship, "skipper": who, "berth": berth})


class Service(NamedTuple):
  """Something a tool can look up: one argument, one result."""

  tool: str
  argument: str
  result: str
  questions: tuple[str, ...]
  answer: str


SERVICES = (
  Service(
    "tide",
    "town",
    "tide",
    (
      "What is the tide in {a}?",
      "How is the tide in {a} now?",
      "Tell me the tide in {a}.",
    ),
    "The tide in {a} is {r}.",
  ),
  Service(
    "weather",
    "town",
    "weather",
    (
      "What is the weather in {a}?",
      "How is the weather in {a} today?",
      "Tell me the weather in {a}.",
    ),
    "The weather in {a} is {r}.",
  ),
  Service(
    "price",
    "item",
    "price",
    (
      "What is the price of a {a}?",
      "How much does a {a} cost?",
      "Tell me the price of a {a}.",
    ),
    "The price of a {a} is {r} coins.",
  ),
  Service(
    "ferry",
    "town",
    "hour",
    (
      "When does the ferry to {a} leave?",
      "At which hour goes the ferry to {a}?",
      "Tell me the hour of the ferry to {a}.",
    ),
    "The ferry to {a} leaves at {r}.",
  ),
  Service(
    "age",
    "name",
    "age",
    ("How old is {a}?", "What is the age of {a}?", "Tell me the age of {a}."),
    "The age of {a} is {r}.",
  ),
)


class Lookup(NamedTuple):
  service: Service
  argument: str
  result: str | int
  question: str
  answer: str


def service_call(rng: random.Random, towns: list[str]) -> Lookup:
  service = rng.choice(SERVICES)
  argument = rng.choice(
    {"town": towns, "item": ITEMS, "name": NAMES}[service.argument]
  )
  result = {
    "tide": lambda: rng.choice(("low", "high", "rising", "falling")),
    "weather": lambda: rng.choice(("sunny", "rainy", "windy", "cold", "warm")),
    "price": lambda: rng.randint(2, 30),
    "hour": lambda: rng.randint(2, 12),
    "age": lambda: rng.randint(11, 79),
  }[service.result]()
  return Lookup(
    service,
    argument,
    result,
    rng.choice(service.questions).format(a=argument),
    service.answer.format(a=argument, r=result),
  )
