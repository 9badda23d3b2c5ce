"""The adapted product against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.models.layers import linear
from sft_jax.models.layers.linear import Linear
from sft_jax.models.lora import quantize
from sft_jax.models.lora.lora import LoraConfig

IN, OUT, R = 12, 5, 2
CONFIG = LoraConfig(rank=R, alpha=3.0)


@pytest.fixture
def case():
  rng = np.random.default_rng(0)
  shapes = {
    "kernel": (IN, OUT),
    "bias": (OUT,),
    "lora_a": (IN, R),
    "lora_b": (R, OUT),
    "lora_m": (OUT,),
  }
  draw = lambda shape: rng.standard_normal(shape).astype(np.float32)
  params = {k: draw(shape) for k, shape in shapes.items()}
  return params, draw((3, 4, IN))


def apply(params, x, config=CONFIG, **rngs):
  module = Linear(OUT, use_bias=True, lora=config)
  params = jax.tree.map(jnp.asarray, params)
  return module.apply({"params": params}, jnp.asarray(x), rngs=rngs)


def without(params, *names):
  return {k: v for k, v in params.items() if k not in names}


def reference(params, x, scale):
  p = {k: v.astype(np.float64) for k, v in params.items()}
  whole = p["kernel"] + scale * p["lora_a"] @ p["lora_b"]
  if "lora_m" in p:
    whole = whole * p["lora_m"] / np.linalg.norm(whole, axis=0)
  return x.astype(np.float64) @ whole + p["bias"]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
  ("config", "scale"),
  [
    (CONFIG, 1.5),
    (LoraConfig(rank=R, alpha=3.0, rslora=True), 3 / np.sqrt(2)),
    (LoraConfig(rank=8, alpha=3.0, rank_pattern=(("", R),)), 1.5),
    (LoraConfig(rank=R, alpha=8.0, alpha_pattern=(("", 3.0),)), 1.5),
  ],
)
def test_equals_the_formula(case, dora, config, scale):
  params, x = case
  params = params if dora else without(params, "lora_m")
  want = reference(params, x, scale)
  np.testing.assert_allclose(apply(params, x, config), want, atol=1e-5)


def test_the_norm_of_columns_is_a_constant_to_the_gradient(case):
  """DoRA, section 4.3: against the gradient with the norm put in by hand."""
  params, x = case
  whole = params["kernel"] + 1.5 * params["lora_a"] @ params["lora_b"]
  norm = np.linalg.norm(whole, axis=0)

  def by_hand(p):
    whole = p["kernel"] + 1.5 * p["lora_a"] @ p["lora_b"]
    return jnp.sin(x @ whole * (p["lora_m"] / norm) + p["bias"]).sum()

  got = jax.grad(lambda p: jnp.sin(apply(p, x)).sum())(params)
  want = jax.grad(by_hand)(params)
  for name in params:
    np.testing.assert_allclose(got[name], want[name], atol=2e-4, err_msg=name)


def test_dropout_thins_the_adapters_input_and_nothing_else(case):
  params, x = case
  params = without(params, "lora_m")
  config = LoraConfig(rank=R, alpha=3.0, dropout=0.25)
  base = reference(params | {"lora_b": 0 * params["lora_b"]}, x, 0.0)
  # Without an rng nothing is dropped: evaluation.
  np.testing.assert_array_equal(apply(params, x, config), apply(params, x))
  keys = jax.random.split(jax.random.key(0), 4000)
  draws = jax.vmap(lambda key: apply(params, x, config, dropout=key))(keys)
  draws = np.asarray(draws, np.float64)
  assert len(np.unique(draws[:, 0, 0, 0])) > 1000
  # The mean is what the adapter gives undropped: 6 standard errors.
  error = draws.std(0) / np.sqrt(len(keys))
  assert (abs(draws.mean(0) - reference(params, x, 1.5)) < 6 * error).all()
  # An input is there, over 0.75, or not: p / (1 - p) sum (x AB)^2.
  product = 1.5 * params["lora_a"] @ params["lora_b"]
  spread = (0.25 / 0.75) * ((x[..., None] * product) ** 2).sum(-2)
  np.testing.assert_allclose(draws.var(0), spread, rtol=0.2)
  assert not np.allclose(base, reference(params, x, 1.5))


def test_column_norms_need_no_full_product(case):
  params, _ = case
  k, a, b = (params[name] for name in ("kernel", "lora_a", "lora_b"))
  got = linear.column_norm(jnp.asarray(k), jnp.asarray(a), jnp.asarray(b), 1.5)
  want = np.linalg.norm(k.astype(np.float64) + 1.5 * a @ b, axis=0)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_an_adapter_that_nobody_asked_for_is_refused(case):
  params, x = case
  with pytest.raises(ValueError, match="hold a LoRA adapter"):
    apply(params, x, None)


@pytest.mark.parametrize("codec", quantize.CODECS)
@pytest.mark.parametrize("dora", [False, True])
def test_a_quantised_kernel_is_the_kernel_it_decodes_to(case, codec, dora):
  """Outputs, and gradients of the input and of the adapters."""
  params, x = case
  params = params if dora else without(params, "lora_m")
  codes, scale = quantize.encode(jnp.asarray(params["kernel"]), codec)
  decoded = params | {"kernel": quantize.decode(codes, scale)}
  packed = {"kernel_codes": codes, "kernel_scale": scale}
  adapters = without(params, "kernel")

  def loss(frozen, adapters, x):
    return jnp.sin(apply(frozen | adapters, x)).sum()

  np.testing.assert_allclose(
    apply(packed | adapters, x), apply(decoded, x), atol=1e-6
  )
  got = jax.grad(loss, (1, 2))(packed, adapters, x)
  want = jax.grad(loss, (1, 2))({"kernel": decoded["kernel"]}, adapters, x)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want
  )
