"""loss.kl: training near the base, by brute force, and off without a trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from configs import base
from sft_jax.common import sharding, trees
from sft_jax.models import transformer
from sft_jax.models.lora import base_model
from sft_jax.models.lora.lora import LoraConfig
from sft_jax.step.train_step import init_state, split_micro_batches
from sft_jax.training import config_check, selfcheck, step_runner
from sft_jax.training.build import state as setup_state
from sft_jax.training.build import step as setup_step

V, K = tiny.SPECK.vocab_size, 0.7
ADAPTERS = {
  "full": None,
  "lora": LoraConfig(rank=2, alpha=8.0),
  "embedding too": LoraConfig(rank=2, alpha=8.0, also_train=("embed/",)),
}


def world(kind: str, kl: float = K, mesh=None, measure=False, eps=1.0):
  """(model, step, state) some way into training, of the config's own step.

  With a large eps a step follows the gradient, and not its sign.
  """
  config = base.get_config()
  config.optim.schedule, config.optim.warmup_steps = "constant", 0
  config.optim.clip_norm, config.optim.weight_decay = 0.0, 0.0
  config.optim.eps = eps
  config.loss.kl, config.eval.kl = kl, measure
  model = transformer.build(tiny.SPECK, lora=ADAPTERS[kind])
  mesh = mesh or sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  step = setup_step.make_step(config, model, mesh, num_steps=100)
  params = jax.jit(model.init)(jax.random.key(0))
  params = setup_state.hold_base(config, step, params, jnp.copy)
  rng = np.random.default_rng(2)
  params = trees.map_paths(
    lambda path, x: (
      x + 0.2 * rng.normal(size=x.shape).astype(np.float32)
      if step.trained(path)
      else x
    ),
    params,
  )
  return model, step, init_state(params, step.trained, step.tx)


def batch():
  return selfcheck.toy_batch(8, 16, V)


def dense(model, step, state, rows):
  """(objective, KL) of a batch, from all logits at once, by JAX's gradient."""

  def log_p(params):
    hidden = model.hidden(params, rows.tokens, rows.positions, rows.segment_ids)
    return jax.nn.log_softmax(model.logits(params, hidden))

  def objective(trained):
    params = trees.merge(trained, state.frozen)
    was = jax.lax.stop_gradient(log_p(base_model.base_of(params, step.trained)))
    now = log_p(params)
    nll = -jnp.take_along_axis(now, rows.targets[..., None], -1)[..., 0]
    kl = (jnp.exp(was) * (was - now)).sum(-1)
    total = lambda x: (rows.loss_weights * x).sum()
    return total(nll) + K * total(kl), total(kl)

  return jax.jit(jax.value_and_grad(objective, has_aux=True))(state.params)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_step_follows_the_gradient_of_the_dense_formula(kind):
  model, step, state = world(kind)
  rows = batch()
  (value, kl), want = dense(model, step, state, rows)

  def objective(trained, rows):
    sums = step.loss_fn(trees.merge(trained, state.frozen), rows)
    return sums.objective, sums

  run = jax.jit(jax.value_and_grad(objective, has_aux=True))
  (got, sums), slope = run(state.params, rows)
  np.testing.assert_allclose(got, value, rtol=1e-5)
  np.testing.assert_allclose(sums.base.kl, kl, rtol=1e-4)
  assert kl > 0.1
  for path, x in trees.flatten(slope).items():
    right = trees.flatten(want)[path]
    most = np.abs(right).max()
    np.testing.assert_allclose(x, right, atol=1e-4 * most, err_msg=path)
  # The copies are frozen: they have no gradient and no moments.
  assert not any(map(base_model.is_copy, trees.flatten(state.params)))


def test_neither_accumulation_nor_the_mesh_matters():
  rows, found = batch(), []
  for parts, mesh in (
    (1, None),
    (2, sharding.make_mesh(2, 2, 2)),
  ):
    _, step, state = world("embedding too", mesh=mesh)
    cut = split_micro_batches(rows, parts)
    if mesh:
      shardings = setup_state.state_shardings(
        step, trees.merge(state.params, state.frozen), mesh
      )
      state = jax.device_put(state, shardings)
      cut = sharding.put_rows(cut, sharding.row_sharding(mesh, leading_axes=1))
    new, pairs = jax.jit(step.train_step)(state, cut)
    found.append((new.params, pairs["loss/kl"], pairs["optim/grad_norm"]))
    jax.tree.map(np.testing.assert_array_equal, new.frozen, state.frozen)
  for other in found[1:]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
      jax.device_get(other),
      jax.device_get(found[0]),
    )


def test_packing_does_not_matter():
  """Two documents in a row diverge as they do in rows of their own."""
  _, step, state = world("full")
  rows = batch()
  params = trees.merge(state.params, state.frozen)
  loss = jax.jit(step.loss_fn)
  together, alone = (
    loss(params, one).base for one in (rows, selfcheck.unpack(rows))
  )
  np.testing.assert_allclose(together, alone, rtol=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_off_leaves_no_trace_in_the_program(kind):
  texts, sizes = {}, {}
  rows = split_micro_batches(batch(), 2)
  for name, choices in (
    ("off", {"kl": 0.0, "measure": True}),
    ("on", {"kl": K}),
  ):
    _, step, state = world(kind, **choices)
    texts[name] = step_runner.lower(step.train_step, state, rows).as_text()
    sizes[name] = trees.num_bytes(state)
  # Another forward pass, and a product of the head.
  products = {k: t.count("stablehlo.dot_general") for k, t in texts.items()}
  assert products["on"] > products["off"]
  if kind == "lora":  # The base is among the parameters already.
    assert sizes["on"] == sizes["off"]
  else:
    *_, state = world(kind, kl=0.0)
    assert sizes["on"] - sizes["off"] == trees.num_bytes(state.params)


def test_a_base_that_knows_nothing_is_refused():
  config = base.get_config()
  for kl, fresh in ((0.1, True), (-0.1, False)):
    config.loss.kl, config.model.from_scratch = kl, fresh
    with pytest.raises(ValueError, match=r"loss\.kl: got"):
      config_check.check(config)


def test_a_large_coefficient_holds_the_model_where_it_was():
  """30 steps on the same rows, with and without."""
  lost = {}
  for kl in (0.0, 30.0):
    _, step, state = world("full", kl=kl, measure=True, eps=1e-8)
    start = trees.merge(state.params, {})
    copies = jax.tree.map(jnp.copy, start)
    if kl:  # It starts as its own base, not some way on.
      state = state._replace(frozen={base_model.COPIES: copies})
    train_step = jax.jit(step.train_step)
    rows = split_micro_batches(batch(), 1)
    for _ in range(30):
      state, _ = train_step(state, rows)
    params = base_model.with_copies(trees.merge(state.params, {}), copies)
    sums = jax.jit(step.measure_fn)(params, batch())
    lost[kl] = float(sums.base.kl / sums.weight)
  assert lost[30.0] < 0.2 * lost[0.0]
