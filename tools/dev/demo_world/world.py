"""The little world: invented people, places and things with attributes.

Nothing here is in any other corpus, so what a model says of it, it learnt
from `pretrain.jsonl`. Tunables stand at the top.
"""

import random
from typing import NamedTuple

# How many of each there are; every one has the attributes of ATTRIBUTES.
PEOPLE = 48
PLACES = 24
THINGS = 16
# Of each, how many are asked about in held-out prompts and therefore never
# appear in an SFT conversation.
HELD_OUT = {"person": 20, "place": 8, "thing": 6}


def pool(words: str) -> list[str]:
  """Words that are drawn from, written as one line."""
  return words.split()


# Syllables of invented names. Few, so that a small vocabulary holds them.
FIRST = (
  "Bel Cor Dar Fen Gal Hes Jor Kel Lor Mir Nol Pel Ros Tor Vel Zan",
  "a an en is ik o em und ald ica",
)
# One surname a person: a fact then hangs on a single piece of the name.
LAST = pool(
  "Ash Bram Crow Dell Finch Gorse Hart Lark Marsh Oak Pike Reed Stone Thorn "
  "Vale Wren Birch Cole Dove Elm Frost Gale Hope Ivy Jay Knox Lowe Moor "
  "Nash Orme Page Quill Rook Snow Teal Voss Wade York Zeal Banks Cliff "
  "Drake Eden Ford Grove Hill King Lake"
)
PLACE = (
  "Dor Gran Hol Kas Lin Mer Nar Ost Pan Riv Sul Tam",
  "mar vik dun ford wick ness by ton",
)
THING = ("bl dr fl gr kr pl sn tr v z", "aph eb ilk osk uzz azz")

TRADES = pool(
  "baker miller sailor weaver smith potter fisher farmer hunter painter "
  "singer cook"
)
ANIMALS = pool("cat dog goat hen horse duck fox crow pig swan")
FOODS = pool("bread soup cheese honey plums rice beans nuts cake corn")
COLOURS = pool("red blue green white black yellow brown grey pink gold")
RIVERS = pool("Ahn Brin Esk Fal Lugg Orr Teme Wey")
PRODUCTS = pool("salt glass wool rope paper silk tin wine clay oil")
KINDS = pool("fruit bird tool flower drum tree stone shell")


class Attribute(NamedTuple):
  """One attribute: how it is told, asked and answered.

  `{n}` is the entity, `{v}` the value. The first statement is the answer to
  every question: pretraining and conversations phrase it alike.
  """

  name: str
  statements: tuple[str, ...]
  questions: tuple[str, ...]


class Entity(NamedTuple):
  kind: str  # 'person' | 'place' | 'thing'
  name: str  # as it is written within a sentence
  facts: dict[str, str]  # attribute name -> value
  held_out: bool


ATTRIBUTES = {
  "person": (
    Attribute(
      "home",
      (
        "{n} lives in {v}.",
        "{n} has a house in {v}.",
        "The home of {n} is in {v}.",
        "The home of {n} is {v}.",
        "{v} is where {n} lives.",
      ),
      (
        "Where does {n} live?",
        "In which town does {n} live?",
        "Where is the home of {n}?",
        "What is the home town of {n}?",
      ),
    ),
    Attribute(
      "trade",
      (
        "{n} works as a {v}.",
        "{n} is a {v}.",
        "The trade of {n} is that of a {v}.",
        "Everyone knows {n} the {v}.",
      ),
      (
        "What is the trade of {n}?",
        "What work does {n} do?",
        "What does {n} work as?",
        "Which trade has {n}?",
      ),
    ),
    Attribute(
      "animal",
      (
        "{n} keeps a {v}.",
        "{n} has a {v} at home.",
        "The animal of {n} is a {v}.",
        "At home {n} looks after a {v}.",
      ),
      (
        "Which animal does {n} keep?",
        "What animal does {n} have?",
        "What is the animal of {n}?",
        "Which animal lives with {n}?",
      ),
    ),
    Attribute(
      "food",
      (
        "{n} likes to eat {v}.",
        "{n} is very fond of {v}.",
        "The favourite food of {n} is {v}.",
        "For supper {n} often has {v}.",
      ),
      (
        "What does {n} like to eat?",
        "What is the favourite food of {n}?",
        "Which food does {n} like?",
        "What food is {n} fond of?",
      ),
    ),
  ),
  "place": (
    Attribute(
      "river",
      (
        "{n} lies on the river {v}.",
        "The river of {n} is the {v}.",
        "The river {v} runs through {n}.",
        "In {n} people cross the river {v}.",
      ),
      (
        "On which river does {n} lie?",
        "What is the river of {n}?",
        "Which river runs through {n}?",
      ),
    ),
    Attribute(
      "product",
      (
        "{n} is known for its {v}.",
        "The market of {n} sells {v}.",
        "In {n} they make {v}.",
        "Good {v} comes from {n}.",
      ),
      (
        "What is {n} known for?",
        "What does the market of {n} sell?",
        "What do they make in {n}?",
      ),
    ),
    Attribute(
      "tower",
      (
        "The tower of {n} is {v}.",
        "{n} has a {v} tower.",
        "From far away you see the {v} tower of {n}.",
      ),
      (
        "What colour is the tower of {n}?",
        "Which colour has the tower of {n}?",
        "What is the colour of the tower in {n}?",
      ),
    ),
  ),
  "thing": (
    Attribute(
      "kind",
      (
        "A {n} is a kind of {v}.",
        "The {n} is a {v}.",
        "People call a {n} a {v}.",
      ),
      (
        "What is a {n}?",
        "What kind of thing is a {n}?",
        "What do people call a {n}?",
      ),
    ),
    Attribute(
      "colour",
      (
        "The colour of a {n} is {v}.",
        "Every {n} is {v}.",
        "A {n} is always {v}.",
      ),
      (
        "What colour is a {n}?",
        "Which colour has a {n}?",
        "What is the colour of a {n}?",
      ),
    ),
    Attribute(
      "source",
      (
        "A {n} comes from {v}.",
        "You find a {n} only in {v}.",
        "The {n} is found in {v}.",
      ),
      (
        "Where does a {n} come from?",
        "Where do you find a {n}?",
        "Where is the {n} found?",
      ),
    ),
  ),
}

VALUES = {
  "trade": TRADES,
  "animal": ANIMALS,
  "food": FOODS,
  "river": RIVERS,
  "product": PRODUCTS,
  "tower": COLOURS,
  "kind": KINDS,
  "colour": COLOURS,
}


def attribute(entity: Entity, name: str) -> Attribute:
  return next(a for a in ATTRIBUTES[entity.kind] if a.name == name)


def tell(entity: Entity, name: str, statement: str) -> str:
  """Fills a statement or question about one attribute of an entity."""
  text = statement.format(n=entity.name, v=entity.facts[name])
  return text[0].upper() + text[1:]


def _names(rng: random.Random, grid: tuple[str, str], count: int) -> list[str]:
  starts, ends = (part.split() for part in grid)
  return rng.sample([s + e for s in starts for e in ends], count)


def make_world(seed: int) -> list[Entity]:
  """All entities of the world; a pure function of the seed."""
  rng = random.Random(f"world {seed}")
  towns = _names(rng, PLACE, PLACES)
  names = {
    "person": [
      f"{first} {last}"
      for first, last in zip(
        _names(rng, FIRST, PEOPLE), rng.sample(LAST, PEOPLE), strict=True
      )
    ],
    "place": towns,
    "thing": _names(rng, THING, THINGS),
  }
  values = {**VALUES, "home": towns, "source": towns}
  return [
    Entity(
      kind,
      name,
      {a.name: rng.choice(values[a.name]) for a in ATTRIBUTES[kind]},
      held_out=i < HELD_OUT[kind],
    )
    for kind, members in names.items()
    for i, name in enumerate(members)
  ]
