"""Losses of single examples: which held-out rows training made harder."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sft_jax.data.audit import summary
from sft_jax.data.pipeline import Stream
from sft_jax.data.tokenizers.tokenizer import Tokenizer

# Rows whose text is kept with their loss: of each source, and in all.
_SHOWN, _MOST = 3, 12


def by_change(
  stream: Stream,
  tokenizer: Tokenizer,
  by_document: Sequence[Sequence[np.ndarray]],
  before: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
  """Examples of a stream, those whose loss rose most over the base's first.

  A long answer is hard for every model, so the loss alone says little of the
  training. Without `before`, the highest loss is first.

  Args:
    stream: each example once (epochs=1).
    tokenizer: of the stream's store.
    by_document: of each batch that was measured, the first ones, nats and
      weights [B, documents] of the rows' documents; see `suite.Suite`.
    before: nats per token of the examples before training, by their number.

  Returns {'row', 'source', 'place', 'nats', 'trained_tokens', 'nats_per_token',
  'change'} of each; the first few of each source are also `summary.sample`s.
  What weighs nothing has no loss and is left out.
  """
  found = [
    (float(nats[i, j]), float(weight[i, j]), row)
    for step, (nats, weight) in enumerate(by_document)
    for i, ids in enumerate(stream.rows_of(step))
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
