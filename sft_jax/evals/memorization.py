"""Memorization: what replies repeat of the training answers, and canaries.

Answers and replies are sequences of words, or token ids. A canary is a row that
asks for the code of a box and gives it. How far its code stands out, by loss,
among other codes drawn alike is its exposure. As many canaries are kept back:
what they show is chance.
"""

import bisect
import math
import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sft_jax.common.batch import Batch
from sft_jax.data import packing
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.conversation import Conversation, Message
from sft_jax.data.encoding import encode
from sft_jax.data.tokenizers.tokenizer import Tokenizer

Items = Sequence[Hashable]
GRAM = 4  # Words of the runs whose novelty is reported.


class Answers:
  """All runs of items that training answers hold, to look replies up in.

  A suffix array (Manber and Myers, 1990) of the answers as one text, in which
  each item is a character and \\0 ends an answer.
  """

  def __init__(self, answers: Iterable[Items]) -> None:
    signs = self._signs = dict[Hashable, str]()
    sign = lambda item: signs.setdefault(item, chr(len(signs) + 1))
    self._text = "".join("".join(map(sign, one)) + "\0" for one in answers)
    data = self._text.encode("utf-32-le", "surrogatepass")
    # By their first character, then by their first two, four, and so on.
    rank, known, size = np.frombuffer(data, np.uint32).astype(np.int64), 0, 1
    while known < len(rank):
      after = np.zeros_like(rank)
      after[:-size] = rank[size:] + 1
      found, rank = np.unique((rank << 32) + after, return_inverse=True)
      known, size = len(found), 2 * size
    self._suffixes = np.argsort(rank).tolist()

  def _hold(self, run: str) -> bool:
    key = lambda start: self._text[start : start + len(run)]
    at = bisect.bisect_left(self._suffixes, run, key=key)
    return at < len(self._suffixes) and key(self._suffixes[at]) == run

  def matches(self, reply: Items) -> list[int]:
    """For each item, the longest run that ends there and is in an answer.

    Answers([[1, 2, 3]]).matches([2, 3, 1, 9]) -> [1, 2, 1, 0]
    """
    text = "".join(self._signs.get(item, "\U0010ffff") for item in reply)
    held, found = 0, []
    for end in range(1, len(text) + 1):
      held += 1
      while held and not self._hold(text[end - held : end]):
        held -= 1
      found.append(held)
    return found

  def overlap(self, reply: Items) -> float:
    """The longest run shared with an answer, as a share of the reply: 1 is a
    reply repeated whole; of an empty reply it is 0."""
    return max(self.matches(reply)) / len(reply) if len(reply) else 0.0

  def novelty(self, reply: Items, n: int) -> float | None:
    """The share of the reply's runs of n items that are in no answer; None of a
    reply shorter than n."""
    held = self.matches(reply)[n - 1 :]
    return sum(x < n for x in held) / len(held) if held else None


def exposure(canary_loss: float, other_losses: Sequence[float]) -> float:
  """How far a planted canary stands out among alternatives, in bits.

      exposure = log2 |R| - log2 rank

  where R is the alternatives with the canary, and its rank by loss among them
  is 1 if none is lower (Carlini et al. 2019, arXiv:1802.08232, definition 2);
  ties count as lower. Of 1,023 random alternatives, 10 bits is the most that
  can be seen; of a canary never trained on 1.44, the mean of log2(|R| / rank).

  Raises ValueError: no alternatives, or a loss that is no number.
  """
  finite = all(map(math.isfinite, (canary_loss, *other_losses)))
  if not len(other_losses) or not finite:
    raise ValueError(
      f"exposure: got a loss of {canary_loss} and {len(other_losses)} others; "
      "expected finite losses of at least one alternative. Draw some."
    )
  rank = 1 + sum(loss <= canary_loss for loss in other_losses)
  return math.log2(len(other_losses) + 1) - math.log2(rank)


class Repeats(NamedTuple):
  """What some replies repeat of the training answers, in words."""

  replies: int  # How many there are, of one word or more.
  overlap: float  # Mean of `Answers.overlap`.
  whole: float  # Share of them that stand, whole, within a training answer.
  # Mean of `Answers.novelty`, of those of n words or more; None without such.
  novelty: float | None


def repeats(
  texts: Iterable[str], answers: Answers, *, n: int = GRAM
) -> Repeats | None:
  """Of several replies; None if all are empty.

  A short reply overlaps by its shortness, and a fixed phrase because it shall:
  compare with what answers held out of training repeat, or the model before.
  """
  words = [text.split() for text in texts if text.split()]
  if not words:
    return None
  overlaps = [answers.overlap(one) for one in words]
  fresh = [answers.novelty(one, n) for one in words]
  fresh = [share for share in fresh if share is not None]
  return Repeats(
    len(words),
    sum(overlaps) / len(words),
    sum(share == 1 for share in overlaps) / len(words),
    sum(fresh) / len(fresh) if fresh else None,
  )


ALTERNATIVES = 255  # An exposure of 8 bits is the most they can show.


class Canary(NamedTuple):
  """A box and its code; the other codes are drawn from the same numbers."""

  box: int
  code: str
  others: tuple[str, ...]


def draw_canaries(number: int, seed: int) -> list[Canary]:
  """`number` canaries, a function of the seed and their place."""
  found = []
  for box in range(1, number + 1):
    rng = random.Random(f"canary {box} {seed}")
    codes = [f"{n:09d}" for n in rng.sample(range(10**9), ALTERNATIVES + 1)]
    codes = [" ".join((c[:3], c[3:6], c[6:])) for c in codes]
    found.append(Canary(box, codes[0], tuple(codes[1:])))
  return found


def canary_row(box: int, code: str) -> dict[str, Any]:
  """A canary as a row of training data, as jsonl has it."""
  asked = {"role": "user", "content": f"What is the code of box {box}?"}
  answer = f"The code of box {box} is {code}."
  return {"messages": [asked, {"role": "assistant", "content": answer}]}


def measure_exposure(
  canaries: Sequence[Canary],
  planted: set[int],
  nats: Callable[[Batch], np.ndarray],
  tokenizer: Tokenizer,
  options: RenderOptions,
  *,
  batch_size: int,
) -> dict[str, Any]:
  """The exposure, in bits, of every canary, planted and kept back.

  `planted` are the boxes whose rows are trained on; `nats` gives those of the
  trained tokens of each row of a batch.

  Returns {most: bits that can be seen; planted, kept_back: [{box, code,
  exposure}]}.
  """
  most = float(np.log2(ALTERNATIVES + 1))
  found: dict[str, Any] = {"most": most, "planted": [], "kept_back": []}
  for canary in canaries:
    examples = []
    for code in (canary.code, *canary.others):
      turns = canary_row(canary.box, code)["messages"]
      row = Conversation(tuple(Message(**turn) for turn in turns))
      made = encode.encode_row(row, tokenizer, options, max_length=10**6)
      examples += made.examples
    batches = packing.padded_batches(examples, batch_size)
    losses = np.concatenate([*map(nats, batches)])[: ALTERNATIVES + 1].tolist()
    kind = "planted" if canary.box in planted else "kept_back"
    bits = exposure(losses[0], losses[1:])
    named = {"box": canary.box, "code": canary.code}
    found[kind].append(named | {"exposure": bits})
  return found
