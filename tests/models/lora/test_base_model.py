"""The base within the parameters: its predictions, and no second copy."""

import jax
import numpy as np
import pytest

from sft_jax.common import trees
from sft_jax.models import transformer
from sft_jax.models.config import config_from_fields
from sft_jax.models.lora import base_model, lora, quantize

SHAPE = config_from_fields(
  "qwen3",
  vocab_size=31,
  num_layers=2,
  d_model=16,
  d_ff=32,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  max_positions=32,
  init_std=0.3,
)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9)).astype(np.int32)


def logits(model, params):
  return model.logits(params, model.hidden(params, TOKENS))


def moved(params, trains):
  """As after some training: every trained leaf is another."""
  rng = np.random.default_rng(1)
  return trees.map_paths(
    lambda path, x: (
      x + 0.1 * rng.normal(size=x.shape).astype(np.float32)
      if trains(path)
      else x
    ),
    params,
  )


ADAPTERS = {
  "plain": lora.LoraConfig(2, 8.0),
  "dora": lora.LoraConfig(2, 8.0, dora=True),
  "pissa": lora.LoraConfig(2, 8.0, init="pissa"),
  "pissa and dora": lora.LoraConfig(2, 8.0, init="pissa", dora=True),
  "embedding too": lora.LoraConfig(
    2, 8.0, targets=(r"attn/(q|v)/",), also_train=("embed/", "norm")
  ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_base_of_adapted_parameters(name):
  """It predicts what it did before training, and shares its arrays."""
  adapters = ADAPTERS[name]
  plain = transformer.build(SHAPE)
  base = plain.init(jax.random.key(0))
  want = logits(plain, base)
  model = transformer.build(SHAPE, lora=adapters)
  start = lora.init(jax.random.key(1), base, adapters)
  copies = base_model.to_copy(start, adapters.trains)
  params = moved(start, adapters.trains)
  assert np.abs(logits(model, params) - want).max() > 0.1
  params = base_model.with_copies(params, copies)
  found = base_model.base_of(params, adapters.trains)
  np.testing.assert_allclose(logits(model, found), want, atol=1e-4)
  held = {id(x) for x in jax.tree.leaves(params)}
  assert {id(x) for x in jax.tree.leaves(found)} <= held
  # A copy is held of what trains whole, and of nothing else.
  whole = [p for p in trees.flatten(base) if "embed/" in p or "norm" in p]
  held = list(trees.flatten(copies))
  assert held == (whole if name == "embedding too" else [])
  assert trees.flatten(base_model.own(params)).keys() == (
    trees.flatten(start).keys()
  )


def test_the_base_of_a_quantised_model_is_the_quantised_one():
  adapters = ADAPTERS["plain"]
  model = transformer.build(SHAPE, lora=adapters)
  params = model.init(jax.random.key(0))
  packed = quantize.pack_tree(params, "int8", keep=adapters.trains)
  want = logits(model, packed)  # B is 0: the base.
  found = base_model.base_of(moved(packed, adapters.trains), adapters.trains)
  np.testing.assert_array_equal(logits(model, found), want)


def test_in_full_fine_tuning_all_of_it_is_a_copy():
  model = transformer.build(SHAPE)
  base = model.init(jax.random.key(0))
  trains = lambda path: not base_model.is_copy(path)
  params = moved(base, trains)
  assert base_model.base_of(params, trains) is None
  params = base_model.with_copies(params, base_model.to_copy(base, trains))
  found = base_model.base_of(params, trains)
  jax.tree.map(np.testing.assert_array_equal, found, base)
