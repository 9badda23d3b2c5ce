"""Manifest: what a checkpoint holds, array by array, under digests.

    {"arrays": {path: {"shape", "dtype", "digest", "blocks"?}},
     "beside": the same of arrays that are not in the checkpoint,
     "step", "meta", "code", "versions"}

It is sealed: a digest of its own text is beside it, so that a damaged
manifest is not taken for a damaged array, or for another run's.

Row chain: which rows a run has trained on, in which order. Every step's batch
is digested on the device, from the arrays that the step reads; the host
folds the digests of all steps into one short text:

    chain_k = sha256(chain_{k-1} + digest_k)[:16],  chain_0 = ''

It is in every record of metrics.jsonl and in every checkpoint. Two runs
with the same chain at a step have consumed the same rows at every step before
it: an interrupted run, or one on other devices, proves itself by it.
"""

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

from sft_jax.common import sharding
from sft_jax.common.batch import Batch

_LIBRARIES = ("jax", "optax", "orbax-checkpoint")
# What tells places apart: one for each half of a digest.
_ODDS = (0x9E3779B1, 0x7FEB352D)


def digest(
  x: Shaped[Array, "..."], blocks: tuple[int, ...] = ()
) -> UInt32[Array, "..."]:
  """64 bits per block that change whenever any one element changes.

      d_j = sum_i mix(bits(x_i) + (i + 1) * odd_j)  mod 2**32,  j = 0, 1

  where mix is a bijection of 32-bit words (Murmur3's finalizer) and i counts
  the elements of the whole array. Integer sums wrap exactly, so the digest is
  the same on any sharding and device, and that of an array is the sum of those
  of its blocks. It guards against decay, not against an adversary.

  `blocks`: into how many each axis is cut; () is one block of all.

  Returns [*blocks, 2], on every device.
  """
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x, blocks = jax.random.key_data(x), ()
  mesh = getattr(x.sharding, "mesh", None)
  return _compiled(blocks, sharding.replicated(mesh) if mesh else None)(x)


@functools.cache
def _compiled(blocks: tuple[int, ...], out: Any) -> Any:
  return jax.jit(lambda x: _digest(x, blocks), out_shardings=out)


def _digest(x: Array, blocks: tuple[int, ...]) -> Array:
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  width = x.dtype.itemsize * 8
  bits = jax.lax.bitcast_convert_type(x, f"uint{min(width, 32)}")
  bits = bits.astype(jnp.uint32)
  index = jnp.zeros(bits.shape, jnp.uint32)
  for axis, size in enumerate(bits.shape):
    index = index * np.uint32(size) + jax.lax.broadcasted_iota(
      jnp.uint32, bits.shape, axis
    )
  # [a * m, b] in (a, 1) blocks is [a, m, 1, b]; the sums are over m and b.
  counts = [*blocks, *[1] * (bits.ndim - len(blocks))]
  pairs = zip(counts, bits.shape, strict=True)
  cut = [n for c, size in pairs for n in (c, size // c)]
  inside = tuple(range(1, len(cut), 2))

  def mixed_sums(odd: int) -> Array:
    words = _mix(bits + (index + 1) * np.uint32(odd))
    return words.reshape(cut).sum(inside, dtype=jnp.uint32).reshape(blocks)

  return jnp.stack([mixed_sums(odd) for odd in _ODDS], -1)


def _mix(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
  """A bijection of 32-bit words in which every bit moves every other."""
  words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
  words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
  return words ^ (words >> 16)


def describe(
  tree: Any, blocks: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Any]:
  """{path of leaf: {'shape', 'dtype', 'digest', 'blocks'?}} of a tree.

  `blocks`: how to cut the leaves; by default as the devices divide them, so
  that 'blocks', of arrays divided among devices, has a digest per shard:
  {'cut': [2, 1], 'digests': [...]}, first axis slowest.
  """
  leaves = {
    jax.tree_util.keystr(path): jnp.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }
  cuts = {
    path: _shards(x) if blocks is None else blocks.get(path, ())
    for path, x in leaves.items()
  }
  # One at a time: many programs in flight that add over devices wait for one
  # another for ever, where several processes have fewer cores than devices.
  found = {
    path: jax.device_get(digest(x, cuts[path])) for path, x in leaves.items()
  }
  entries = {}
  for path, x in leaves.items():
    words = found[path].reshape(-1, 2)
    entries[path] = {
      "shape": list(x.shape),
      "dtype": str(x.dtype),
      "digest": _hex(words.sum(0, dtype=np.uint32)),
    }
    if cuts[path]:
      parts = {"cut": list(cuts[path]), "digests": [_hex(d) for d in words]}
      entries[path]["blocks"] = parts
  return entries


def _shards(x: jax.Array) -> tuple[int, ...]:
  """Into how many parts the devices cut each axis; () where they do not."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return ()
  shard = x.sharding.shard_shape(x.shape)
  cut = tuple(a // max(1, b) for a, b in zip(x.shape, shard, strict=True))
  return cut if max(cut, default=1) > 1 else ()


def _hex(words: np.ndarray) -> str:
  return f"{int(words[0]):08x}{int(words[1]):08x}"


def damaged(expected: Mapping[str, Any], tree: Any) -> list[str]:
  """The paths, and blocks of them, whose digests are not the expected."""
  cuts = {
    path: tuple(entry["blocks"]["cut"])
    for path, entry in expected.items()
    if "blocks" in entry
  }
  got = describe(tree, cuts)
  wrong = []
  for path, entry in expected.items():
    if path in got and entry["digest"] != got[path]["digest"]:
      if "blocks" in entry:
        here = got[path]["blocks"]["digests"]
        pairs = zip(entry["blocks"]["digests"], here, strict=True)
        bad = [i for i, (a, b) in enumerate(pairs) if a != b]
        path += f" (shards {bad} of {len(here)})"
      wrong.append(path)
  return wrong + sorted(expected.keys() - got.keys())


def differences(expected: Mapping[str, Any], got: Any) -> list[str]:
  """What of a tree of shapes is not as in a manifest, in words.

  ["['w']: shape [4] -> [8]", "['b']: dtype float32 -> bfloat16"]
  """
  asked = {
    jax.tree_util.keystr(path): {"shape": list(x.shape), "dtype": str(x.dtype)}
    for path, x in jax.tree_util.tree_leaves_with_path(got)
  }
  lines = [f"{path}: not asked for" for path in expected.keys() - asked.keys()]
  lines += [f"{path}: not in it" for path in asked.keys() - expected.keys()]
  for path in expected.keys() & asked.keys():
    for key in ("shape", "dtype"):
      old, new = expected[path][key], asked[path][key]
      if old != new:
        lines.append(f"{path}: {key} {old} -> {new}")
  return sorted(lines)


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
  """{'manifest', 'digest'}, as plain values."""
  text = json.dumps(manifest, sort_keys=True)
  return {"manifest": json.loads(text), "digest": _hash(text)}


def unseal(sealed: Any) -> dict[str, Any]:
  """What `seal` was given; a ValueError if it is not that."""
  if not isinstance(sealed, dict) or sealed.keys() != {"manifest", "digest"}:
    raise ValueError("its manifest is missing")
  text = json.dumps(sealed["manifest"], sort_keys=True)
  if _hash(text) != sealed["digest"]:
    raise ValueError("its manifest differs from its digest")
  return sealed["manifest"]


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def code() -> dict[str, str]:
  """What wrote a checkpoint: a hash of our sources, others' versions."""
  folder = Path(__file__).parents[1]
  ours = hashlib.sha256()
  for path in sorted(folder.rglob("*.py")):
    ours.update(path.relative_to(folder).as_posix().encode())
    ours.update(path.read_bytes())
  versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
  return {"sft_jax": ours.hexdigest()[:16], **versions}


def digest_rows(batch: Batch) -> UInt32[Array, "2"]:
  """64 bits over all that a batch holds; the order of its rows does not matter.

      d_j = sum_rows mix(sum_ft mix(x_ft + (f T + t + 1) * odd_j)),  j = 0, 1

  with x_ft the 32 bits of field f in slot t; what has K values a slot is K
  fields. A step does not depend on the order of its rows, which accumulation
  and processes change.
  """
  axes = batch.tokens.ndim
  lanes = lambda x: (
    x[..., None, :] if x.ndim == axes else jnp.swapaxes(x, -1, -2)
  )
  fields = [
    x.astype(jnp.int32) if x.dtype.itemsize < 4 else x
    for x in jax.tree.leaves(batch)
  ]
  fields = jnp.concatenate(
    [jax.lax.bitcast_convert_type(lanes(x), jnp.uint32) for x in fields], -2
  )
  shape = fields.shape[-2:]
  places = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape) + 1

  def mixed_sum(odd: int) -> Array:
    words = _mix(fields + places * np.uint32(odd))
    rows = words.sum((-2, -1), dtype=jnp.uint32)
    return _mix(rows).sum(dtype=jnp.uint32)

  return jnp.stack([mixed_sum(odd) for odd in _ODDS])


def extend_chain(chain: str, digests: Iterable[np.ndarray]) -> str:
  """The chain after further steps' digests."""
  for digest in digests:
    link = chain.encode() + np.asarray(digest, "<u4").tobytes()
    chain = hashlib.sha256(link).hexdigest()[:16]
  return chain
