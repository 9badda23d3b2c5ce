"""Layout: documents side by side in the rows of a batch."""

from collections.abc import Sequence

import numpy as np

from sft_jax.common.batch import Batch
from sft_jax.data.encoding.encode import Example


def lay_out(
  examples: Sequence[Example],
  seq_len: int,
  *,
  normalize: str = "token",
  scales: Sequence[float] = (),
  sources: Sequence[int] = (),
) -> Batch:
  """Lays documents into one row, B = 1; see `Batch` for the picture.

  The shift by one happens here and only here: a slot's target is the next
  token of its own document, so a document's last slot predicts nothing and
  no document is predicted from the one before it.

  Args:
    examples: the documents, at most `seq_len` tokens together.
    seq_len: slots of the row, T.
    normalize: see `pipeline.Stream`.
    scales: factor of each document's weights; none are all 1.
    sources: number of each document's source; none are all 0.
  """
  zeros = np.zeros((1, seq_len), np.int32)
  own_parts, own_sources = zeros.astype(np.uint8), zeros.copy()
  row = Batch(
    tokens=zeros,
    targets=zeros.copy(),
    loss_weights=zeros.astype(np.float32),
    segment_ids=zeros.copy(),
    positions=zeros.copy(),
    parts=own_parts,
    sources=own_sources,
  )
  start = 0
  for segment, example in enumerate(examples, 1):
    tokens, weights = example.tokens, example.loss_weights
    end = start + len(tokens)
    if normalize == "example":
      weights = weights / weights.sum()
    if scales:
      weights = weights * np.float32(scales[segment - 1])
    row.tokens[0, start:end] = tokens
    row.targets[0, start : end - 1] = tokens[1:]
    row.loss_weights[0, start : end - 1] = weights[1:]
    row.segment_ids[0, start:end] = segment
    row.positions[0, start:end] = np.arange(len(tokens))
    own_parts[0, start : end - 1] = example.parts[1:]
    if sources:
      own_sources[0, start:end] = sources[segment - 1]
    start = end
  return row


def stack(rows: Sequence[Batch]) -> Batch:
  """One batch of all the rows."""
  return Batch._make(map(np.concatenate, zip(*rows, strict=True)))
