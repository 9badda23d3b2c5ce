"""Latent attention: what is cached, what is folded, who sees whom."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.common import sharding
from sft_jax.models import kv_cache
from sft_jax.models.attention import latent
from sft_jax.models.hf import load_save
from sft_jax.models.lora import lora, merge, quantize

GOLDEN = Path(__file__).parents[1] / "goldens" / "deepseek_v3"


@pytest.mark.parametrize("more", [{}, {"dora": True}, {"init": "pissa"}])
@pytest.mark.parametrize("codec", ["", "int8"])
def test_decoding_sees_adapters_and_codes(more, codec):
  """The kernel that is absorbed is the one that is exported."""
  adapters = lora.LoraConfig(rank=3, alpha=5.0, **more)
  path, keys = "layers/attn/kv_up", iter(jax.random.split(jax.random.key(0), 9))
  kernel = jax.random.normal(next(keys), (12, 20))
  flat = lora.fresh(next(keys), f"{path}/kernel", kernel, adapters)
  flat[f"{path}/lora_b"] += jax.random.normal(next(keys), (3, 20))
  if codec:
    flat |= quantize.pack(f"{path}/kernel", flat.pop(f"{path}/kernel"), codec)
  leaves = {name.removeprefix(f"{path}/"): x for name, x in flat.items()}
  got = latent._whole("attn/kv_up", leaves, adapters)
  tree = {"layers": {"attn": {"kv_up": leaves}}}
  want = merge.merge(tree, adapters).params["layers"]["attn"]["kv_up"]["kernel"]
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
  assert float(jnp.max(jnp.abs(got - kernel))) > 0.1


def test_the_cache_holds_one_vector_of_each_token():
  """C + P numbers, whatever the heads; in 8 bits with one scale."""
  model, params = load_save.load_pretrained(GOLDEN)
  c = model.config
  cache = model.init_cache(1, 8)
  assert {name: x.shape for name, x in cache.items()} == {
    "positions": (1, 8),
    "k": (c.num_layers, 1, 1, 8, c.kv_rank + c.rope_dim),
  }
  small = kv_cache.init(c, 1, 8, jnp.float32, int8=True)
  assert small["k"].dtype == jnp.int8
  tokens = np.arange(3, 11)[None]
  at = np.arange(8)[None]
  whole = model.hidden(params, tokens)
  rough, _ = model.decode(params, tokens, at, small)
  exact, _ = model.decode(params, tokens, at, cache)
  np.testing.assert_allclose(exact, whole, atol=1e-4)
  assert 1e-4 < float(jnp.max(jnp.abs(rough - whole))) < 0.5


def test_documents_of_a_pack_never_meet_on_any_mesh():
  """A changed token changes other documents by exactly nothing; eight devices
  compute what one does."""
  model, params = load_save.load_pretrained(GOLDEN)
  tokens = np.random.default_rng(0).integers(3, 61, (2, 16)).astype(np.int32)
  segments = np.repeat([[1, 2, 0]], [6, 8, 2], axis=1).repeat(2, axis=0)
  hidden = jax.jit(lambda t: model.hidden(params, t, None, segments))
  one = hidden(tokens)
  changed = tokens.copy()
  changed[:, 2] = (changed[:, 2] + 1) % 61
  other = hidden(changed)
  np.testing.assert_array_equal(one[:, 6:14], other[:, 6:14])
  np.testing.assert_array_equal(one[:, :2], other[:, :2])
  assert float(jnp.max(jnp.abs(one[:, 2:6] - other[:, 2:6]))) > 1e-3
  if jax.device_count() < 8:
    pytest.skip("needs eight (fake) devices")
  mesh = sharding.make_mesh(2, 1, 2, 2)
  model, placed = load_save.load_pretrained(
    GOLDEN,
    mesh=mesh,
    shardings=lambda tree: sharding.param_shardings(tree, mesh),
  )
  many = jax.jit(lambda p, t: model.hidden(p, t, None, segments))
  np.testing.assert_allclose(many(placed, tokens), one, atol=2e-5)
