"""Codes and scales against float64, brute force and the bounds of memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.common import flops, trees
from sft_jax.models import transformer
from sft_jax.models.config import config_from_fields
from sft_jax.models.lora import lora, quantize


def error(x, codec, axis=-2):
  """Relative error of the round trip, in float64."""
  codes, scale = quantize.encode(jnp.asarray(x), codec, axis=axis)
  y = np.asarray(quantize.decode(codes, scale, axis=axis), np.float64)
  return np.linalg.norm(y - x) / np.linalg.norm(x)


def test_nf4_values_are_those_of_the_paper():
  """Printed in QLoRA's appendix E to four places and more."""
  below = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911]
  above = [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
  values = quantize.nf4_values()
  np.testing.assert_allclose(values, [*below, 0.0, *above], atol=5e-5)


@pytest.mark.parametrize(
  ("codec", "low", "high"), [("int8", 0.004, 0.008), ("nf4", 0.085, 0.1)]
)
def test_error_of_normal_weights(codec, low, high):
  """int8: a step of max / 127 has a variance of step^2 / 12; nf4: 9 %."""
  x = 0.02 * np.random.default_rng(0).standard_normal((256, 96))
  assert low < error(x.astype(np.float32), codec) < high


@settings(max_examples=12, deadline=None)
@given(
  seed=st.integers(0, 2**32 - 1),
  size=st.sampled_from([2, 8, 24, 64, 96, 128]),
  codec=st.sampled_from(quantize.CODECS),
  axis=st.sampled_from([-1, -2]),
)
def test_every_code_is_the_nearest(seed, size, codec, axis):
  """Brute force over all values of the codec, block by block."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((size, 3)) * 10 ** rng.uniform(-3, 3, (1, 3))
  x = x.astype(np.float32)
  x = x if axis == -2 else x.T
  codes, scale = quantize.encode(jnp.asarray(x), codec, axis=axis)
  got = np.asarray(quantize.decode(codes, scale, axis=axis), np.float64)
  levels = {"int8": np.arange(-127, 128) / 127, "nf4": quantize.nf4_values()}
  block = int(np.gcd(size, 64))
  wide = np.repeat(np.asarray(scale, np.float64), block, axis=axis)
  # The scale is the largest magnitude to 8 bits.
  tops = np.moveaxis(np.abs(x), axis, -1).reshape(3, -1, block).max(-1)
  np.testing.assert_allclose(
    np.moveaxis(np.asarray(scale, np.float64), axis, -1), tops, rtol=2**-8
  )
  nearest = np.abs(x[..., None] - wide[..., None] * levels[codec]).min(-1)
  np.testing.assert_allclose(np.abs(got - x), nearest, atol=1e-6 * wide.max())


@pytest.mark.parametrize("codec", quantize.CODECS)
def test_zeros_stay_zeros(codec):
  codes, scale = quantize.encode(jnp.zeros((64, 2)), codec)
  assert not quantize.decode(codes, scale).any()


def test_what_cannot_be_is_refused():
  with pytest.raises(ValueError, match="got 'int4'"):
    quantize.encode(jnp.zeros((4, 4)), "int4")
  with pytest.raises(ValueError, match="nf4 of an axis of 5"):
    quantize.encode(jnp.zeros((5, 4)), "nf4")


# -- Models -------------------------------------------------------------------


def build(**fields):
  config = config_from_fields("llama", **fields)
  return transformer.build(config, param_dtype=jnp.bfloat16)


LLAMA_8B = {
  "vocab_size": 128256,
  "num_layers": 32,
  "d_model": 4096,
  "d_ff": 14336,
  "num_heads": 32,
  "num_kv_heads": 8,
  "head_dim": 128,
  "max_positions": 8192,
  "tie_embeddings": False,
}


@pytest.mark.parametrize(("codec", "bound"), [("int8", 0.55), ("nf4", 0.30)])
def test_memory_of_an_8b_base(codec, bound):
  """Of bfloat16: embeddings, head and norms counted, and kernels alone."""
  shapes = jax.eval_shape(build(**LLAMA_8B).init, jax.random.key(0))
  assert trees.count(shapes) == 8_030_261_248
  pack = functools.partial(quantize.pack_tree, codec=codec)
  packed = jax.eval_shape(pack, shapes)
  assert trees.num_bytes(packed) <= bound * trees.num_bytes(shapes)
  kernels, packed_kernels = (
    trees.partition(tree, lambda path: "/kernel" in path)[0]
    for tree in (shapes, packed)
  )
  share = trees.num_bytes(packed_kernels) / trees.num_bytes(kernels)
  assert share <= {"int8": 0.516, "nf4": 0.266}[codec]
  num = sum(
    quantize.num_scalars(*leaf) for leaf in trees.flatten(packed).items()
  )
  assert num == trees.count(shapes)


TINY = {
  "vocab_size": 32,
  "num_layers": 2,
  "d_model": 64,
  "d_ff": 128,
  "num_heads": 2,
  "num_kv_heads": 1,
  "head_dim": 32,
  "max_positions": 32,
  "init_std": 0.1,
  "tie_embeddings": True,
}


def test_a_packed_model_is_the_model_it_unpacks_to():
  """Hidden states, head and cached decoding, embeddings among them."""
  model = transformer.build(config_from_fields("llama", **TINY))
  params = jax.jit(model.init)(jax.random.key(0))
  packed = quantize.pack_tree(params, "nf4")
  names = {path.rpartition("/")[2] for path in trees.flatten(packed)}
  assert names == {
    "kernel_codes",
    "kernel_scale",
    "embedding_codes",
    "embedding_scale",
    "scale",
  }
  flat = trees.flatten(packed)
  whole = dict(quantize.unpack(flat, p) for p in flat if p.endswith("_codes"))
  whole |= {p: x for p, x in flat.items() if p.endswith("norm/scale")}
  whole = trees.unflatten(whole)
  tokens = np.arange(12, dtype=np.int32).reshape(2, 6)

  def logits(params):
    return model.logits(params, model.hidden(params, tokens))

  logits = jax.jit(logits)
  np.testing.assert_allclose(logits(packed), logits(whole), atol=1e-5)
  assert np.abs(logits(packed) - logits(params)).max() > 1e-3
  positions = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6))
  got, _ = jax.jit(model.decode)(
    packed, tokens, positions, model.init_cache(2, 8)
  )
  np.testing.assert_allclose(got, model.hidden(whole, tokens), atol=1e-5)
  outside = model.hidden(packed, np.array([[1, 99]], np.int32))
  assert np.isnan(outside[0, 1]).all()  # No other token's vector.


def test_decoded_kernels_of_all_layers_never_exist_at_once():
  """Temporaries of a backward pass stay below the decoded kernels' size."""
  fields = TINY | {"num_layers": 12, "d_model": 128, "d_ff": 512}
  adapters = lora.LoraConfig(rank=2, alpha=2.0)
  model = transformer.build(
    config_from_fields("llama", **fields), lora=adapters
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  trained, frozen = trees.partition(shapes, adapters.trains)
  tokens = np.zeros((1, 4), np.int32)

  def temporaries(frozen):
    def loss(trained, frozen):
      return model.hidden(trees.merge(trained, frozen), tokens).sum()

    compiled = jax.jit(jax.grad(loss)).lower(trained, frozen).compile()
    return flops.program(compiled).temporaries

  pack = functools.partial(quantize.pack_tree, codec="nf4")
  kernels, _ = trees.partition(frozen, lambda path: path.endswith("/kernel"))
  extra = temporaries(jax.eval_shape(pack, frozen)) - temporaries(frozen)
  # Of 12 layers, two at most: one forward, one backward.
  assert extra < trees.num_bytes(kernels) * 2 / 12, extra
