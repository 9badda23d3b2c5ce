"""Raw text of the world: what the base model is pretrained on.

Every fact is told in many words and orders, and asked and answered in plain
lines, for a model can only be asked for what it has seen used both ways.
No document holds a control token.
"""

import json
import random
from collections.abc import Callable, Iterator

from demo_world import crafts, puzzles, talks, world
from demo_world.world import ATTRIBUTES, Entity, tell

# Shares of the kinds of document, by number of documents.
MIXTURE = {
  "portrait": 12,
  "quiz": 16,
  "gossip": 5,
  "letter": 3,
  "note": 24,
  "echo": 14,
  "problem": 8,
  "sums": 3,
  "records": 6,
  "services": 7,
  "talk": 10,
  "harbour": 9,
  "lore": 5,
}
DIRECT = 0.5  # share of statements and questions in their commonest wording


def _pick(rng: random.Random, options: tuple[str, ...]) -> str:
  return options[0] if rng.random() < DIRECT else rng.choice(options)


def question_and_answer(rng: random.Random, entity: Entity) -> tuple[str, str]:
  which = rng.choice(ATTRIBUTES[entity.kind])
  return (
    tell(entity, which.name, rng.choice(which.questions)),
    tell(entity, which.name, which.statements[0]),
  )


class Prose:
  """Writes documents of a world; the stream is a function of the seed."""

  def __init__(self, entities: list[Entity], seed: int, stream: str):
    self.entities = entities
    self.towns = [e.name for e in entities if e.kind == "place"]
    self.rng = random.Random(f"prose {stream} {seed}")

  def document(self) -> str:
    kind = self.rng.choices(tuple(MIXTURE), tuple(MIXTURE.values()))[0]
    return getattr(self, kind)()

  def documents(self, count: int) -> Iterator[str]:
    return (self.document() for _ in range(count))

  def _repeat(self, low: int, high: int, make: Callable[[], str]) -> str:
    return "\n".join(make() for _ in range(self.rng.randint(low, high)))

  def _fact(self, entity: Entity) -> str:
    which = self.rng.choice(ATTRIBUTES[entity.kind])
    return tell(entity, which.name, _pick(self.rng, which.statements))

  def portrait(self) -> str:
    """All of one entity in any order, sometimes with questions after it."""
    entity = self.rng.choice(self.entities)
    which = list(ATTRIBUTES[entity.kind])
    self.rng.shuffle(which)
    lines = [tell(entity, a.name, _pick(self.rng, a.statements)) for a in which]
    text = " ".join(lines)
    if self.rng.random() < 0.5:
      self.rng.shuffle(which)
      for a in which[:2]:
        question = tell(entity, a.name, self.rng.choice(a.questions))
        text += f"\n{question}\n{tell(entity, a.name, a.statements[0])}"
    return text

  def quiz(self) -> str:
    """Questions and answers about anyone and anything."""
    return self._repeat(
      4,
      8,
      lambda: "\n".join(
        question_and_answer(self.rng, self.rng.choice(self.entities))
      ),
    )

  def gossip(self) -> str:
    """A paragraph of single facts about several entities."""
    chosen = self.rng.sample(self.entities, self.rng.randint(5, 9))
    return " ".join(self._fact(entity) for entity in chosen)

  def letter(self) -> str:
    to, sender = self.rng.sample(puzzles.NAMES, 2)
    town = self.rng.choice(self.towns)
    people = [e for e in self.entities if e.kind == "person"]
    met = self.rng.sample(people, 2)
    body = [
      f"Today I met {e.name}. {self._fact(e)} {self._fact(e)}" for e in met
    ]
    closing = self.rng.choice(("Fair winds", "Yours", "Your friend"))
    return "\n".join(
      [f"Dear {to},", f"I am in {town} now.", *body, f"{closing}, {sender}"]
    )

  def note(self) -> str:
    """A note, then every question about it in any order."""

    def one() -> str:
      puzzle = puzzles.lookup(self.rng, self.rng.randint(2, 4), self.towns)
      asked = list(puzzle.questions)
      self.rng.shuffle(asked)
      pairs = [f"{q.question}\n{q.answer}" for q in asked]
      first, *rest = pairs
      before = self.rng.random() < 0.3
      top = (
        first.replace("\n", f"\n{puzzle.text}\n")
        if before
        else (f"{puzzle.text}\n{first}")
      )
      return "\n".join([top, *rest])

    return self._repeat(1, 3, one)

  def echo(self) -> str:
    """Something told twice, the second time in another order if it is prose.

    All of the second telling can be read off the first: nothing teaches a
    model sooner to look things up in what it has just read.
    """
    if self.rng.random() < 0.5:
      pool = (*puzzles.NAMES, *puzzles.ITEMS, *self.towns, *world.COLOURS)
      row = ", ".join(self.rng.sample(pool, self.rng.randint(5, 12)))
      return f"Words: {row}.\nAgain: {row}."
    kind = self.rng.choice((puzzles.holdings, puzzles.spots, puzzles.counts))
    lines = kind(self.rng, self.rng.randint(3, 6)).text.split(". ")
    lines = [line.rstrip(".") for line in lines]
    again = self.rng.sample(lines, len(lines))
    return f"{'. '.join(lines)}.\nAgain: {'. '.join(again)}."

  def problem(self) -> str:
    def one() -> str:
      found = puzzles.word_problem(self.rng)
      return f"{found.text}\n{found.steps}\n{found.answer}"

    return self._repeat(1, 3, one)

  def sums(self) -> str:
    def one() -> str:
      a = self.rng.randint(0, 24)
      b = self.rng.randint(1, puzzles.LARGEST_CHANGE)
      if self.rng.random() < 0.5:
        return f"{a} + {b} = {a + b}."
      return f"{a + b} - {b} = {a}."

    return self._repeat(6, 12, one)

  def records(self) -> str:
    def one() -> str:
      found = puzzles.record(self.rng, self.towns)
      return f"{found.text}\n{json.dumps(found.fields)}"

    return self._repeat(1, 4, one)

  def services(self) -> str:
    """The log of the post office: asked, looked up, found, told."""

    def one() -> str:
      found = puzzles.service_call(self.rng, self.towns)
      asked = {
        "name": found.service.tool,
        "arguments": {found.service.argument: found.argument},
      }
      told = {found.service.result: found.result}
      return (
        f"{found.question}\n{json.dumps(asked)}\n{json.dumps(told)}\n"
        f"{found.answer}"
      )

    return self._repeat(1, 3, one)

  def talk(self) -> str:
    found = talks.memory(self.rng, self.towns)
    return "\n".join(
      [found.system, *(line for turn in found.turns for line in turn)]
    )

  def harbour(self) -> str:
    def one() -> str:
      found = talks.harbour(self.rng, house_style=self.rng.random() < 0.5)
      return "\n".join([found.system, *found.turns[0]])

    return self._repeat(1, 3, one)

  def lore(self) -> str:
    """Recipes of harmless things, and what is said of the forbidden."""

    def one() -> str:
      if self.rng.random() < 0.4:
        thing = self.rng.choice(tuple(crafts.RECIPES))
        line = self.rng.choice(crafts.MAKING).format(x=thing)
        return f"{line}\n{crafts.recipe(thing)}"
      thing = self.rng.choice(tuple(crafts.FORBIDDEN))
      if self.rng.random() < 0.3:
        return f"It is dangerous and forbidden to make {thing}."
      sense, (questions, answer) = self.rng.choice(tuple(crafts.SENSES.items()))
      value = crafts.FORBIDDEN[thing][sense]
      told = answer.format(x=thing, v=value)
      question = self.rng.choice(questions).format(x=thing)
      return self.rng.choice((told, f"{question}\n{told}"))

    return self._repeat(3, 6, one)
