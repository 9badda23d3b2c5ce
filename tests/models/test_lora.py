"""Adapters: the formula, a start that changes nothing, folding in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax import trees
from sft_jax.models import config as config_lib
from sft_jax.models import lora, transformer
from sft_jax.models.layers import Linear

TOKENS = np.arange(1, 13, dtype=np.int32).reshape(2, 6)


@functools.cache
def build(adapters=None):
  config = config_lib.config_from_fields(
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
  model = transformer.build(config, lora=adapters)
  return model, jax.jit(model.init)(jax.random.key(0))


ALL = lora.LoraConfig(rank=2, alpha=6.0)


def widen(params):
  """Adapters that matter: both halves random."""
  keys = iter(jax.random.split(jax.random.key(7), 99))
  return trees.map_paths(
    lambda path, x: (
      0.3 * jax.random.normal(next(keys), x.shape)
      if lora.is_adapter(path)
      else x
    ),
    params,
  )


def test_linear_adds_the_scaled_product():
  rng = np.random.default_rng(0)
  x, w, a, b, bias = (
    rng.standard_normal(shape).astype(np.float32)
    for shape in ((3, 4), (4, 5), (4, 2), (2, 5), (5,))
  )
  params = {"kernel": w, "lora_a": a, "lora_b": b, "bias": bias}
  linear = Linear(5, use_bias=True, lora_scale=1.5)
  got = linear.apply({"params": params}, jnp.asarray(x))
  np.testing.assert_allclose(got, x @ w + bias + 1.5 * x @ a @ b, atol=1e-5)


def test_an_adapter_that_nobody_asked_for_is_refused():
  _, params = build(ALL)
  model, _ = build()
  with pytest.raises(ValueError, match="hold a LoRA adapter"):
    model.hidden(params, TOKENS)


def test_the_first_step_is_the_base_model_to_the_bit():
  model, params = build(ALL)
  hidden = jax.jit(model.hidden)
  base, _ = trees.partition(params, lambda path: not lora.is_adapter(path))
  np.testing.assert_array_equal(hidden(params, TOKENS), hidden(base, TOKENS))
  assert not np.array_equal(hidden(widen(params), TOKENS), hidden(base, TOKENS))


def test_at_the_start_only_b_has_a_gradient():
  """d/dA passes through B, which is zero."""
  model, params = build(ALL)

  def loss(params):
    return jnp.sum(jnp.sin(model.hidden(params, TOKENS)))

  for path, x in trees.flatten(jax.jit(jax.grad(loss))(params)).items():
    if path.endswith("lora_a"):
      assert np.all(x == 0), path
    elif path.endswith("lora_b"):
      assert np.any(x != 0), path


def test_fresh_adapters_have_the_shapes_and_spread_of_peft():
  _, params = build(ALL)
  for path, x in trees.flatten(params).items():
    if path.endswith("lora_a"):
      layers, fan_in, rank = x.shape
      assert (layers, rank) == (2, 2)
      bound = 1 / np.sqrt(fan_in)
      assert 0.7 * bound < np.max(np.abs(x)) <= bound
      assert not np.any(x[0] == x[1])
    elif path.endswith("lora_b"):
      assert np.all(x == 0)


def test_merging_keeps_the_outputs_and_drops_the_adapters():
  model, params = build(ALL)
  params = widen(params)
  merged = lora.merge(params, ALL)
  assert not any(lora.is_adapter(path) for path in trees.flatten(merged))
  base, _ = build()
  want = model.hidden(params, TOKENS)
  np.testing.assert_allclose(base.hidden(merged, TOKENS), want, atol=1e-4)


def test_merging_adds_in_float32_and_keeps_the_dtype():
  kernel = jnp.full((1, 2, 2), 1.0, jnp.bfloat16)
  node = {
    "kernel": kernel,
    "lora_a": jnp.full((1, 2, 1), 1 / 64, jnp.bfloat16),
    "lora_b": jnp.full((1, 1, 2), 1.0, jnp.bfloat16),
  }
  config = lora.LoraConfig(rank=1, alpha=1.0)
  merged = lora.merge({"layers": {"up": node}}, config)
  assert merged["layers"]["up"]["kernel"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(merged["layers"]["up"]["kernel"], 1 + 1 / 64)


@pytest.mark.parametrize(
  ("targets", "modules"),
  [
    ("all-linear", "q k v o gate up down"),
    ("attention", "q k v o"),
    ((r"attn/(q|v)/", "mlp/down"), "q v down"),
    (r"attn/q/", "q"),
  ],
)
def test_targets_choose_kernels(targets, modules):
  _, params = build()
  chosen = lora.target_paths(params, targets)
  assert {path.split("/")[-2] for path in chosen} == set(modules.split())


@pytest.mark.parametrize("targets", ["q_proj", ("attn/q/", "mlp/dwon"), ()])
def test_targets_that_match_nothing_are_refused(targets):
  _, params = build()
  with pytest.raises(ValueError, match=r"lora\.targets"):
    lora.target_paths(params, targets)


def test_a_rank_below_one_is_refused():
  with pytest.raises(ValueError, match="rank is 0"):
    lora.LoraConfig(rank=0, alpha=1.0)
