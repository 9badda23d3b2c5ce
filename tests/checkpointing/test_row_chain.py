"""The chain is what its page says, counted by hand in Python's integers."""

import hashlib

import jax.numpy as jnp
import numpy as np

from sft_jax.checkpointing.digests import ODDS
from sft_jax.checkpointing.row_chain import digest_rows, extend
from sft_jax.common.batch import Batch

WORD = 1 << 32


def mix(x: int) -> int:
  x = (x ^ (x >> 16)) * 0x85EBCA6B % WORD
  x = (x ^ (x >> 13)) * 0xC2B2AE35 % WORD
  return x ^ (x >> 16)


def by_hand(batch: Batch) -> list[int]:
  """The formula of `digest_rows`, slot by slot."""
  length = batch.tokens.shape[-1]
  wide = [x.astype(np.int32) if x.itemsize < 4 else x for x in batch]
  fields = [x.reshape(-1, length).view(np.uint32) for x in wide]
  digest = []
  for odd in ODDS:
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
  return Batch(ids(), ids(), weights, ids(), ids(), parts, ids())


def test_digest_is_its_formula():
  for seed in range(3):
    batch = make_batch(seed)
    assert digest_rows(batch).tolist() == by_hand(batch)


def test_digest_sees_every_field_and_slot_but_not_the_order_of_rows():
  batch = make_batch(0)
  same = lambda other: (
    digest_rows(batch).tolist() == digest_rows(other).tolist()
  )
  flat = Batch(*(x.reshape(1, 6, 7)[:, ::-1] for x in batch))
  assert same(flat)
  for name in Batch._fields:
    x = getattr(batch, name).copy()
    x[1, 2, 3] += 1
    assert not same(batch._replace(**{name: x}))
  swapped = Batch(*(jnp.asarray(x)[..., ::-1] for x in batch))
  assert not same(swapped)
  moved = batch.tokens.copy()
  moved[0, :2] = moved[0, 1::-1]  # Tokens of one row with another's weights.
  assert not same(batch._replace(tokens=moved))


def test_chain_folds_steps_in_order():
  one, two = np.array([1, 2], np.uint32), np.array([3, 4], np.uint32)
  first = hashlib.sha256(bytes([1, 0, 0, 0, 2, 0, 0, 0])).hexdigest()[:16]
  assert extend("", [one]) == first
  assert extend("", [one, two]) == extend(first, [two])
  assert extend("", [one, two]) != extend("", [two, one])
