"""Which rows to keep under a budget: those that stand for many, and are sound.

Left out first are copies of another row and what the audit finds (near
duplicates, answers that contradict or say nothing). The others are vectors of
two halves, the mean of the base's last hidden states over the row and the state
from which its last reply starts. What is asked and answered alike should be
about as likely, so

    worth = twice the share of the 30 nearest rows whose answers are less
            likely (nats), at most 1

which is near 0 for an answer to something else, whatever such answers usually
cost, and the same for half of the rows: the easiest are not preferred. (Labels
told wrong by neighbors: Bahri et al. 2020, arXiv:2004.12289.) Rows are taken by
facility location (of k-medoids, as in Mirzasoleiman et al. 2013, "Distributed
submodular maximization"): each time the row with the largest

    worth * sum over rows of how much nearer they come to a row that is taken

so an outlier, which stands for itself alone, comes late. With equal worth the
sum is at least 1 - 1/e of the most that so many rows can reach.

Rows are shuffled (seeded) into blocks, each of which gives its share, so memory
and work grow with the rows and not with their square.
"""

import heapq
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

_BLOCK = 4096  # Rows whose distances exist at once (64 MB).
_NEIGHBORS = 30  # Rows whose answers a row's is compared with.
_DIMENSIONS = 64  # Of half a vector; wider ones are projected at random.


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

  Half is the mean state, half that from which the last reply starts; raw text
  has no reply, and the mean twice.

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
    trained = jnp.asarray(batch.loss_weights) != 0
    starts = trained & ~jnp.roll(trained, 1, axis=1)
    last = jnp.where(starts, jnp.arange(starts.shape[1]), 0).max(axis=1)
    before = hidden[jnp.arange(len(last)), last]
    found = (
      jnp.stack((mean, jnp.where(last[:, None] > 0, before, mean))) @ project
    )
    found /= jnp.sqrt(2) * jnp.linalg.norm(found, axis=-1, keepdims=True)
    return jnp.concatenate(tuple(found), axis=1)

  first = np.flatnonzero(np.diff(store.index["row"], prepend=-1))
  made = np.empty((len(first), 2 * size), np.float32)
  # Rows of like length together: little padding, few programs.
  order = np.argsort(store.lengths[first], kind="stable")
  for at in range(0, len(order), batch_size):
    rows = order[at : at + batch_size]
    examples = [store.example(int(first[i])) for i in rows]
    (batch,) = packing.padded_batches(examples, batch_size)
    made[rows] = np.asarray(vectors(params, batch))[: len(rows)]
  return made


def distances(
  vectors: Float[np.ndarray, "rows P"],
) -> Float32[np.ndarray, "rows rows"]:
  """Of all pairs, after the mean is taken off and lengths are made 1.

  Hidden states point in much the same direction, which tells nothing.
  """
  apart = vectors - vectors.mean(axis=0)
  apart /= np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), 1e-12)
  return np.sqrt(np.maximum(2 - 2 * (apart @ apart.T), 0)).astype(np.float32)


def worth(
  gaps: Float32[np.ndarray, "rows rows"],
  nats: Float[np.ndarray, " rows"],
) -> Float64[np.ndarray, " rows"]:
  """Twice the share of near rows with more nats (equal: half), at most 1."""
  apart = gaps.copy()
  np.fill_diagonal(apart, np.inf)
  count = min(_NEIGHBORS, len(nats) - 1)
  if not count:
    return np.ones(len(nats))
  near = nats[np.argpartition(apart, count - 1, axis=1)[:, :count]]
  own = nats[:, None]
  share = np.mean((near > own) + 0.5 * (near == own), axis=1)
  return np.minimum(2 * share, 1)


def represent(
  gaps: Float32[np.ndarray, "rows rows"],
  value: Float[np.ndarray, " rows"],
  count: int,
) -> tuple[Int64[np.ndarray, " count"], Float32[np.ndarray, " rows"]]:
  """(rows in the order taken, each row's distance to the nearest taken).

  The gain of a row is its value times the fall of the sum of distances to the
  nearest row taken, at first 2. Gains only shrink, so a row whose gain is still
  above all earlier gains is the best (lazy greedy; Minoux 1978). Of ties the
  first row wins.
  """
  nearest = np.full(len(gaps), 2, np.float32)

  def gain(i: int) -> float:
    fall = np.maximum(nearest - gaps[i], 0).sum(dtype=np.float64)
    return float(value[i] * fall)

  heap = [(-gain(i), i) for i in range(len(gaps))]
  heapq.heapify(heap)
  taken = list[int]()
  while len(taken) < count:
    _, i = heapq.heappop(heap)
    now = (-gain(i), i)
    if heap and now > heap[0]:
      heapq.heappush(heap, now)
      continue
    taken.append(i)
    np.minimum(nearest, gaps[i], out=nearest)
  return np.array(taken, np.int64), nearest


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
  seen: dict[int, str] = {}
  for i, one in enumerate(scores):
    if before := seen.get(one.content):
      found[i] = Choice(1.0, f"left: a copy of {before}")
    elif bad and bad[i]:
      found[i] = Choice(1.0, f"left: {bad[i]}")
    seen.setdefault(one.content, one.place)
  good = np.flatnonzero([not one.reason for one in found])
  order = np.random.default_rng(seed).permutation(good)
  budget, end = min(budget, len(order)), 0
  blocks = -(-len(order) // _BLOCK)
  for rows in np.array_split(order, blocks) if blocks else ():
    start, end = end, end + len(rows)
    # Rounded so that the blocks' shares add up to the budget.
    count = budget * end // len(order) - budget * start // len(order)
    gaps = distances(vectors[rows])
    value = worth(gaps, np.array([scores[i].values[0] for i in rows]))
    taken, nearest = represent(gaps, value, count)
    turn = dict(zip(taken.tolist(), range(count), strict=True))
    for k, i in enumerate(rows.tolist()):
      about = f"worth {value[k]:.2f}"
      if k in turn:
        rank = (turn[k] + 1) / count * budget / number
        found[i] = Choice(rank, f"kept: turn {turn[k] + 1} of {count}, {about}")
      else:
        near = f"{nearest[k]:.3f} from a row that is kept"
        why = near if count else "its block keeps none"
        found[i] = Choice(1.0, f"left: {why}, {about}")
  return found
