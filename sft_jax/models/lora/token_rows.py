"""Rows of an embedding: which the base model never learned, and new ones."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

# A row near to so many others is one that no text has moved: rows that no
# text uses are all pushed the same way. Of Gemma 3 270M's 262,144 rows 6,400
# are; of a word that is used, none or a handful.
_COSINE, _NEIGHBORS = 0.9, 16
_CHUNK = 16384


def untrained(
  read: Callable[[int, int], Float[np.ndarray, "rows D"]],
  num_rows: int,
  ids: Sequence[int],
) -> dict[int, str]:
  """{id: what is odd about its row} of those that seem never trained.

  A row is, if it is near to many others (see above), or if its norm is a
  quarter of the median norm or less, or four times as large or more.

  `read`: read(i, j) gives rows i to j of the table.
  """
  own = np.concatenate([np.asarray(read(i, i + 1), np.float32) for i in ids])
  own_norm = np.linalg.norm(own, axis=1)
  own /= np.maximum(own_norm, 1e-12)[:, None]
  near, norms = np.zeros(len(ids), int), []
  for start in range(0, num_rows, _CHUNK):
    rows = np.asarray(read(start, min(start + _CHUNK, num_rows)), np.float32)
    norm = np.linalg.norm(rows, axis=1)
    near += (rows @ own.T > _COSINE * norm[:, None]).sum(axis=0)
    norms.append(norm)
  median = float(np.median(np.concatenate(norms)))
  found = {}
  for i, size, others in zip(ids, own_norm, near - 1, strict=True):
    if not median / 4 < size < median * 4:
      found[i] = f"its norm is {size:.3g}, the median {median:.3g}"
    elif others >= _NEIGHBORS:
      found[i] = f"its row is near to {others:,} others"
  return found


def grow(
  key: jax.Array, table: Float[Array, "V D"], size: int, how: str
) -> Float[Array, "size D"]:
  """The table with rows added at its end.

  Args:
    key: randomness of 'matched'.
    how: 'mean' of the old rows, or 'matched': drawn with their mean and
      covariance, mean + z (table - mean) / sqrt(V) with z standard normal.
  """
  old = table.astype(jnp.float32)
  count, mean = len(old), old.mean(axis=0)
  rows: Float32[Array, "N D"] = jnp.tile(mean, (size - count, 1))
  if how == "matched":
    z = jax.random.normal(key, (size - count, count))
    rows = rows + z @ (old - mean) / count**0.5
  return jnp.concatenate([table, rows.astype(table.dtype)])
