"""Folding in: the same outputs, and an honest word on what rounding lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.common import trees
from sft_jax.models import transformer
from sft_jax.models.config import config_from_fields
from sft_jax.models.lora import lora, merge, quantize

TOKENS = np.arange(1, 13, dtype=np.int32).reshape(2, 6)
CONFIG = config_from_fields(
  "qwen2",
  vocab_size=31,
  num_layers=2,
  d_model=16,
  d_ff=24,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  max_positions=32,
  init_std=0.3,
)
VARIANTS = {
  "plain": {"rank_pattern": (("attn/", 4),), "rslora": True},
  "dora of pissa": {"init": "pissa", "dora": True},
}


def trained(name, spread=0.3):
  """A model and random parameters, adapters far from any start."""
  adapters = lora.LoraConfig(rank=2, alpha=6.0, **VARIANTS[name])
  model = transformer.build(CONFIG, lora=adapters)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  rng = np.random.default_rng(0)

  def draw(path, x):
    width = spread if lora.is_adapter(path) else 0.3
    x = rng.normal(0, width, x.shape)
    return jnp.asarray(1 + x if "lora_m" in path else x, jnp.float32)

  return model, trees.map_paths(draw, shapes)


def logits(model, params):
  function = lambda p: model.logits(p, model.hidden(p, TOKENS))
  return jax.jit(function)(params)


@pytest.mark.parametrize("name", VARIANTS)
def test_merged_logits_equal_the_adapted_ones(name):
  model, params = trained(name)
  base, _ = trees.partition(params, lambda path: not lora.is_adapter(path))
  merged, lost, _ = merge.merge(params, model.lora)
  assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base)
  want = logits(model, params)
  np.testing.assert_allclose(logits(model, merged), want, atol=1e-4)
  assert np.abs(want - logits(model, base)).max() > 0.1
  assert lost < 1e-6
  # A quantised base is decoded: what the adapters were trained beside.
  packed = merge.merge(quantize.pack_tree(params, "nf4"), model.lora).params
  flat = trees.flatten(quantize.pack_tree(base, "nf4"))
  decoded = dict(quantize.unpack(flat, p) for p in flat if "_codes" in p)
  rest = {p: x for p, x in trees.flatten(params).items() if p not in decoded}
  again = merge.merge(trees.unflatten(decoded | rest), model.lora).params
  jax.tree.map(np.testing.assert_array_equal, packed, again)


def test_what_bfloat16_loses_of_a_small_update_is_said():
  """Against float64: base of 0.3, updates a hundred times smaller."""
  model, params = trained("plain", spread=0.02)
  merged, lost, path = merge.merge(params, model.lora, dtype=jnp.bfloat16)
  flat = trees.flatten(params)
  worst = 0.0
  for kernel in lora.target_paths(params, "all-linear"):
    parent = kernel.removesuffix("/kernel")
    base, a, b = (
      np.asarray(flat[f"{parent}/{leaf}"], np.float64)
      for leaf in ("kernel", "lora_a", "lora_b")
    )
    delta = model.lora.scale(lora.module_of(kernel)) * a @ b
    stored = np.asarray(trees.flatten(merged)[kernel], np.float64)
    share = np.linalg.norm(stored - base - delta) / np.linalg.norm(delta)
    worst = max(worst, share)
  assert 0.1 < lost < 1
  np.testing.assert_allclose(lost, worst, rtol=1e-3)
  assert path.endswith("/kernel")


def test_without_adapters_nothing_changes():
  _, params = trained("plain")
  base, _ = trees.partition(params, lambda path: not lora.is_adapter(path))
  merged, lost, path = merge.merge(base, None)
  assert (lost, path) == (0.0, "")
  jax.tree.map(np.testing.assert_array_equal, merged, base)
  with pytest.raises(ValueError, match="the parameters hold adapters"):
    merge.merge(params, None)
