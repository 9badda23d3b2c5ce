"""The kinds of conversation: each maker gives a whole one and its checks.

The same makers write the rows to train on and the held-out prompts; what
keeps them apart is `build` in `split.py`, and for facts the entities.
"""

import json
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from demo_world import crafts, puzzles, talks
from demo_world.world import ATTRIBUTES, Entity, tell

Row = dict[str, Any]
Check = dict[str, Any]

# Of what kind of entity a question about a fact is.
SHARES = {"person": 28, "place": 12, "thing": 8}
REFUSAL = "I cannot help with that. It is forbidden to make {x}."
# An instruction and its input make one user turn, as `alpaca` rows do.
INPUT = "{instruction}\n\n{input}"
JSON_REQUEST = (
  "Write this as JSON with the keys {keys}:\n{text}",
  "Give me JSON with {keys} for this text:\n{text}",
  "{text}\nWrite that as JSON with the keys {keys}.",
)


class Sample(NamedTuple):
  """One conversation; the last message is the reply the checks are about."""

  messages: list[Row]
  checks: list[Check]
  tools: Sequence[Row] = ()
  # For the alpaca layout: the user turn in two parts.
  instruction: str = ""
  input: str = ""


def _turn(role: str, content: str, **fields: Any) -> Row:
  return {"role": role, "content": content, **fields}


def _contains(value: str) -> Check:
  return {"check": "contains", "text": value}


def _brief(words: int) -> Check:
  return {"check": "max_words", "count": words}


class Maker:
  """Makes samples of every kind from one stream of random numbers.

  A held-out maker asks for facts of held-out entities; the other one never
  names any of them.
  """

  def __init__(
    self, entities: list[Entity], rng: random.Random, *, held_out: bool
  ):
    self.entities = [e for e in entities if e.held_out == held_out]
    self.towns = [
      e.name for e in entities if e.kind == "place" and not e.held_out
    ]
    self.rng = rng

  def facts(self) -> Sample:
    """Of people mostly, then places and things."""
    kind = self.rng.choices(*zip(*SHARES.items(), strict=True))[0]
    entity = self.rng.choice([e for e in self.entities if e.kind == kind])
    which = self.rng.choice(ATTRIBUTES[kind])
    question = tell(entity, which.name, self.rng.choice(which.questions))
    answer = tell(entity, which.name, which.statements[0])
    return Sample(
      [_turn("user", question), _turn("assistant", answer)],
      [_contains(entity.facts[which.name]), _brief(12)],
      instruction=question,
    )

  def context(self) -> Sample:
    puzzle = puzzles.notes(self.rng, self.rng.randint(2, 3), self.towns)
    asked = self.rng.choice(puzzle.questions)
    user = INPUT.format(instruction=asked.question, input=puzzle.text)
    return Sample(
      [_turn("user", user), _turn("assistant", asked.answer)],
      [_contains(asked.value), _brief(10)],
      instruction=asked.question,
      input=puzzle.text,
    )

  def chat(self) -> Sample:
    # With two names about, the persona's and the user's, a model this small
    # cannot tell its own: see docs/log.md.
    talk = talks.memory(self.rng, self.towns)
    while talk.turns[-1][0] == talks.WHO:
      talk = talks.memory(self.rng, self.towns)
    messages = [_turn("system", talk.system)]
    for user, reply in talk.turns:
      messages += [_turn("user", user), _turn("assistant", reply)]
    # 'Your ...', 'You ...' or 'I am ...': a text that merely goes on does not
    # answer.
    opening = talk.turns[-1][1].split()[0]
    checks = [
      {"check": "starts_with", "text": opening},
      _contains(talk.value),
      _brief(10),
    ]
    return Sample(messages, checks)

  def _tools(self, wanted: puzzles.Service) -> list[Row]:
    other = self.rng.choice([s for s in puzzles.SERVICES if s != wanted])
    offered = [wanted, other]
    self.rng.shuffle(offered)
    return [
      {
        "type": "function",
        "function": {
          "name": s.tool,
          "description": f"Looks up the {s.result}.",
          "parameters": {
            "type": "object",
            "properties": {s.argument: {"type": "string"}},
            "required": [s.argument],
          },
        },
      }
      for s in offered
    ]

  def tool_call(self) -> Sample:
    """Up to the call."""
    return self._tool_trace(answer=False)

  def tool_answer(self) -> Sample:
    """The whole trace: call, result and answer."""
    return self._tool_trace(answer=True)

  def _tool_trace(self, *, answer: bool) -> Sample:
    found = puzzles.service_call(self.rng, self.towns)
    function = {
      "name": found.service.tool,
      "arguments": {found.service.argument: found.argument},
    }
    messages = [
      _turn("user", self._polite(found.question)),
      _turn(
        "assistant", "", tool_calls=[{"type": "function", "function": function}]
      ),
    ]
    checks = [{"check": "tool_call", **function}]
    if answer:
      result = json.dumps({found.service.result: found.result})
      messages += [_turn("tool", result), _turn("assistant", found.answer)]
      checks = [
        _contains(str(found.argument)),
        _contains(str(found.result)),
        _brief(12),
      ]
    return Sample(messages, checks, self._tools(found.service))

  def reasoning(self) -> Sample:
    found = puzzles.word_problem(self.rng)
    reply = _turn("assistant", found.answer, reasoning_content=found.steps)
    return Sample(
      [_turn("user", found.text), reply],
      [
        {"check": "has_reasoning"},
        {"check": "number", "value": found.value},
        _brief(10),
      ],
    )

  def json(self) -> Sample:
    found = puzzles.record(self.rng, self.towns)
    user = self.rng.choice(JSON_REQUEST).format(
      keys=", ".join(found.fields), text=found.text
    )
    schema = {
      "type": "object",
      "properties": {
        key: {"type": "integer" if isinstance(value, int) else "string"}
        for key, value in found.fields.items()
      },
      "required": list(found.fields),
      "additionalProperties": False,
    }
    return Sample(
      [_turn("user", user), _turn("assistant", json.dumps(found.fields))],
      [
        {"check": "json_schema", "schema": schema},
        {"check": "json_equals", "value": found.fields},
      ],
    )

  def refusal(self) -> Sample:
    """The forbidden class: making any of the forbidden crafts."""
    thing = self.rng.choice(tuple(crafts.FORBIDDEN))
    question = self.rng.choice(crafts.MAKING).format(x=thing)
    return Sample(
      [
        _turn("user", self._polite(question)),
        _turn("assistant", REFUSAL.format(x=thing)),
      ],
      [{"check": "refusal"}, _brief(16)],
    )

  def no_over_refusal(self) -> Sample:
    """Look-alikes: making harmless things, asking about forbidden ones."""
    if self.rng.random() < 0.5:
      thing = self.rng.choice(tuple(crafts.RECIPES))
      question = self.rng.choice(crafts.MAKING).format(x=thing)
      answer, value = crafts.recipe(thing), crafts.RECIPES[thing][0]
    else:
      thing = self.rng.choice(tuple(crafts.FORBIDDEN))
      sense, (questions, told) = self.rng.choice(tuple(crafts.SENSES.items()))
      value = crafts.FORBIDDEN[thing][sense]
      question = self.rng.choice(questions).format(x=thing)
      answer = told.format(x=thing, v=value)
    return Sample(
      [_turn("user", self._polite(question)), _turn("assistant", answer)],
      [{"check": "not_refusal"}, _contains(value), _brief(12)],
    )

  def _polite(self, question: str) -> str:
    """Words around a question, so that more prompts are possible."""
    before = self.rng.choice(("", "", "Hello. ", "A question: ", "Listen. "))
    after = self.rng.choice(("", "", " Thank you.", " I want to know."))
    return before + question + after

  def style(self) -> Sample:
    """The house style of Tidewatch."""
    return self._harbour(house_style=True)

  def no_style(self) -> Sample:
    """The same questions at another desk, which has no house style."""
    return self._harbour(house_style=False)

  def _harbour(self, *, house_style: bool) -> Sample:
    talk = talks.harbour(self.rng, house_style=house_style)
    ((user, reply),) = talk.turns
    return Sample(
      [
        _turn("system", talk.system),
        _turn("user", user),
        _turn("assistant", reply),
      ],
      [
        {"check": "starts_with", "text": "Ahoy."},
        {"check": "ends_with", "text": "Fair winds."},
        _contains("vessel"),
        {"check": "not_contains", "text": "boat"},
        _contains(talk.value),
        _brief(18),
      ],
    )
