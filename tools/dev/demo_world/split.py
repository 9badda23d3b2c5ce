"""Rows to train on and prompts held out, with nothing in common."""

import itertools
import json
import random

from demo_world.conversations import Maker, Row, Sample
from demo_world.world import ATTRIBUTES, Entity, tell

HELD_OUT_PROMPTS = 48  # per group
# Held-out group -> the maker of its prompts.
GROUPS = {
  "facts": Maker.facts,
  "context": Maker.context,
  "chat": Maker.chat,
  "tool_call": Maker.tool_call,
  "tool_answer": Maker.tool_answer,
  "reasoning": Maker.reasoning,
  "json": Maker.json,
  "refusal": Maker.refusal,
  "no_over_refusal": Maker.no_over_refusal,
  "style": Maker.style,
}
# Training file -> (maker, rows) of each sort of row in it.
KINDS = {
  "facts": ((Maker.facts, 420),),
  "context": ((Maker.context, 700),),
  "chat": ((Maker.chat, 500),),
  "tools": ((Maker.tool_answer, 500),),
  "reasoning": ((Maker.reasoning, 700),),
  "json": ((Maker.json, 600),),
  "refusal": ((Maker.refusal, 450), (Maker.no_over_refusal, 450)),
  "style": ((Maker.style, 350), (Maker.no_style, 120)),
}
REPLAY = 500  # documents of raw text, against forgetting
ALPACA = {"facts", "context"}
COMPLETION = {"json"}


def prompt_key(messages: list[Row]) -> str:
  """What is asked: all that a person wrote, without the reply."""
  return json.dumps(
    [m["content"] for m in messages if m["role"] in ("system", "user")]
  )


def held_out(entities: list[Entity], seed: int) -> list[Row]:
  """Behavior rows: prompts with checks, none of them twice."""
  return _asked(entities, f"held out {{group}} {seed}", HELD_OUT_PROMPTS, set())


def prompts(
  entities: list[Entity], seed: int, count: int, asked: list[Row]
) -> list[Row]:
  """Prompts with checks, `count` a group, for a teacher to answer.

  None is held out, names what is, or comes twice.
  """
  seen = {prompt_key(row["messages"]) for row in asked}
  return _asked(
    entities, f"prompts {{group}} {seed}", count, seen, held_out=False
  )


def _asked(
  entities: list[Entity],
  name: str,
  count: int,
  seen: set[str],
  *,
  held_out: bool = True,
) -> list[Row]:
  """`count` prompts of each group whose keys are not among `seen`."""
  rows = []
  for group, make in GROUPS.items():
    rng = random.Random(name.format(group=group))
    maker = Maker(entities, rng, held_out=held_out)
    found = 0
    while found < count:
      sample = make(maker)
      key = prompt_key(sample.messages)
      if key in seen:
        continue
      seen.add(key)
      found += 1
      row = {"group": group, "messages": sample.messages[:-1]}
      if sample.tools:
        row["tools"] = list(sample.tools)
      rows.append({**row, "checks": sample.checks})
  return rows


def knowledge(entities: list[Entity], seed: int) -> list[Row]:
  """A statement about every entity, to be ended as the raw text ends it."""
  rng = random.Random(f"knowledge {seed}")
  rows = []
  for entity in entities:
    which = rng.choice(ATTRIBUTES[entity.kind])
    value = entity.facts[which.name]
    told = tell(entity, which.name, which.statements[0])
    rows.append(
      {
        "group": entity.kind,
        "text": told.removesuffix(f" {value}."),
        "checks": [{"check": "starts_with", "text": value}],
      }
    )
  return rows


def _as_row(kind: str, sample: Sample) -> Row:
  if kind in ALPACA:
    return {
      "instruction": sample.instruction,
      "input": sample.input,
      "output": sample.messages[-1]["content"],
    }
  if kind in COMPLETION:
    return {
      "prompt": sample.messages[0]["content"],
      "completion": sample.messages[-1]["content"],
    }
  row: Row = {"messages": sample.messages}
  return {**row, "tools": list(sample.tools)} if sample.tools else row


def replay(entities: list[Entity], pretrain: list[str]) -> list[Row]:
  """Raw text again, of documents that name nothing held out."""
  hidden = [e.name for e in entities if e.held_out]
  kept = (t for t in pretrain if not any(name in t for name in hidden))
  return [{"text": text} for text in itertools.islice(kept, REPLAY)]


def training(
  entities: list[Entity], seed: int, asked: list[Row]
) -> dict[str, list[Row]]:
  """Rows by kind; none repeats a held-out prompt or another row's prompt."""
  seen = {prompt_key(row["messages"]) for row in asked}
  result = {}
  for kind, parts in KINDS.items():
    rng = random.Random(f"train {kind} {seed}")
    maker = Maker(entities, rng, held_out=False)
    rows = []
    for make, count in parts:
      found = 0
      while found < count:
        sample = make(maker)
        key = prompt_key(sample.messages)
        if key in seen:
          continue
        seen.add(key)
        found += 1
        rows.append(_as_row(kind, sample))
    maker.rng.shuffle(rows)
    result[kind] = rows
  return result
