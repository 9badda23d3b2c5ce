"""Fresh conversations of the demo's world, each with the checks of its reply.

What a teacher is asked, and, with the reply that the maker wrote, what the
same prompts teach without one.
"""

import random
from collections.abc import Mapping
from pathlib import Path

import sft_jax
from demo_world import split, world
from demo_world.conversations import Maker, Row
from sft_jax.data.formats import formats
from sft_jax.data.readers import files

DEMO = Path(sft_jax.__file__).parent / "demo"


def fresh(seed: int, *, counts: Mapping[str, int]) -> list[Row]:
  """So many conversations of each group; fewer are the first of more.

  No prompt is held out, is one of the demo's rows, or comes twice.

  Args:
    counts: by group; each is also a file of the demo's rows.
  """
  entities = world.make_world(0)
  found = []
  for group, count in counts.items():
    seen = _asked(DEMO / "behaviors.jsonl")
    seen |= _asked(DEMO / f"train_{group}.jsonl")
    rng = random.Random(f"fresh {group} {seed}")
    maker = Maker(entities, rng, held_out=False)
    rows: dict[str, Row] = {}
    while len(rows) < count:
      sample = split.GROUPS[group](maker)
      key = split.prompt_key(sample.messages)
      if key not in seen:
        made = {"messages": sample.messages, "checks": sample.checks}
        rows.setdefault(key, {"group": group, **made})
    found += rows.values()
  return found


def _asked(path: Path) -> set[str]:
  """Keys of the prompts of rows of any format."""
  talks = []
  for where, row in files.read_rows(path):
    if "checks" in row:
      talks.append(row["messages"])
    else:
      turns = formats.to_conversation(row, source=where).messages
      talks.append([{"role": m.role, "content": m.content} for m in turns])
  return {split.prompt_key(messages) for messages in talks}
