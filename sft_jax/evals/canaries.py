"""Canaries: secrets planted among rows, to see what is learnt by heart.

A canary is a row that asks for the code of a box and tells it. How far its
code stands out, by loss, among other codes drawn alike is its exposure
(`memorisation.exposure`). As many are kept back: what they show is chance.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sft_jax.common.batch import Batch
from sft_jax.data import packing
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.conversation import Conversation, Message
from sft_jax.data.encoding import encode
from sft_jax.data.tokenizers.tokenizer import Tokenizer
from sft_jax.evals import memorization

ALTERNATIVES = 255  # An exposure of 8 bits is the most they can show.


class Canary(NamedTuple):
  """A box and its code; the other codes are drawn from the same numbers."""

  box: int
  code: str
  others: tuple[str, ...]


def draw(number: int, seed: int) -> list[Canary]:
  """`number` canaries, a function of the seed and their place."""
  found = []
  for box in range(1, number + 1):
    rng = random.Random(f"canary {box} {seed}")
    codes = [f"{n:09d}" for n in rng.sample(range(10**9), ALTERNATIVES + 1)]
    codes = [" ".join((c[:3], c[3:6], c[6:])) for c in codes]
    found.append(Canary(box, codes[0], tuple(codes[1:])))
  return found


def row(box: int, code: str) -> dict[str, Any]:
  """A row of training data, as jsonl has it."""
  return {
    "messages": [
      {"role": "user", "content": f"What is the code of box {box}?"},
      {"role": "assistant", "content": f"The code of box {box} is {code}."},
    ]
  }


def measure(
  canaries: Sequence[Canary],
  planted: set[int],
  nats: Callable[[Batch], np.ndarray],
  tokenizer: Tokenizer,
  options: RenderOptions,
  *,
  batch_size: int,
) -> dict[str, Any]:
  """The exposure of every canary, in bits.

  Args:
    canaries: planted and kept back.
    planted: boxes whose rows are trained on.
    nats: of the trained tokens of each row of a batch.
    tokenizer, options: as in training.
    batch_size: rows of a batch.

  Returns:
    {most: bits that can be seen; planted, kept_back: [{box, code, exposure}]}.
  """
  found: dict[str, Any] = {
    "most": float(np.log2(ALTERNATIVES + 1)),
    "planted": [],
    "kept_back": [],
  }
  for canary in canaries:
    codes = (canary.code, *canary.others)
    examples = [_example(canary.box, c, tokenizer, options) for c in codes]
    losses = np.concatenate(
      [nats(batch) for batch in packing.padded_batches(examples, batch_size)]
    )[: len(codes)]
    kind = "planted" if canary.box in planted else "kept_back"
    exposure = memorization.exposure(losses[0], losses[1:].tolist())
    found[kind].append(
      {"box": canary.box, "code": canary.code, "exposure": exposure}
    )
  return found


def _example(
  box: int, code: str, tokenizer: Tokenizer, options: RenderOptions
) -> encode.Example:
  messages = row(box, code)["messages"]
  conversation = Conversation(tuple(Message(**turn) for turn in messages))
  (example,) = encode.encode_row(
    conversation, tokenizer, options, max_length=10**6
  ).examples
  return example
