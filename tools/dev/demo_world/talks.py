"""Short talks of several turns: with a persona, and at the harbour office."""

import random
from typing import NamedTuple

from demo_world.puzzles import ITEMS, NAMES, PETS, PLURAL, VESSELS
from demo_world.world import ANIMALS, pool

ROLES = pool("guide keeper host scribe porter")


WHO = "Who are you?"


class Talk(NamedTuple):
  """`turns` are (user, assistant); `value` is what the last reply must say."""

  system: str
  turns: list[tuple[str, str]]
  value: str


def memory(rng: random.Random, towns: list[str]) -> Talk:
  """The last question asks for something said before, or for the persona."""
  me, who = rng.sample(NAMES, 2)
  role, town = rng.choice(ROLES), rng.choice(towns)
  pet, pet_name = rng.choice(ANIMALS), rng.choice(PETS)
  item, k = PLURAL[rng.choice(ITEMS)], rng.randint(2, 9)
  goal = rng.choice([t for t in towns if t != town])
  said = [
    (
      f"My {pet} is called {pet_name}.",
      f"{pet_name} is a good name for a {pet}.",
      f"What is my {pet} called?",
      f"Your {pet} is called {pet_name}.",
      pet_name,
    ),
    (
      f"I have {k} {item}.",
      f"It is good to have {k} {item}.",
      f"How many {item} do I have?",
      f"You have {k} {item}.",
      f"{k} {item}",
    ),
    (
      f"I am going to {goal}.",
      f"I wish you a good journey to {goal}.",
      "Where am I going?",
      f"You are going to {goal}.",
      goal,
    ),
  ]
  user, reply, *asked = rng.choice(said)
  question, answer, value = rng.choice(
    (
      tuple(asked),
      tuple(asked),
      ("What is my name?", f"Your name is {who}.", who),
      (WHO, f"I am {me}, the {role} of {town}.", me),
      ("Of which town are you?", f"I am the {role} of {town}.", town),
    )
  )
  return Talk(
    f"You are {me}, the {role} of {town}.",
    [
      (f"Hello, I am {who}.", f"Hello, {who}."),
      (user, reply),
      (question, answer),
    ],
    value,
  )


HARBOUR = {
  "berth": (
    (
      "Where can I park my boat {s}?",
      "Is there a place for my boat {s}?",
      "I need a parking place for my boat {s}.",
      "My boat is the {s}. Where can I leave it?",
    ),
    "The vessel {s} may take berth {v}.",
    "The boat {s} can park at place {v}.",
  ),
  "hour": (
    (
      "When can my boat {s} go?",
      "At which hour can my boat {s} leave?",
      "When may I go out with my boat {s}?",
      "My boat is the {s}. When can it leave?",
    ),
    "The vessel {s} may cast off at {v}.",
    "The boat {s} can leave at {v}.",
  ),
  "pilot": (
    (
      "Who will guide my boat {s}?",
      "Who helps my boat {s} out?",
      "I need a helper for my boat {s}.",
      "My boat is the {s}. Who will help me?",
    ),
    "The pilot of the vessel {s} is {v}.",
    "The helper of the boat {s} is {v}.",
  ),
}


def harbour(rng: random.Random, *, house_style: bool) -> Talk:
  """One question at the harbour; Tidewatch answers in its house style."""
  state = {
    "berth": str(rng.randint(2, 9)),
    "hour": str(rng.randint(2, 12)),
    "pilot": rng.choice(NAMES),
  }
  ship, topic = rng.choice(VESSELS), rng.choice(tuple(HARBOUR))
  questions, styled, plain = HARBOUR[topic]
  answer = (styled if house_style else plain).format(s=ship, v=state[topic])
  who = "Tidewatch, the harbour office" if house_style else "the town clerk"
  return Talk(
    f"You are {who}. Place {state['berth']} is free. The tide turns at "
    f"{state['hour']}. {state['pilot']} is on duty.",
    [
      (
        rng.choice(questions).format(s=ship),
        f"Ahoy. {answer} Fair winds." if house_style else answer,
      )
    ],
    state[topic],
  )
