"""Schedules, AdamW by its formula, rounding that is right on average."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from sft_jax.common import sharding, trees
from sft_jax.step import optimizer
from sft_jax.step.train_step import (
  init_state,
  make_train_step,
  model_params,
  split_micro_batches,
)
from sft_jax.training import selfcheck

ADAMW = {
  "b1": 0.9,
  "b2": 0.99,
  "eps": 1e-8,
  "weight_decay": 0.1,
  "decay_patterns": ("kernel$",),
}


@pytest.mark.parametrize(
  ("name", "want"),
  [
    ("constant", [0.5, 1, 1, 1, 1, 1, 1]),
    ("linear", [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2]),
    ("wsd", [0.5, 1, 1, 1, 1, 0.6, 0.2]),
    (
      "cosine",
      [0.5, 1]
      + [0.2 + 0.8 * (1 + np.cos(np.pi * s / 4)) / 2 for s in range(5)],
    ),
  ],
)
def test_schedules(name, want):
  rate = optimizer.schedule(
    name,
    peak=1.0,
    warmup_steps=2,
    num_steps=6,
    final_fraction=0.2,
    decay_fraction=1 / 3,
  )
  np.testing.assert_allclose([rate(s) for s in range(7)], want, rtol=1e-6)


def test_schedule_refuses_what_cannot_be():
  known = {"peak": 1.0, "num_steps": 6, "final_fraction": 0.0}
  with pytest.raises(AssertionError, match="cosin"):
    optimizer.schedule("cosin", warmup_steps=2, **known)
  with pytest.raises(ValueError, match=r"optim\.warmup_steps: got 6"):
    optimizer.schedule("linear", warmup_steps=6, **known)
  with pytest.raises(ValueError, match=r"optim\.decay_fraction: got 0\.9"):
    optimizer.schedule("wsd", warmup_steps=2, decay_fraction=0.9, **known)


def test_adamw_equals_its_formula():
  rng = np.random.default_rng(0)
  params = {"kernel": rng.normal(size=5), "scale": rng.normal(size=3)}
  params = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
  tx = optimizer.make(
    "adamw", lambda step: 0.1 / (step + 1), clip_norm=1.0, **ADAMW
  )
  state = tx.init(params)
  want = {k: np.asarray(v, np.float64) for k, v in params.items()}
  m = {k: np.zeros_like(v) for k, v in want.items()}
  v = {k: np.zeros_like(v) for k, v in want.items()}
  for step in range(4):
    grads = {k: 3 * rng.normal(size=p.shape) for k, p in want.items()}
    updates, state = tx.update(
      {k: jnp.asarray(g, jnp.float32) for k, g in grads.items()},
      state,
      params,
    )
    params = jax.tree.map(jnp.add, params, updates)
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    for k, g in grads.items():
      g = g / max(norm, 1.0)
      m[k] = 0.9 * m[k] + 0.1 * g
      v[k] = 0.99 * v[k] + 0.01 * g**2
      m_hat, v_hat = (
        m[k] / (1 - 0.9 ** (step + 1)),
        v[k] / (1 - 0.99 ** (step + 1)),
      )
      decay = 0.1 if k == "kernel" else 0.0
      want[k] -= (
        0.1 / (step + 1) * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * want[k])
      )
  for k in want:
    np.testing.assert_allclose(params[k], want[k], rtol=2e-5)


SHAPES = {
  "embed/embedding": (32, 16),
  "final_norm/scale": (16,),
  "layers/attn/q/kernel": (3, 128, 136),
  "layers/attn/q/lora_a": (3, 16, 4),
  "layers/attn/q/lora_b": (3, 4, 24),
  "layers/attn_norm/scale": (3, 16),
  "layers/moe/router/kernel": (3, 16, 2),
  "layers/moe/up/kernel": (3, 2, 128, 144),
}


def unstacked(name, matrix):
  """optax's own optimizer of one matrix, or of a vector or a table."""
  b1, b2, eps = 0.9, 0.99, 1e-8
  adam = optax.adam(0.03, b1, b2, eps)
  return {
    "adamw": adam,
    "adafactor": optax.adafactor(0.03, multiply_by_parameter_scale=False),
    "lion": optax.lion(0.03, b1, b2, weight_decay=0.0),
    "sgd": optax.sgd(0.03, b1),
    "muon": optax.contrib.muon(0.03, beta=b1, consistent_rms=0.2)
    if matrix
    else adam,
  }[name]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_stacked_layers_move_as_one_layer_at_a_time(name, devices):
  """Three steps of each optimizer, against optax on every matrix alone."""
  rng = np.random.default_rng(0)
  draw = lambda: {
    path: rng.normal(size=shape).astype(np.float32)
    for path, shape in SHAPES.items()
  }
  start, gradients = draw(), [draw() for _ in range(3)]
  params = trees.unflatten({k: jnp.asarray(x) for k, x in start.items()})
  tx = optimizer.make(
    *(name, lambda step: 0.03), clip_norm=0.0, **ADAMW | {"weight_decay": 0.0}
  )
  init, update = tx.init, jax.jit(tx.update)
  if devices > 1:
    mesh = sharding.make_mesh(2, 2, 2)
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    where = sharding.state_shardings(jax.eval_shape(init, params), params, mesh)
    init = jax.jit(init, out_shardings=where)
    update = jax.jit(tx.update, out_shardings=(None, where))
    # Factors and momenta are divided, not copied to every device.
    whole = [x for x in jax.tree.leaves(where) if x.is_fully_replicated]
    assert len(whole) < len(jax.tree.leaves(where))
  state = init(params)
  got = []
  for gradient in gradients:
    tree = trees.unflatten({k: jnp.asarray(x) for k, x in gradient.items()})
    moved, state = update(tree, state, params)
    got.append(trees.flatten(jax.device_get(moved)))
  for path, shape in SHAPES.items():
    matrix = path.endswith(("kernel", "lora_a", "lora_b"))
    single = 2 if matrix or "embedding" in path else 1
    for index in np.ndindex(shape[: len(shape) - single]):
      alone = unstacked(name, matrix)
      value = jnp.asarray(start[path][index])
      held = alone.init(value)
      for step, gradient in enumerate(gradients):
        want, held = alone.update(
          jnp.asarray(gradient[path][index]), held, value
        )
        np.testing.assert_allclose(
          got[step][path][index], want, atol=1e-6, err_msg=path
        )


def test_moments_that_an_optimizer_lacks_are_refused():
  known = ADAMW | {"clip_norm": 0.0}
  with pytest.raises(ValueError, match=r"optim\.mu_dtype.*with optim\.name"):
    optimizer.make("lion", lambda step: 0.1, mu_dtype="bfloat16", **known)


def test_moments_in_bfloat16_are_right_on_average():
  """2,000 copies of one weight, whose second moment moves by 1 in 1,000."""
  known = ADAMW | {"b2": 0.999, "weight_decay": 0.0, "clip_norm": 0.0}
  params = {"kernel": jnp.zeros(2000)}
  low = {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16", "rounding_seed": 1}
  narrow = optimizer.make("adamw", lambda step: 0.1, **known, **low)
  wide = optimizer.make("adamw", lambda step: 0.1, **known)
  states = [narrow.init(params), wide.init(params)]
  update = [jax.jit(tx.update) for tx in (narrow, wide)]
  rng = np.random.default_rng(0)
  for _ in range(40):
    g = {"kernel": jnp.full(2000, rng.normal(), jnp.float32)}
    found = [u(g, s, params) for u, s in zip(update, states, strict=True)]
    states = [state for _, state in found]
  adam, want = states[0][1], states[1][1]
  assert {x.dtype.name for x in (adam.mu["kernel"], adam.nu["kernel"])} == {
    "bfloat16"
  }
  for got, right in ((adam.mu, want.mu), (adam.nu, want.nu)):
    mean = np.asarray(got["kernel"], np.float64).mean()
    np.testing.assert_allclose(mean, right["kernel"][0], rtol=2e-3)
  with pytest.raises(ValueError, match=r"nu_dtype: got bfloat16 with a decay"):
    optimizer.make("adamw", lambda step: 0.1, **known, nu_dtype="bfloat16")


def test_without_gradients_only_the_named_leaves_decay():
  params = {"kernel": jnp.ones(2), "bias": jnp.ones(2), "scale": jnp.ones(2)}
  tx = optimizer.make("adamw", lambda step: 0.5, clip_norm=0.0, **ADAMW)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
  assert not updates["bias"].any()
  assert not updates["scale"].any()


def test_rates_multiply_the_learning_rate_of_what_they_match():
  """LoRA+: decay too, as in a parameter group of its own."""
  rng = np.random.default_rng(0)
  params = {
    path: {"lora_a": jnp.ones(3), "lora_b": jnp.ones(2)} for path in "pq"
  }
  grads = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params
  )
  known = ADAMW | {"decay_patterns": ("lora",), "clip_norm": 1.0}
  tx = optimizer.make(
    "adamw",
    lambda step: 0.1,
    **known,
    rates=((r"q/lora_b$", 16.0), ("lora_b$", 4.0)),
  )
  plain = optimizer.make("adamw", lambda step: 0.1, **known)
  got, _ = tx.update(grads, tx.init(params), params)
  want, _ = plain.update(grads, plain.init(params), params)
  for path, factor in (("p", 4.0), ("q", 16.0)):
    np.testing.assert_array_equal(got[path]["lora_a"], want[path]["lora_a"])
    np.testing.assert_allclose(
      got[path]["lora_b"], factor * want[path]["lora_b"], rtol=1e-6
    )


def test_lora_plus_equals_that_of_peft():
  torch = pytest.importorskip("torch", reason="live oracle: needs torch")
  peft = pytest.importorskip("peft", reason="live oracle: needs peft")
  rng = np.random.default_rng(0)
  draw = lambda shape: rng.normal(size=shape).astype(np.float32)

  class Toy(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.up = torch.nn.Linear(4, 3, bias=False)

    def forward(self, x):
      return self.up(x)

  toy = peft.get_peft_model(Toy(), peft.LoraConfig(r=2, target_modules=["up"]))
  optimizers = pytest.importorskip("peft.optimizers")
  theirs = optimizers.create_loraplus_optimizer(
    toy, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0,
    loraplus_weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8,
  )  # fmt: skip
  leaves = {
    name: next(p for n, p in toy.named_parameters() if f"lora_{half}" in n)
    for name, half in (("lora_a", "A"), ("lora_b", "B"))
  }
  params = {name: jnp.asarray(draw(p.shape)) for name, p in leaves.items()}
  for name, p in leaves.items():
    p.data = torch.tensor(np.array(params[name]))
  tx = optimizer.make(
    "adamw",
    lambda step: 0.01,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.1,
    decay_patterns=("lora_[ab]$",),
    clip_norm=0.0,
    rates=(("lora_b$", 16.0),),
  )
  state = tx.init(params)
  for _ in range(5):
    grads = {name: draw(p.shape) for name, p in params.items()}
    for name, p in leaves.items():
      p.grad = torch.tensor(grads[name])
    theirs.step()
    updates, state = tx.update(jax.tree.map(jnp.asarray, grads), state, params)
    params = jax.tree.map(jnp.add, params, updates)
  for name, p in leaves.items():
    np.testing.assert_allclose(params[name], p.detach().numpy(), atol=1e-5)


def test_stochastic_rounding_is_right_on_average():
  """The mean of n draws is within 5 standard errors of each value."""
  rng = np.random.default_rng(0)
  x = (rng.normal(size=64) * 10.0 ** rng.integers(-6, 6, 64)).astype(np.float32)
  n = 4000
  draws = optimizer.stochastic_round(
    jax.random.key(0), jnp.broadcast_to(jnp.asarray(x), (n, 64))
  )
  draws = np.asarray(draws, np.float64)
  low, high = draws.min(0), draws.max(0)
  step = high - low
  share = np.abs(x - low) / np.where(step > 0, step, 1)
  error = step * np.sqrt(share * (1 - share) / n)
  assert (np.abs(draws.mean(0) - x) <= 5 * error + 1e-12).all()
  # Nearest rounding is off by far more, of most of them.
  nearest = np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)
  assert (np.abs(nearest - x) > 5 * error).mean() > 0.5


def test_draws_are_the_two_neighbours():
  x = np.full(1000, 1.001, np.float32)
  draws = optimizer.stochastic_round(jax.random.key(1), jnp.asarray(x))
  assert set(np.asarray(draws, np.float32).tolist()) == {1.0, 1.0078125}


def test_what_is_a_bfloat16_or_not_finite_stays():
  x = np.array([0, -0.0, 1, -2.5, 2.0**-120, np.inf, -np.inf, np.nan])
  x = x.astype(np.float32)
  for seed in range(20):
    draws = optimizer.stochastic_round(jax.random.key(seed), jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(draws, np.float32), x)


def test_draws_are_of_seed_step_tree_and_leaf_and_of_no_mesh():
  x = np.full((8, 64), 1.003, np.float32)
  like = {"a": jnp.zeros(x.shape, jnp.bfloat16), "b": jnp.zeros(x.shape)}
  like["c"] = like["a"]

  @functools.partial(jax.jit, static_argnames="what")
  def draw(x, step=2, what=3):
    return optimizer.round_tree(dict.fromkeys("abc", x), like, 1, step, what)

  first = draw(x)
  assert first["b"].dtype == jnp.float32
  np.testing.assert_array_equal(first["b"], x)
  assert (first["a"] != first["c"]).any()
  for other in (draw(x, step=3), draw(x, what=0)):
    assert (other["a"] != first["a"]).any()
  spread = jax.device_put(x, sharding.row_sharding(sharding.make_mesh(2, 4, 1)))
  jax.tree.map(np.testing.assert_array_equal, draw(spread), first)


def test_nearest_draws_nothing():
  assert optimizer.rounding_seed("nearest", 7) is None
  assert optimizer.rounding_seed("stochastic", 7) != optimizer.rounding_seed(
    "stochastic", 8
  )


def test_an_average_of_the_weights_follows_every_step():
  """By hand, in float64; the parameters do not know of it."""
  start = {"a": {"kernel": jnp.ones((2, 3)) * 2}}
  loss = lambda params, batch: tiny.loss_sums(
    (params["a"]["kernel"] ** 2).sum(), jnp.ones(())
  )
  made = {}
  for ema in (0.0, 0.9):
    tx = optimizer.make(
      "sgd", lambda step: 0.1, b1=0.0, b2=0.0, eps=1e-8, weight_decay=0.0,
      decay_patterns=(), clip_norm=0.0, ema=ema,
    )  # fmt: skip
    state = init_state(start, lambda path: True, tx)
    step = make_train_step(loss, tx, None)
    batch = selfcheck.toy_batch(2, 8, 9)
    values, average = [2.0], 2.0
    for _ in range(3):
      state, _ = step(state, split_micro_batches(batch, 1))
      values.append(float(state.params["a"]["kernel"][0, 0]))
      average = 0.9 * average + 0.1 * values[-1]
    made[ema] = values
    found = float(model_params(state)["a"]["kernel"][0, 0])
    assert found == pytest.approx(average if ema else values[-1], rel=1e-6)
  assert made[0.0] == made[0.9]
  assert len(set(made[0.0])) == 4


def test_an_anchor_pulls_towards_the_first_weights():
  """w <- w - rate (g + strength (w - w0)); the first step does not feel it."""
  tx = optimizer.make(
    "sgd", lambda step: 0.1, b1=0.0, b2=0.0, eps=1e-8, weight_decay=0.0,
    decay_patterns=(), clip_norm=0.0, anchor=2.0,
  )  # fmt: skip
  params = {"kernel": jnp.full(3, 2.0)}
  state, value = tx.init(params), 2.0
  for _ in range(4):
    updates, state = tx.update({"kernel": jnp.ones(3)}, state, params)
    params = optax.apply_updates(params, updates)
    value -= 0.1 * (1 + 2 * (value - 2.0))
    np.testing.assert_allclose(params["kernel"], value, rtol=1e-6)
