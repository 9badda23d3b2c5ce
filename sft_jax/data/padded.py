"""Examples as batches of one example a row, for measuring without a stream."""

from collections.abc import Sequence

import numpy as np

from sft_jax.common.batch import Batch
from sft_jax.data.encoding.encode import Example

_SLOTS = 64  # Rows are as long as a multiple of it: few programs to compile.


def batches(examples: Sequence[Example], size: int) -> list[Batch]:
  """`size` rows each; the last batch is filled up with empty rows."""
  return [
    _batch(examples[at : at + size], size)
    for at in range(0, len(examples), size)
  ]


def _batch(examples: Sequence[Example], size: int) -> Batch:
  longest = max(len(one.tokens) for one in examples)
  shape = (size, -(-longest // _SLOTS) * _SLOTS)
  batch = Batch(
    tokens=np.zeros(shape, np.int32),
    targets=np.zeros(shape, np.int32),
    loss_weights=np.zeros(shape, np.float32),
    segment_ids=np.zeros(shape, np.int32),
    positions=np.zeros(shape, np.int32),
  )
  for i, one in enumerate(examples):
    n = len(one.tokens)
    batch.tokens[i, :n] = one.tokens
    batch.targets[i, : n - 1] = one.tokens[1:]
    batch.loss_weights[i, : n - 1] = one.loss_weights[1:]
    batch.segment_ids[i, :n] = 1
    batch.positions[i, :n] = np.arange(n)
  return batch
