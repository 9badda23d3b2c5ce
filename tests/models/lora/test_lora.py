"""Adapters: which there are, and a start that changes nothing."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.common import trees
from sft_jax.models import config as config_lib
from sft_jax.models import transformer
from sft_jax.models.hf import load_save
from sft_jax.models.layers import linear
from sft_jax.models.lora import lora, merge

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
  params = jax.jit(model.init)(jax.random.key(0))
  return model._replace(hidden=jax.jit(model.hidden)), params


ALL = lora.LoraConfig(rank=2, alpha=6.0)


def test_the_first_step_is_the_base_model_to_the_bit():
  model, params = build(ALL)
  hidden = model.hidden
  base, _ = trees.partition(params, lambda path: not lora.is_adapter(path))
  np.testing.assert_array_equal(hidden(params, TOKENS), hidden(base, TOKENS))


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
  seen = []
  for path, x in trees.flatten(params).items():
    if path.endswith("lora_a"):
      layers, fan_in, rank = x.shape
      assert (layers, rank) == (2, 2)
      bound = 1 / np.sqrt(fan_in)
      assert 0.7 * bound < np.max(np.abs(x)) <= bound
      assert not np.any(x[0] == x[1])
      seen.append(x.ravel()[:32])
    elif path.endswith("lora_b"):
      assert np.all(x == 0)
  # Each module draws its own.
  assert len(np.unique(np.concatenate(seen))) == 32 * len(seen)


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


def test_rank_and_alpha_by_pattern():
  adapters = lora.LoraConfig(
    rank=2,
    alpha=6.0,
    rank_pattern=(("attn/q$", 3), ("attn/", 1)),
    alpha_pattern=(("mlp/", 1.5),),
  )
  _, params = build()
  params = lora.init(jax.random.key(0), params, adapters)
  ranks = {
    path.split("/")[-2]: x.shape[-1]
    for path, x in trees.flatten(params).items()
    if path.endswith("lora_a")
  }
  assert ranks == {"q": 3, **dict.fromkeys("kvo", 1)} | dict.fromkeys(
    ("gate", "up", "down"), 2
  )
  assert adapters.scale("attn/q") == 2.0
  assert adapters.scale("attn/k") == 6.0
  assert adapters.scale("mlp/up") == 0.75
  by_root = lora.LoraConfig(rank=4, alpha=6.0, rslora=True)
  assert by_root.scale("attn/q") == 3.0


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("rank_pattern", (("q_proj", 3),)),
    ("alpha_pattern", (("mlp/dwon", 3.0),)),
    ("also_train", ("layernorm",)),
  ],
)
def test_rules_that_match_nothing_are_refused(name, value):
  adapters = lora.LoraConfig(rank=2, alpha=6.0, **{name: value})
  with pytest.raises(ValueError, match=rf"Change lora\.{name}"):
    lora.check(build()[1], adapters)


def test_what_is_adapted_does_not_train_whole_too():
  adapters = lora.LoraConfig(rank=2, alpha=6.0, also_train=("attn/q/bias",))
  with pytest.raises(ValueError, match="whose module is adapted"):
    lora.check(build()[1], adapters)


def test_what_trains():
  adapters = lora.LoraConfig(
    rank=2, alpha=6.0, dora=True, init="pissa", also_train=("norm", "embed/")
  )
  _, params = build()
  params = lora.init(jax.random.key(0), params, adapters)
  chosen = {p for p in trees.flatten(params) if adapters.trains(p)}
  leaves = {path.rpartition("/")[2] for path in chosen}
  assert leaves == {"lora_a", "lora_b", "lora_m", "scale", "embedding"}


def test_dora_starts_at_the_length_of_the_columns():
  adapters = lora.LoraConfig(rank=2, alpha=6.0, dora=True)
  model, params = build(adapters)
  up = params["layers"]["mlp"]["up"]
  want = np.linalg.norm(np.asarray(up["kernel"], np.float64), axis=1)
  np.testing.assert_allclose(up["lora_m"], want, rtol=1e-6)
  base, _ = build()
  plain, _ = trees.partition(params, lambda path: not lora.is_adapter(path))
  np.testing.assert_allclose(
    model.hidden(params, TOKENS), base.hidden(plain, TOKENS), atol=1e-4
  )


def test_pissa_splits_off_the_first_singular_directions():
  """Against NumPy's SVD in float64; the start is the base model."""
  adapters = lora.LoraConfig(rank=2, alpha=6.0, init="pissa")
  base, params = build()
  adapted = lora.init(jax.random.key(0), params, adapters)
  for name in ("gate", "down"):
    kernel = np.asarray(params["layers"]["mlp"][name]["kernel"], np.float64)
    node = adapted["layers"]["mlp"][name]
    u, s, vh = np.linalg.svd(kernel, full_matrices=False)
    want = (u[..., :2] * s[:, None, :2]) @ vh[:, :2]
    got = 3.0 * np.asarray(node["lora_a"] @ node["lora_b"])
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(node["kernel"], kernel - want, atol=1e-5)
    # Both factors carry the same share: columns of A as long as rows of B.
    lengths = [
      np.linalg.norm(node["lora_a"], axis=1),
      np.linalg.norm(node["lora_b"], axis=2),
    ]
    np.testing.assert_allclose(*lengths, rtol=1e-4)
    np.testing.assert_array_equal(node["lora_a0"], node["lora_a"])
  model = transformer.build(base.config, lora=adapters)
  np.testing.assert_allclose(
    jax.jit(model.hidden)(adapted, TOKENS),
    base.hidden(params, TOKENS),
    atol=1e-4,
  )


def test_what_cannot_be_is_refused():
  with pytest.raises(ValueError, match=r"lora\.init"):
    lora.LoraConfig(rank=1, alpha=1.0, init="olora")
  with pytest.raises(ValueError, match=r"lora\.dropout"):
    lora.LoraConfig(rank=1, alpha=1.0, dropout=1.0)
  with pytest.raises(ValueError, match="rank is -1"):
    lora.LoraConfig(rank=1, alpha=1.0, rank_pattern=(("attn", -1),))


def test_every_module_of_every_layer_has_its_own_mask(monkeypatch):
  adapters = lora.LoraConfig(rank=2, alpha=6.0, dropout=0.5)
  model, params = build(adapters)
  drawn = []

  def noted(key, x, rate):
    drawn.append(np.asarray(jax.random.key_data(key)).tobytes())
    return x

  monkeypatch.setattr(linear, "dropout", noted)
  unrolled = transformer.build(model.config, lora=adapters, scan=False)
  unrolled.hidden(params, TOKENS, dropout_key=jax.random.key(0))
  assert len(drawn) == 2 * 7
  assert len(set(drawn)) == len(drawn)


def test_dropout_differs_by_layer_and_key_and_never_by_remat():
  """One layer's mask drawn for all, or another in the second forward pass,
  would give other gradients."""
  adapters = lora.LoraConfig(rank=2, alpha=6.0, dropout=0.5)
  model, params = build(adapters)
  noise = jax.random.normal(jax.random.key(3), (2, 2, 16))
  params["layers"]["attn"]["q"]["lora_b"] = noise

  def loss(params, key, **choices):
    other = transformer.build(model.config, lora=adapters, **choices)
    hidden = other.hidden(params, TOKENS, dropout_key=key)
    return jnp.sin(hidden).sum()

  step = jax.jit(jax.value_and_grad(loss))
  value, want = step(params, jax.random.key(0))
  assert value != step(params, jax.random.key(1))[0]
  remat = functools.partial(loss, remat="full", scan=False)
  got = jax.jit(jax.grad(remat))(params, jax.random.key(0))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want
  )


GOLDEN = Path(__file__).parents[1] / "goldens" / "qwen3"


def test_what_trains_under_lora_is_float32_whatever_the_base_is():
  """Of fresh and of loaded parameters; rows that train alone are merged."""
  adapters = lora.LoraConfig(
    2, 4.0, dora=True, also_train=("norm",), token_rows=(1, 7)
  )
  low = {"param_dtype": "bfloat16", "lora": adapters}
  model, params = load_save.load_pretrained(GOLDEN, **low)
  for tree in (params, jax.eval_shape(model.init, jax.random.key(0))):
    for path, x in trees.flatten(tree).items():
      wide = adapters.trains(path)
      assert x.dtype == ("float32" if wide else "bfloat16"), path
  moved = dict(trees.flatten(params))
  moved["embed/lora_rows"] = moved["embed/lora_rows"] + 1
  moved = trees.unflatten(moved)
  whole = merge.merge(moved, adapters, dtype="float32").params
  old = np.asarray(params["embed"]["embedding"], np.float32)
  new = np.asarray(whole["embed"]["embedding"])
  assert np.flatnonzero((old != new).any(axis=1)).tolist() == [1, 7]
  np.testing.assert_array_equal(new[[1, 7]], old[[1, 7]] + 1)
  plain = transformer.build(model.config)
  logits = lambda m, p: m.logits(p, m.hidden(p, np.array([[1, 2, 7, 3]])))
  np.testing.assert_allclose(
    logits(model, moved), logits(plain, whole), atol=1e-4
  )


def test_constants_of_a_checkpoint_never_train():
  path = "layers/mlp/act/beta"
  whole = lora.LoraConfig(rank=1, alpha=1.0, also_train=("mlp/act",))
  for adapters in (None, whole):
    trained = lora.trained(adapters)
    assert not trained(path)
    assert trained("layers/mlp/act/alpha_p")
