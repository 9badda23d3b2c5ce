"""Losses of single examples: which held-out rows a model finds hardest."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from sft_jax.common.batch import Batch
from sft_jax.common.trees import Tree
from sft_jax.data.audit import summary
from sft_jax.data.pipeline import Stream
from sft_jax.data.tokenizers.tokenizer import Tokenizer
from sft_jax.step.loss import GroupSums

# Rows whose text is kept with their loss.
_SHOWN = 5


def hardest_first(
  params: Tree,
  stream: Stream,
  tokenizer: Tokenizer,
  *,
  loss: Callable[..., GroupSums],
  batches: Callable[[Stream], Iterable[Batch]],
  most_batches: int | None = None,
) -> list[dict[str, Any]]:
  """Every example of a stream by its loss, the highest first.

  Args:
    params: of the model.
    stream: each example once (epochs=1).
    tokenizer: of the stream's store.
    loss: (params, batch, documents) -> sums of each document of a batch of B
      rows, numbered row * documents + place in the row.
    batches: the batches of a stream, on the mesh.
    most_batches: that are measured; None: all.

  Returns:
    {'place', 'nats', 'trained_tokens', 'nats_per_token'} of each; the first
    few are also `inspection.sample`s. What weighs nothing has no loss and is
    left out.
  """
  steps = range(stream.num_steps or 0)[:most_batches]
  plan = [stream.rows_of(step) for step in steps]
  most = max(len(ids) for rows in plan for ids in rows)
  of_batch = jax.jit(lambda params, batch: loss(params, batch, most))
  found: list[tuple[float, float, int]] = []
  for rows, batch in zip(plan, batches(stream), strict=False):
    sums = jax.device_get(of_batch(params, batch))
    nats, weight = (
      np.float64(x).reshape(-1, most) for x in (sums.nats, sums.weight)
    )
    found += [
      (float(nats[i, j]), float(weight[i, j]), row)
      for i, ids in enumerate(rows)
      for j, row in enumerate(ids)
      if weight[i, j]
    ]
  found.sort(key=lambda one: -one[0] / one[1])
  return [
    {
      "place": stream.store.place(row),
      "nats": nats,
      "trained_tokens": weight,
      "nats_per_token": nats / weight,
      **(summary.sample(stream.store, row, tokenizer) if i < _SHOWN else {}),
    }
    for i, (nats, weight, row) in enumerate(found)
  ]
