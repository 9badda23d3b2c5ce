"""State laws of the decoder, on a tiny model with wide weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.common import trees
from sft_jax.models import config as config_lib
from sft_jax.models import transformer
from sft_jax.models.config import LayerKind
from sft_jax.models.rope import Rope


def make_config(family="qwen3", **changes):
  fields = {
    "vocab_size": 61,
    "num_layers": 3,
    "d_model": 24,
    "d_ff": 40,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 10,
    "max_positions": 64,
    "init_std": 0.3,
  }
  return config_lib.config_from_fields(family, **(fields | changes))


@functools.cache
def build(family="qwen3", *, fields=(), **kwargs):
  """A model whose functions are compiled once for all tests."""
  model = transformer.build(make_config(family, **dict(fields)), **kwargs)
  params = jax.jit(model.init)(jax.random.key(0))
  hidden, decode = jax.jit(model.hidden), jax.jit(model.decode)
  return model._replace(hidden=hidden, decode=decode), params


# Three documents and padding, as packing lays them out.
TOKENS = np.random.default_rng(0).integers(1, 61, (1, 16)).astype(np.int32)
SEGMENTS = np.array([[1] * 6 + [2] * 1 + [3] * 6 + [0] * 3], np.int32)
POSITIONS = np.array([[*range(6), 0, *range(6), 0, 0, 0]], np.int32)
DOCUMENTS = [slice(0, 6), slice(6, 7), slice(7, 13)]


def test_packed_documents_are_as_if_alone():
  model, params = build()
  packed = model.hidden(params, TOKENS, POSITIONS, SEGMENTS)
  for where in DOCUMENTS:
    alone = model.hidden(params, TOKENS[:, where])
    np.testing.assert_allclose(packed[:, where], alone, atol=1e-5)


def test_packed_gradients_are_the_sum_of_those_alone():
  model, params = build()
  goal = jax.random.normal(jax.random.key(1), (1, 16, 24))

  def loss(params, where, positions, segments):
    hidden = model.hidden(params, TOKENS[:, slice(*where)], positions, segments)
    kept = segments[..., None] > 0
    return jnp.sum(jnp.where(kept, hidden * goal[:, slice(*where)], 0))

  everything = (0, 16)
  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  packed = gradient(params, everything, POSITIONS, SEGMENTS)
  alone = [
    gradient(
      params,
      (d.start, d.stop),
      POSITIONS[:, d],
      np.ones_like(SEGMENTS[:, d]),
    )
    for d in DOCUMENTS
  ]
  total = jax.tree.map(lambda *xs: sum(xs), *alone)
  for path, x in trees.flatten(total).items():
    got = trees.flatten(packed)[path]
    np.testing.assert_allclose(got, x, atol=1e-4, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize("where", [*DOCUMENTS, slice(13, 16)])
def test_no_token_reaches_another_segment(where):
  """Changing one segment's tokens moves no bit of any other segment."""
  model, params = build()
  hidden = model.hidden
  before = hidden(params, TOKENS, POSITIONS, SEGMENTS)
  changed = TOKENS.copy()
  changed[:, where] = (changed[:, where] + 7) % 60 + 1
  after = hidden(params, changed, POSITIONS, SEGMENTS)
  outside = np.ones(16, bool)
  outside[where] = False
  assert np.max(np.abs(after - before)[:, outside]) == 0.0
  assert np.max(np.abs(after - before)[:, where]) > 0.0


def test_no_token_reaches_an_earlier_one():
  model, params = build()
  before = model.hidden(params, TOKENS)
  changed = TOKENS.copy()
  changed[:, 9] = changed[:, 9] % 60 + 1
  after = model.hidden(params, changed)
  assert np.max(np.abs(after - before)[:, :9]) == 0.0
  assert np.min(np.max(np.abs(after - before)[:, 9:], axis=-1)) > 0.0


def test_positions_default_to_restarting_at_each_segment():
  model, params = build()
  given = model.hidden(params, TOKENS, POSITIONS, SEGMENTS)
  default = model.hidden(params, TOKENS, None, SEGMENTS)
  np.testing.assert_array_equal(given, default)


def test_all_padding_is_finite_in_value_and_gradient():
  model, params = build()
  zeros = np.zeros((2, 8), np.int32)

  def loss(params):
    return jnp.sum(model.hidden(params, zeros, zeros, zeros) ** 2)

  value, gradient = jax.jit(jax.value_and_grad(loss))(params)
  assert np.isfinite(value)
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


def test_scan_unrolled_and_remat_give_the_same_gradients():
  def gradient(**kwargs):
    model, params = build(**kwargs)

    def loss(params):
      return jnp.sum(jnp.sin(model.hidden(params, TOKENS)))

    return jax.jit(jax.grad(loss))(params)

  want = trees.flatten(gradient())
  for kwargs in (
    {"scan": False},
    {"remat": "norms"},
    {"remat": "attention"},
    {"remat": "full"},
    {"remat": "full", "scan": False},
    {"remat": "offload"},
  ):
    for path, x in trees.flatten(gradient(**kwargs)).items():
      np.testing.assert_allclose(
        x, want[path], atol=2e-4, rtol=1e-4, err_msg=f"{kwargs} {path}"
      )


@pytest.mark.parametrize("scan", [True, False])
def test_cached_decoding_equals_the_full_pass(scan):
  """Rows of unequal lengths, prefilled together, then fed token by token."""
  model, params = build(scan=scan)
  lengths, total = [5, 2, 7], 10
  tokens = np.random.default_rng(1).integers(1, 61, (3, total)).astype(np.int32)
  want = model.hidden(params, tokens)
  column = np.arange(8)[None]
  positions = np.where(column < np.array(lengths)[:, None], column, -1)
  cache = model.init_cache(3, 12)
  hidden, cache = model.decode(
    params, tokens[:, :8], positions.astype(np.int32), cache
  )
  for row, n in enumerate(lengths):
    np.testing.assert_allclose(hidden[row, :n], want[row, :n], atol=1e-5)
  at = np.array(lengths, np.int32)
  while (at < total).any():
    live = at < total
    positions = np.where(live, at, -1)[:, None].astype(np.int32)
    step = tokens[np.arange(3), np.minimum(at, total - 1)][:, None]
    hidden, cache = model.decode(params, step, positions, cache)
    for row in np.flatnonzero(live):
      np.testing.assert_allclose(hidden[row, 0], want[row, at[row]], atol=1e-5)
    at += live
  np.testing.assert_array_equal(
    cache["positions"], [[*range(total), -1, -1]] * 3
  )


def mixed(layers, **kwargs):
  """A model whose layers differ, and its parameters."""
  config = make_config("gemma2", num_layers=len(layers))
  config = dataclasses.replace(config, layers=layers)
  model = transformer.build(config, **kwargs)
  return model, jax.jit(model.init)(jax.random.key(0))


LOCAL, FAR = LayerKind(3, Rope(100.0)), LayerKind(None, Rope(1000.0))


def test_layers_that_differ_are_the_same_scanned_and_unrolled():
  layers = (LOCAL, LayerKind(None, None), LOCAL, FAR)
  scanned, params = mixed(layers)
  unrolled, _ = mixed(layers, scan=False)
  want = jax.jit(scanned.hidden)(params, TOKENS, POSITIONS, SEGMENTS)
  got = jax.jit(unrolled.hidden)(params, TOKENS, POSITIONS, SEGMENTS)
  np.testing.assert_allclose(got, want, atol=1e-5)
  # Each layer's own kind counts: in another order it is another model.
  other, _ = mixed(layers[::-1])
  moved = jax.jit(other.hidden)(params, TOKENS, POSITIONS, SEGMENTS)
  assert np.max(np.abs(moved - want)) > 0.1


def test_a_window_reaches_so_far_and_no_farther():
  model, params = mixed((LOCAL,))
  hidden = jax.jit(model.hidden)
  before = hidden(params, TOKENS)
  changed = TOKENS.copy()
  changed[:, 5] = changed[:, 5] % 60 + 1
  moved = np.max(np.abs(hidden(params, changed) - before), axis=(0, 2)) > 0
  assert np.flatnonzero(moved).tolist() == [5, 6, 7]


def test_padding_is_neither_written_nor_seen():
  model, params = build()
  cache = model.init_cache(1, 4)
  _, after = model.decode(
    params, np.array([[5, 6]]), np.array([[-1, -1]]), cache
  )
  for name in cache:
    np.testing.assert_array_equal(after[name], cache[name])


def test_full_cache_with_a_padding_row_is_finite():
  model, params = build()
  cache = model.init_cache(1, 2)
  _, cache = model.decode(params, np.array([[5, 6]]), np.array([[0, 1]]), cache)
  hidden, _ = model.decode(params, np.array([[7]]), np.array([[-1]]), cache)
  assert np.all(np.isfinite(hidden))


def test_a_position_beyond_the_cache_is_seen():
  model, params = build()
  cache = model.init_cache(1, 2)
  tokens, positions = np.array([[5, 6, 7]]), np.array([[0, 1, 2]])
  hidden, _ = model.decode(params, tokens, positions, cache)
  assert np.all(np.isfinite(hidden[:, :2]))
  assert np.all(np.isnan(hidden[:, 2]))


@pytest.mark.parametrize("token", [61, 999, -1])
def test_a_token_outside_the_vocabulary_is_seen(token):
  model, params = build()
  hidden = model.hidden(params, np.array([[3, token], [3, 4]], np.int32))
  assert np.all(np.isnan(hidden[0]))
  assert np.all(np.isfinite(hidden[1]))


def test_head_is_the_embedding_exactly_when_tied():
  model, params = build()
  assert model.head(params) is params["embed"]["embedding"]
  model, params = build(fields=(("tie_embeddings", False),))
  assert model.head(params) is params["head"]["embedding"]
  assert params["head"]["embedding"].shape == (61, 24)


def test_logits_are_float32_products_with_the_head():
  model, params = build(fields=(("tie_embeddings", False),))
  hidden = model.hidden(params, TOKENS)
  logits = model.logits(params, hidden)
  want = np.asarray(hidden) @ np.asarray(params["head"]["embedding"]).T
  np.testing.assert_allclose(logits, want, atol=1e-4)


def test_bfloat16_computes_in_bfloat16_and_stays_near():
  wide, params = build()
  model, _ = build(dtype="bfloat16")
  hidden = model.hidden(params, TOKENS)
  assert hidden.dtype == jnp.bfloat16
  assert model.logits(params, hidden).dtype == jnp.float32
  want = wide.hidden(params, TOKENS)
  gap = np.abs(hidden.astype(np.float32) - want)
  assert 0 < np.mean(gap) < 0.05
  assert model.init_cache(1, 2)["k"].dtype == jnp.bfloat16


def test_fresh_parameters_have_the_stated_spread():
  fields = {"vocab_size": 512, "d_model": 64, "d_ff": 128, "init_std": 0.05}
  _, params = build(fields=tuple(fields.items()))
  flat = trees.flatten(params)
  assert abs(np.std(flat["embed/embedding"]) - 0.05) < 0.002
  assert abs(np.std(flat["layers/mlp/up/kernel"]) - 0.05) < 0.002
  output = 0.05 / np.sqrt(6)
  assert abs(np.std(flat["layers/mlp/down/kernel"]) - output) < 0.001
  assert abs(np.std(flat["layers/attn/o/kernel"]) - output) < 0.001
  assert np.all(flat["final_norm/scale"] == 1)
  # Layers are drawn apart.
  up = flat["layers/mlp/up/kernel"]
  assert not np.any(up[0] == up[1])


@pytest.mark.parametrize(
  ("kwargs", "named"),
  [
    ({"remat": "some"}, "some"),
    ({"attention": "flash"}, "flash"),
    ({"dtype": "float16"}, "float16"),
  ],
)
def test_what_is_not_implemented_is_refused_by_name(kwargs, named):
  with pytest.raises(ValueError, match=named):
    transformer.build(make_config(), **kwargs)
