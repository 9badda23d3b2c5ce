"""Digests see every bit and no sharding; a sealed manifest is whole."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sft_jax.checkpointing import digests
from sft_jax.common import sharding
from sft_jax.common.batch import Batch


def test_every_single_bit_changes_the_digest():
  x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
  seen = {tuple(np.asarray(digests.digest(jnp.asarray(x))))}
  raw = x.view(np.uint32)
  for i in range(3):
    for j in range(5):
      for bit in range(32):
        flipped = raw.copy()
        flipped[i, j] ^= np.uint32(1) << np.uint32(bit)
        seen.add(
          tuple(
            np.asarray(digests.digest(jnp.asarray(flipped.view(np.float32))))
          )
        )
  assert len(seen) == 1 + 3 * 5 * 32


def test_digest_sees_order_and_not_sharding():
  x = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
  mesh = sharding.make_mesh(2, 4, 1)
  spread = jax.device_put(x, sharding.row_sharding(mesh))
  whole = lambda x: digests.describe({"x": x})["['x']"]["digest"]
  assert whole(x) == whole(spread)
  assert whole(x) != whole(x[::-1])


@pytest.mark.parametrize(
  "spec", [("data",), ("fsdp", "tensor"), (None, ("data", "fsdp"))]
)
def test_the_digest_of_an_array_is_the_sum_of_its_shards(spec):
  x = jax.random.normal(jax.random.key(0), (8, 16)).astype(jnp.bfloat16)
  place = NamedSharding(sharding.make_mesh(2, 2, 2), PartitionSpec(*spec))
  entry = digests.describe({"x": jax.device_put(x, place)})["['x']"]
  shards = entry["blocks"]["digests"]
  assert len(shards) == np.prod(entry["blocks"]["cut"]) > 1
  halves = lambda d: np.array([int(d[:8], 16), int(d[8:], 16)], np.uint32)
  total = sum(map(halves, shards), np.zeros(2, np.uint32))
  assert (total == halves(entry["digest"])).all()


def test_a_damaged_shard_is_named():
  mesh = sharding.make_mesh(1, 8, 1)
  x = np.arange(64, dtype=np.float32).reshape(8, 8)
  spread = jax.device_put(x, sharding.row_sharding(mesh))
  expected = digests.describe({"x": spread, "y": jnp.ones(3)})
  assert digests.damaged(expected, {"x": x, "y": jnp.ones(3)}) == []
  x[5, 1] = np.nextafter(x[5, 1], np.float32(np.inf))
  assert digests.damaged(expected, {"x": x, "y": jnp.ones(3)}) == [
    "['x'] (shards [5] of 8)"
  ]
  assert digests.damaged(expected, {"x": x}) == [
    "['x'] (shards [5] of 8)",
    "['y']",
  ]


def test_differences_name_what_was_saved_and_what_is_asked_for():
  held = digests.describe({"a": jnp.ones(2), "b": jnp.ones(2)})
  asked = {"a": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(2)}
  assert digests.differences(held, asked) == [
    "['a']: dtype float32 -> bfloat16",
    "['b']: not asked for",
    "['c']: not in it",
  ]
  wider = {"a": jnp.ones(3), "b": jnp.ones(2)}
  assert digests.differences(held, wider) == ["['a']: shape [2] -> [3]"]


def test_a_seal_is_broken_by_any_change():
  sealed = digests.seal({"step": 3, "meta": {"x": 0.1, "y": (1, 2)}})
  assert digests.unseal(sealed) == {"step": 3, "meta": {"x": 0.1, "y": [1, 2]}}
  for broken in (
    {**sealed, "digest": "0" + sealed["digest"][1:]},
    {**sealed, "manifest": {"step": 4}},
    {"manifest": sealed["manifest"]},
    None,
  ):
    with pytest.raises(ValueError, match="its manifest"):
      digests.unseal(broken)


# -- Row chain, counted by hand in Python's integers --------------------------

WORD = 1 << 32


def mix(x: int) -> int:
  x = (x ^ (x >> 16)) * 0x85EBCA6B % WORD
  x = (x ^ (x >> 13)) * 0xC2B2AE35 % WORD
  return x ^ (x >> 16)


def by_hand(batch: Batch) -> list[int]:
  """The formula of `digest_rows`, slot by slot."""
  length = batch.tokens.shape[-1]
  fields = jax.tree.leaves(batch)  # Without what is None.
  wide = [x.astype(np.int32) if x.itemsize < 4 else x for x in fields]
  each = [x.reshape(-1, length, x.size // batch.tokens.size) for x in wide]
  fields = [x[..., k].view(np.uint32) for x in each for k in range(x.shape[2])]
  digest = []
  for odd in digests._ODDS:
    total = 0
    for row in range(len(fields[0])):
      words = 0
      for f, field in enumerate(fields):
        for t, x in enumerate(field[row].tolist()):
          words += mix((x + (f * length + t + 1) * odd) % WORD)
      total += mix(words % WORD)
    digest.append(total % WORD)
  return digest


def make_batch(seed: int) -> Batch:
  rng = np.random.default_rng(seed)
  ids = lambda: rng.integers(0, 50, (2, 3, 7)).astype(np.int32)
  weights = rng.random((2, 3, 7)).astype(np.float32)
  parts = ids().astype(np.uint8)
  taught = np.stack([ids(), ids()], axis=-1), np.stack([weights] * 2, axis=-1)
  return Batch(ids(), ids(), weights, ids(), ids(), parts, ids(), *taught)


def test_digest_is_its_formula():
  for seed in range(3):
    batch = make_batch(seed)
    assert digests.digest_rows(batch).tolist() == by_hand(batch)


def test_digest_sees_every_field_and_slot_but_not_the_order_of_rows():
  batch = make_batch(0)
  same = lambda other: (
    digests.digest_rows(batch).tolist() == digests.digest_rows(other).tolist()
  )
  flat = jax.tree.map(lambda x: x.reshape(1, 6, *x.shape[2:])[:, ::-1], batch)
  assert same(flat)
  for name in Batch._fields[: len(jax.tree.leaves(batch))]:
    x = getattr(batch, name).copy()
    x[1, 2, 3] += 1
    assert not same(batch._replace(**{name: x}))
  swapped = jax.tree.map(lambda x: jnp.asarray(x)[..., ::-1], batch)
  assert not same(swapped)
  moved = batch.tokens.copy()
  moved[0, :2] = moved[0, 1::-1]  # Tokens of one row with another's weights.
  assert not same(batch._replace(tokens=moved))


def test_chain_folds_steps_in_order():
  one, two = np.array([1, 2], np.uint32), np.array([3, 4], np.uint32)
  first = hashlib.sha256(bytes([1, 0, 0, 0, 2, 0, 0, 0])).hexdigest()[:16]
  assert digests.extend_chain("", [one]) == first
  assert digests.extend_chain("", [one, two]) == digests.extend_chain(
    first, [two]
  )
  assert digests.extend_chain("", [one, two]) != digests.extend_chain(
    "", [two, one]
  )
