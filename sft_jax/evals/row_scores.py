"""Scores of rows: how hard a model finds each answer, with and without prompt.

Of a row whose trained tokens are A, with the prompt Q before them:

    nats   mean of -log p(a | all before it) over A: what training starts from
    alone  the same without Q: every trained turn is a document of its own
    ifd    instruction-following difficulty, nats / alone (Li et al. 2024,
           arXiv:2308.12032): near 0 where the prompt says the answer, above 1
           where it misleads, which is often an answer to something else
    tokens the number of A

A turn alone is its own ids, stop token included, after BOS. Without BOS nothing
predicts its first token: then `alone`, and the numerator of `ifd`, are over the
others. Sums are over all turns, and all examples, of a row, and divided once;
weights do not count. Raw text has no prompt, so neither `alone` nor `ifd`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float64, Int64

from sft_jax.common import sharding
from sft_jax.common.batch import Batch
from sft_jax.data import packing
from sft_jax.data.encoding.encode import Example
from sft_jax.data.selection import RowScore
from sft_jax.data.store.store import Store
from sft_jax.step.loss import GroupSums, linear_cross_entropy

# Batches between two words on how far it is.
_EVERY = 50


class Documents(NamedTuple):
  """What the model reads: examples, and after them their turns alone."""

  # Of the store, that each is (a part of).
  example: Int64[np.ndarray, " documents"]
  # First token of it; -1 is the whole example.
  start: Int64[np.ndarray, " documents"]
  end: Int64[np.ndarray, " documents"]  # Past the last.
  lengths: Int64[np.ndarray, " documents"]  # In tokens, BOS included.


def documents(store: Store, bos_id: int | None) -> Documents:
  """All examples whole, and every trained turn that has a prompt before it."""
  found = [(i, -1, 0, int(n)) for i, n in enumerate(store.lengths)]
  bos = bos_id is not None
  for i in np.flatnonzero(~store.index["text"]).tolist():
    # Turns: runs of tokens of any weight but 0.
    trained = store.example(i).loss_weights != 0
    edges = np.flatnonzero(np.diff(trained, prepend=False, append=False))
    for start, end in edges.reshape(-1, 2).tolist():
      if start > 1 and end - start + bos > 1:
        found.append((i, start, end, end - start + bos))
  return Documents(*np.array(found, np.int64).reshape(-1, 4).T)


def score(
  store: Store,
  model: Any,
  params: Any,
  *,
  bos_id: int | None,
  seq_len: int,
  batch_size: int,
  mesh: Mesh,
  chunk_tokens: int = 512,
  log: Callable[[str], None] = print,
) -> list[RowScore]:
  """The scores of every row of a store, in its order.

  Documents are packed, so the cost is one forward pass over the rows and one
  over their answers; scores are those of each document alone, but for rounding.
  `bos_id` is None where the tokenizer has none.

  Raises ValueError: a loss that is no number, by the row's place.
  """
  made = documents(store, bos_id)
  plan = packing.plan(made.lengths, seq_len, seed=0)
  segments = int(np.diff(plan.starts).max())
  spread = sharding.row_sharding(mesh)
  sums = jax.jit(_group_sums(model, segments, chunk_tokens, spread))
  # Of each document: all trained tokens, and those that are scored alone too.
  nats, tokens = np.zeros((2, 2, len(made.lengths)))
  turns: list[list[tuple[int, int]]] = [[] for _ in store.index]
  for i, start, end in zip(*(x.tolist() for x in made[:3]), strict=True):
    if start >= 0:
      turns[i].append((start, end))
  example = lambda d: _example(store, made, int(d), turns, bos_id)
  own, none = sharding.own_rows(mesh, batch_size), np.empty(0, np.int64)
  steps = -(-plan.num_packs // batch_size)
  for step in range(steps):
    numbers = range(step * batch_size, (step + 1) * batch_size)
    packs = [plan.pack(i) if i < plan.num_packs else none for i in numbers]
    rows = [packing.pack_row([*map(example, packs[i])], seq_len) for i in own]
    batch = sharding.put_rows(packing.stack_rows(rows), spread)
    found: GroupSums = jax.device_get(sums(params, batch))
    for row, pack in enumerate(packs):
      for kind in range(2):
        at = (kind * batch_size + row) * segments
        nats[kind, pack] = found.nats[at : at + len(pack)]
        tokens[kind, pack] = found.weight[at : at + len(pack)]
    if (step + 1) % _EVERY == 0 or step + 1 == steps:
      log(f"scored {step + 1:,} of {steps:,} batches")
  return list(_rows(store, made, nats, tokens))


def _group_sums(
  model: Any, segments: int, chunk_tokens: int, rows: Any
) -> Callable[[Any, Batch], GroupSums]:
  """(params, batch) -> sums of each document of each row, in two kinds."""

  def sums(params: Any, batch: Batch) -> GroupSums:
    row = (batch.tokens, batch.positions, batch.segment_ids)
    hidden, number = model.hidden(params, *row), batch.tokens.shape[0]
    first = jnp.arange(number)[:, None] * segments
    document = first + jnp.asarray(batch.segment_ids) - 1
    assert batch.roles is not None  # `_example` marks what is paired.
    is_paired = jnp.asarray(batch.roles) > 0
    paired = jnp.where(is_paired, document + number * segments, -1)
    return linear_cross_entropy(
      hidden,
      model.head(params).astype(hidden.dtype),
      batch.targets,
      batch.loss_weights,
      jnp.stack([document, paired], axis=-1).astype(jnp.int32),
      num_groups=2 * number * segments,
      chunk_tokens=chunk_tokens,
      softcap=model.config.logit_softcap,
      rows=rows,
    ).groups

  return sums


def _example(
  store: Store,
  made: Documents,
  document: int,
  turns: list[list[tuple[int, int]]],
  bos_id: int | None,
) -> Example:
  """A document, every trained token of weight 1; `parts` marks the paired."""
  i, start, end = (int(x[document]) for x in made[:3])
  example = store.example(i)
  first = 0 if bos_id is not None else 1
  if start < 0:
    weights = (example.loss_weights != 0).astype(np.float32)
    paired = np.zeros(len(weights), np.uint8)
    for a, b in turns[i]:
      paired[a + first : b] = 1
    return Example(example.tokens, weights, paired)
  ids = example.tokens[start:end]
  if bos_id is not None:
    ids = np.concatenate([np.array([bos_id], np.int32), ids])
  weights = np.ones(len(ids), np.float32)
  weights[0] = 0
  return Example(ids, weights, weights.astype(np.uint8))


def _rows(
  store: Store,
  made: Documents,
  nats: Float64[np.ndarray, "2 documents"],
  tokens: Float64[np.ndarray, "2 documents"],
) -> Iterator[RowScore]:
  """Documents added up to rows."""
  first = np.diff(store.index["row"], prepend=-1) != 0
  of_row = (np.cumsum(first) - 1)[made.example]
  number = int(first.sum())
  whole = made.start < 0

  def total(x: np.ndarray, which: np.ndarray) -> Float64[np.ndarray, " rows"]:
    return np.bincount(of_row[which], x[which], number)

  loss, count = total(nats[0], whole), total(tokens[0], whole)
  with_prompt, alone = total(nats[1], whole), total(nats[1], ~whole)
  paired = total(tokens[1], ~whole)
  for row, i in enumerate(np.flatnonzero(first).tolist()):
    place = store.place(i)
    if not np.isfinite([loss[row], alone[row]]).all():
      raise ValueError(
        f"{place}: got a loss of {loss[row]} nats, expected a finite one. "
        "Look at the row, and at the model: model.dtype float32 is safest."
      )
    ifd = alone_mean = None
    if paired[row]:
      alone_mean = round(float(alone[row] / paired[row]), 6)
      ifd = round(float(with_prompt[row] / max(alone[row], 1e-9)), 6)
    mean = round(float(loss[row] / count[row]), 6)
    values = (mean, ifd, alone_mean, int(count[row]))
    yield RowScore(place, int(store.index["content"][i]), values)
