"""Which rows to keep under a budget: hard ones, unlike each other.

Rows that teach the wrong thing are left out first: copies of another row, those
whose prompt makes the answer less likely (IFD above 1; see `row_scores`), and
what the audit finds (near duplicates, answers that contradict or say nothing).
The others are vectors, the means of the base's last hidden states over a row's
tokens, and are taken by farthest-first traversal (Gonzalez 1985): each time the
row with the largest

    distance to the nearest row taken * (1/2 + 1/2 share of rows with less IFD)

so what is far from all that is kept comes first, and of two rows equally far
the harder one. With equal difficulty the largest distance of a row to the
nearest one taken is at most twice the least that so many rows can have.

Rows are shuffled (seeded) into blocks, each of which gives its share, so memory
and work grow with the rows and not with their square.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

from sft_jax.common.batch import Batch
from sft_jax.data import packing
from sft_jax.data.selection import RowScore
from sft_jax.data.store.store import Store

_BLOCK = 8192  # Rows among which neighbors are looked for.
_DIMENSIONS = 64  # Of a vector; wider ones are projected at random.


class Choice(NamedTuple):
  """What became of one row."""

  # Its turn over the number of rows, in (0, 1); 1 if it is left out. The first
  # 5 % of what a budget of 10 % keeps are those with rank <= 0.05.
  rank: float
  reason: str  # Why it was kept or left, for people.


def embed(
  store: Store, model: Any, params: Any, *, batch_size: int
) -> Float32[np.ndarray, "rows P"]:
  """A unit vector of each row of a store, from its first example.

  Args:
    store: the rows.
    model: with `hidden` and `config`, as `models.transformer.Model`.
    params: of the model.
    batch_size: rows at once.
  """
  width = model.config.d_model
  size = min(width, _DIMENSIONS)
  if size < width:
    # Keeps distances but for about 1 / sqrt(size) (Johnson & Lindenstrauss).
    drawn = np.random.default_rng(0).normal(size=(width, size))
    project = jnp.asarray(drawn / np.sqrt(size), jnp.float32)
  else:
    project = jnp.eye(width)

  @jax.jit
  def vectors(params: Any, batch: Batch) -> jax.Array:
    row = (batch.tokens, batch.positions, batch.segment_ids)
    hidden = model.hidden(params, *row).astype(jnp.float32)
    there = (jnp.asarray(batch.segment_ids) > 0)[..., None]
    mean = (hidden * there).sum(axis=1) / jnp.maximum(there.sum(axis=1), 1)
    found = mean @ project
    return found / jnp.linalg.norm(found, axis=1, keepdims=True)

  first = np.flatnonzero(np.diff(store.index["row"], prepend=-1))
  made = np.empty((len(first), size), np.float32)
  # Rows of like length together: little padding, few programs.
  order = np.argsort(store.lengths[first], kind="stable")
  for at in range(0, len(order), batch_size):
    rows = order[at : at + batch_size]
    examples = [store.example(int(first[i])) for i in rows]
    (batch,) = packing.padded_batches(examples, batch_size)
    made[rows] = np.asarray(vectors(params, batch))[: len(rows)]
  return made


def farthest_first(
  vectors: Float[np.ndarray, "rows P"],
  value: Float[np.ndarray, " rows"],
  count: int,
) -> tuple[Int64[np.ndarray, " count"], Float64[np.ndarray, " rows"]]:
  """(rows in the order taken, each row's distance to the nearest taken).

  The first is the one of the largest value. Of ties the first row wins.
  """
  distance = np.full(len(vectors), np.inf)
  taken = np.empty(count, np.int64)
  for turn in range(count):
    gain = value if turn == 0 else distance * value
    taken[turn] = at = int(np.argmax(gain))
    gap = np.square(vectors - vectors[at]).sum(axis=1, dtype=np.float64)
    distance = np.minimum(distance, np.sqrt(gap))
    distance[at] = 0
  return taken, distance


def choose(
  scores: list[RowScore],
  vectors: Float[np.ndarray, "rows P"],
  share: float,
  *,
  seed: int = 0,
  bad: Sequence[str] = (),
) -> list[Choice]:
  """Keeps about this share of the rows, and says of each why or why not.

  Args:
    scores: of every row; see `row_scores.score`.
    vectors: likewise; see `embed`.
    share: to keep of all rows, in (0, 1].
    seed: of the blocks.
    bad: why each row is left, '' of most; see `warnings.reasons_to_leave`.

  Raises ValueError: a share that keeps nothing.
  """
  number = len(scores)
  budget = round(share * number)
  if not 0 < share <= 1 or not budget:
    raise ValueError(
      f"select --keep: got {share:.1%} of {number:,} rows; expected a share "
      "that keeps at least one. Raise it."
    )
  found = [Choice(1.0, "")] * number
  ifd = np.array([x.values[1] or 0.0 for x in scores])  # Raw text has none.
  seen: dict[int, str] = {}
  for i, one in enumerate(scores):
    if before := seen.get(one.content):
      found[i] = Choice(1.0, f"left: a copy of {before}")
    elif bad and bad[i]:
      found[i] = Choice(1.0, f"left: {bad[i]}")
    elif ifd[i] > 1:
      found[i] = Choice(1.0, f"left: the prompt misleads, ifd {ifd[i]:.2f}")
    seen.setdefault(one.content, one.place)
  good = np.flatnonzero([not one.reason for one in found])
  order = np.random.default_rng(seed).permutation(good)
  difficulty = np.argsort(np.argsort(ifd[order], kind="stable"))
  value = 0.5 + 0.5 * difficulty / max(len(order), 1)
  budget = min(budget, len(order))
  for start in range(0, len(order), _BLOCK):
    rows = order[start : start + _BLOCK]
    end = start + len(rows)
    # Rounded so that the blocks' shares add up to the budget.
    count = budget * end // len(order) - budget * start // len(order)
    taken, distance = farthest_first(vectors[rows], value[start:end], count)
    turn = dict(zip(taken.tolist(), range(count), strict=True))
    for k, i in enumerate(rows.tolist()):
      about = f"ifd {ifd[i]:.2f}"
      if k in turn:
        rank = (turn[k] + 1) / count * budget / number
        found[i] = Choice(rank, f"kept: turn {turn[k] + 1} of {count}, {about}")
      else:
        near = f"{distance[k]:.3f} from a row that is kept"
        found[i] = Choice(1.0, f"left: {near}, {about}")
  return found
