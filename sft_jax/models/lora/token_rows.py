"""Rows of an embedding: which the base model never learned, and new ones."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Float32

from sft_jax.common import distributed

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

  `read`: read(i, j) gives rows i to j of the table. Processes share the table,
  and each of them calls this.
  """
  own = np.concatenate([np.asarray(read(i, i + 1), np.float32) for i in ids])
  own_norm = np.linalg.norm(own, axis=1)
  own /= np.maximum(own_norm, 1e-12)[:, None]
  part, near = distributed.own_rows(num_rows), np.zeros(len(ids), int)
  norms = np.full(-(-num_rows // jax.process_count()), np.nan, np.float32)
  for start in range(part.start, part.stop, _CHUNK):
    stop = min(start + _CHUNK, part.stop)
    rows = np.asarray(read(start, stop), np.float32)
    norm = np.linalg.norm(rows, axis=1)
    near += (rows @ own.T > _COSINE * norm[:, None]).sum(axis=0)
    norms[start - part.start : stop - part.start] = norm
  if jax.process_count() > 1:
    near, norms = multihost_utils.process_allgather((near, norms))
    near = near.sum(axis=0)
  median = float(np.nanmedian(norms))
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
