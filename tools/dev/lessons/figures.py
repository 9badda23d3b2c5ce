"""Figures of a finished run: what lessons compare."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from sft_jax.evals import behaviors
from sft_jax.inference import generate
from sft_jax.training.build import load_run


def of_run(workdir: Path) -> dict[str, float]:
  """All figures of a run, by the names they have in metrics.jsonl.

  With them 'behavior/GROUP/gap', the share of right form less that of right
  content.
  """
  after = json.loads((workdir / "evals" / "after.json").read_text("utf-8"))
  scores = behaviors.Scores.from_json(after.pop("behaviors"))
  values = {**after, **scores.metrics()}
  for name in [n for n in values if n.endswith("/format")]:
    group = name.removesuffix("/format")
    if f"{group}/content" in values:
      values[f"{group}/gap"] = values[name] - values[f"{group}/content"]
  return values


def agreement(texts: Sequence[Sequence[str]]) -> float:
  """Share of equal pairs among a prompt's samples, over all prompts.

  agreement([["a", "a", "b"]]) is 1 / 3: one pair of three.

  Args:
    texts: of each prompt, two or more replies.
  """
  equal = total = 0
  for group in texts:
    pairs = list(itertools.combinations(group, 2))
    equal += sum(a == b for a, b in pairs)
    total += len(pairs)
  return equal / total


def sample(
  workdir: Path, samples: int, *, seed: int, max_new_tokens: int
) -> list[list[str]]:
  """Replies to each prompt of a run, so many, drawn at temperature 1."""
  asked = load_run.load(workdir, log=lambda line: None)
  items = behaviors.load(workdir / "prompts.jsonl")
  found = generate.generate(
    asked.model,
    asked.params,
    asked.tokenizer,
    [item.prompt for item in items for _ in range(samples)],
    max_new_tokens=max_new_tokens,
    temperature=1.0,
    seed=seed,
    options=asked.options,
  )
  texts = iter(reply.text for reply in found)
  return [list(itertools.islice(texts, samples)) for _ in items]
