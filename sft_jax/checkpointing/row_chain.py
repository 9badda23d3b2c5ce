"""Row chain: proof of which rows a run has trained on, in which order.

Every step's batch is digested on the device, from the very arrays that the
step reads; the host folds the digests of all steps into one short text:

    chain_k = sha256(chain_{k-1} + digest_k)[:16],  chain_0 = ''

It stands in every record of metrics.jsonl and in every checkpoint. Two runs
with the same chain at a step have consumed the same rows at every step before
it: an interrupted run, or one on other devices, proves itself by it.
"""

import hashlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from sft_jax.checkpointing.digests import ODDS, mix
from sft_jax.common.batch import Batch


def digest_rows(batch: Batch) -> UInt32[Array, "2"]:
  """64 bits over all that a batch holds; the order of its rows is no matter.

      d_j = sum_rows mix(sum_ft mix(x_ft + (f T + t + 1) * odd_j)),  j = 0, 1

  with x_ft the 32 bits of field f in slot t. A step does not depend on the
  order of its rows, which accumulation and processes change.

  Args:
    batch: with any leading axes before T.
  """
  fields = [
    x.astype(jnp.int32) if x.dtype.itemsize < 4 else x
    for x in jax.tree.leaves(batch)
  ]
  fields = jnp.stack(
    [jax.lax.bitcast_convert_type(x, jnp.uint32) for x in fields], axis=-2
  )
  places = np.arange(
    1, 1 + fields.shape[-2] * fields.shape[-1], dtype=np.uint32
  )
  places = places.reshape(fields.shape[-2:])

  def mixed_sum(odd: int) -> Array:
    words = mix(fields + places * np.uint32(odd))
    rows = words.sum((-2, -1), dtype=jnp.uint32)
    return mix(rows).sum(dtype=jnp.uint32)

  return jnp.stack([mixed_sum(odd) for odd in ODDS])


def extend(chain: str, digests: Iterable[np.ndarray]) -> str:
  """The chain after further steps' digests."""
  for digest in digests:
    link = chain.encode() + np.asarray(digest, "<u4").tobytes()
    chain = hashlib.sha256(link).hexdigest()[:16]
  return chain
