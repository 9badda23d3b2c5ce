"""Losses of single examples: which held-out rows training made harder."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from sft_jax.common.batch import Batch
from sft_jax.common.trees import Tree
from sft_jax.data.audit import summary
from sft_jax.data.pipeline import Stream
from sft_jax.data.tokenizers.tokenizer import Tokenizer
from sft_jax.step.loss import GroupSums

# Rows whose text is kept with their loss: of each source, and in all.
_SHOWN, _MOST = 3, 12


def by_change(
  params: Tree,
  stream: Stream,
  tokenizer: Tokenizer,
  *,
  loss: Callable[..., GroupSums],
  batches: Callable[[Stream], Iterable[Batch]],
  most_batches: int | None = None,
  before: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
  """Examples of a stream, those whose loss rose most over the base's first.

  A long answer is hard for every model, so the loss alone says little of the
  training. Without `before`, the highest loss is first.

  Args:
    params: of the model.
    stream: each example once (epochs=1).
    tokenizer: of the stream's store.
    loss: (params, batch, documents) -> sums of each document of a batch of B
      rows, numbered row * documents + place in the row.
    batches: the batches of a stream, on the mesh.
    most_batches: that are measured; None: all.
    before: nats per token of the examples before training, by their number.

  Returns {'row', 'source', 'place', 'nats', 'trained_tokens', 'nats_per_token',
  'change'} of each; the first few of each source are also `summary.sample`s.
  What weighs nothing has no loss and is left out.
  """
  steps = range(stream.num_steps or 0)[:most_batches]
  plan = [stream.rows_of(step) for step in steps]
  most = max(len(ids) for rows in plan for ids in rows)
  of_batch = jax.jit(lambda params, batch: loss(params, batch, most))
  found: list[tuple[float, float, int]] = []
  for rows, batch in zip(plan, batches(stream), strict=False):
    sums = jax.device_get(of_batch(params, batch))
    by_row = lambda x: np.float64(x).reshape(-1, most)
    nats, weight = by_row(sums.nats), by_row(sums.weight)
    found += [
      (float(nats[i, j]), float(weight[i, j]), row)
      for i, ids in enumerate(rows)
      for j, row in enumerate(ids)
      if weight[i, j]
    ]
  if not before or not all(str(row) in before for *_, row in found):
    before = None  # A run that was forced on may have other rows.
  names = stream.store.stats.short_names()
  labels = [names[source.label] for source in stream.store.sources]
  rows = [
    {
      "row": row,
      "source": labels[int(stream.store.source[row])],
      "place": stream.store.place(row),
      "nats": nats,
      "trained_tokens": weight,
      "nats_per_token": nats / weight,
      "change": nats / weight - before[str(row)] if before else None,
    }
    for nats, weight, row in found
  ]
  by = "change" if before else "nats_per_token"
  rows.sort(key=lambda one: -one[by])
  shown: dict[str, int] = {}
  for row in rows:
    seen = shown.get(row["source"], 0)
    if seen < _SHOWN and sum(shown.values()) < _MOST:
      shown[row["source"]] = seen + 1
      row |= summary.sample(stream.store, row["row"], tokenizer)
  return rows
