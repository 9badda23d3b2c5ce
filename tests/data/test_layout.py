"""The layout of documents in a row, against the table of `Batch`."""

import numpy as np

from sft_jax.common.batch import Batch
from sft_jax.data.encoding.encode import Example
from sft_jax.data.layout import lay_out


def _example(tokens, weights, parts=None):
  parts = np.array(parts or [0] * len(tokens), np.uint8)
  weights = np.array(weights, np.float32)
  return Example(np.array(tokens, np.int32), weights, parts)


def test_layout_is_the_table_of_batch():
  row = lay_out(
    [
      _example([10, 11, 12], [0, 0, 1], [1, 2, 4]),
      _example([20, 21, 22], [0, 1, 1], [2, 4, 7]),
    ],
    8,
    sources=[1, 0],
  )
  expected = Batch(
    tokens=np.array([[10, 11, 12, 20, 21, 22, 0, 0]]),
    targets=np.array([[11, 12, 0, 21, 22, 0, 0, 0]]),
    loss_weights=np.array([[0, 1, 0, 1, 1, 0, 0, 0]]),
    segment_ids=np.array([[1, 1, 1, 2, 2, 2, 0, 0]]),
    positions=np.array([[0, 1, 2, 0, 1, 2, 0, 0]]),
    parts=np.array([[2, 4, 0, 4, 7, 0, 0, 0]]),
    sources=np.array([[1, 1, 1, 0, 0, 0, 0, 0]]),
  )
  for got, want in zip(row, expected, strict=True):
    assert got.tolist() == want.tolist()
  assert [x.dtype.name for x in row] == [
    "int32",
    "int32",
    "float32",
    "int32",
    "int32",
    "uint8",
    "int32",
  ]


def test_normalize_by_example():
  row = lay_out(
    [_example([1, 2, 3], [0, 1, 1]), _example([4, 5], [0, 0.25])],
    5,
    normalize="example",
  )
  assert row.loss_weights.tolist() == [[0.5, 0.5, 0, 1, 0]]
