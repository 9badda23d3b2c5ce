"""Any way to divide eight devices computes what one device computes."""

import dataclasses
import functools
import itertools
import random

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from configs import base
from sft_jax.common import sharding, trees
from sft_jax.common.batch import Batch
from sft_jax.models import transformer
from sft_jax.models.config import config_from_fields
from sft_jax.step import optimizer
from sft_jax.step.loss import linear_cross_entropy
from sft_jax.step.train_step import (
  init_state,
  make_train_step,
  split_micro_batches,
)
from sft_jax.training.build import build
from sft_jax.training.build import state as setup_state
from sft_jax.training.build import step as setup_step
from sft_jax.training.planning.cost_model import collectives

B, T, V = 16, 24, 64
CONFIG = config_from_fields(
  "llama",
  vocab_size=V,
  num_layers=2,
  d_model=32,
  d_ff=64,
  num_heads=8,
  num_kv_heads=2,
  head_dim=4,
  max_positions=64,
  tie_embeddings=False,
)


def some_batch(seed: int = 0) -> Batch:
  """Two documents a row, and padding; weights uneven over rows and slots."""
  rng = np.random.default_rng(seed)
  segment_ids, positions = np.zeros((2, B, T), np.int32)
  for row in range(B):
    first, second = sorted(rng.integers(1, T + 1, 2))
    segment_ids[row, :second] = 2
    segment_ids[row, :first] = 1
    positions[row, :first] = np.arange(first)
    positions[row, first:second] = np.arange(second - first)
  weights = rng.random((B, T)) < np.linspace(0.02, 0.95, B)[:, None]
  weights = weights * rng.choice([0.5, 1, 2], (B, T)) * (segment_ids > 0)
  ids = rng.integers(0, V, (2, B, T)).astype(np.int32)
  return Batch(*ids, weights.astype(np.float32), segment_ids, positions)


@functools.cache
def compiled(sizes, config=CONFIG):
  """(the compiled step of SGD, its state, its batch) on a mesh or on none."""
  mesh = sharding.make_mesh(*sizes) if sizes else None
  model = transformer.build(config, mesh=mesh)

  def loss_fn(params, batch):
    hidden = model.hidden(
      params, batch.tokens, batch.positions, batch.segment_ids
    )
    return linear_cross_entropy(
      hidden,
      model.head(params),
      batch.targets,
      batch.loss_weights,
      chunk_tokens=16,
      rows=sharding.row_sharding(mesh) if mesh else None,
    )

  step = make_train_step(loss_fn, optax.sgd(1.0), lambda step: 0.5)
  params = transformer.build(config).init(jax.random.key(0))
  state = init_state(params, lambda path: True, optax.sgd(1.0))
  batch = split_micro_batches(some_batch(), 2)
  if mesh is not None:
    state = state._replace(
      params=jax.device_put(params, sharding.param_shardings(params, mesh)),
      step=jax.device_put(state.step, sharding.replicated(mesh)),
    )
    batch = sharding.put_rows(
      batch, sharding.row_sharding(mesh, leading_axes=1)
    )
  return jax.jit(step).lower(state, batch).compile(), state, batch


def stepped(sizes, config=CONFIG):
  """(parameters after a step, its metrics)."""
  step, state, batch = compiled(sizes, config)
  state, pairs = step(state, batch)
  return state.params, pairs


@pytest.fixture(scope="module")
def alone():
  return stepped(())


EVERY = [
  (data, fsdp, tensor, 8 // (data * fsdp * tensor))
  for data in (1, 2, 4, 8)
  for fsdp in (1, 2, 4, 8)
  for tensor in (1, 2, 4, 8)
  if 8 % (data * fsdp * tensor) == 0
]
# Each axis with each other, sizes that no other leaves room for, more devices
# than key/value heads, and one of the others.
CHOSEN = [(2, 2, 2, 1), (2, 1, 2, 2), (1, 2, 1, 4), (1, 8, 1, 1), (1, 2, 4, 1)]
CHOSEN += random.Random(0).sample([m for m in EVERY if m not in CHOSEN], 1)


def check(sizes, alone, capfd):
  got, pairs = stepped(sizes)
  for name in ("loss/nats_per_token", "acc/token", "optim/grad_norm"):
    for part, want in zip(pairs[name], alone[1][name], strict=True):
      np.testing.assert_allclose(part, want, rtol=1e-5)
  # One step of SGD at rate 1: the change is the gradient.
  for path, x in trees.flatten(alone[0]).items():
    np.testing.assert_allclose(
      trees.flatten(got)[path], x, atol=5e-6, err_msg=path
    )
  # XLA says so on stderr where it gathers an array whole only to cut it anew.
  assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize("sizes", CHOSEN)
def test_devices_do_not_matter(sizes, alone, capfd):
  check(sizes, alone, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [m for m in EVERY if m not in CHOSEN])
def test_no_factorisation_matters(sizes, alone, capfd):
  check(sizes, alone, capfd)


MIXTURE = {
  **{"num_experts": 4, "experts_per_token": 2, "d_ff_shared": 32},
  **{"router_sigmoid": True, "router_groups": 2, "router_correction": 1},
}


@pytest.mark.parametrize("heads", [8, 2])
def test_windows_sinks_and_experts_are_divided_too(heads):
  """What layers take beside queries, keys and kernels; of two heads keys and
  values go round."""
  (kind,) = CONFIG.kinds
  config = dataclasses.replace(
    CONFIG,
    layers=(kind._replace(window=5), kind),
    **{"num_heads": heads, "num_kv_heads": heads // 4 or 1},
    attn_sinks=True,
    **MIXTURE,
  )
  same_gradients((1, 1, 2, 2, 2), config)


def same_gradients(sizes, config):
  want, _ = stepped((), config)
  got, _ = stepped(sizes, config)
  for path, x in trees.flatten(want).items():
    np.testing.assert_allclose(
      trees.flatten(got)[path], x, atol=5e-6, err_msg=path
    )


WITH_EXPERTS = [
  (d, f, t, 8 // (d * f * t * e), e)
  for e in (2, 4)
  for d, f, t in itertools.product((1, 2, 4), repeat=3)
  if 8 % (d * f * t * e) == 0
]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", WITH_EXPERTS)
def test_no_factorisation_of_experts_matters(sizes):
  same_gradients(sizes, dataclasses.replace(CONFIG, **MIXTURE))


def test_what_devices_send_is_what_the_axes_must():
  """Bytes of the whole step, by formula; see docs/scaling.md."""
  of = lambda *sizes: collectives(compiled(sizes)[0].as_text())
  params = trees.num_bytes(compiled(())[1].params)
  vectors = (2 * 2 + 1) * CONFIG.d_model * 4  # Norms: never divided.
  tables = 2 * V * CONFIG.d_model * 4
  micros = 2
  # One copy: each kernel is gathered forward and backward, a table once per
  # micro-batch or, where XLA moves that out of the loop, per step.
  found = of(1, 8, 1, 1)
  kernels = params - vectors - tables
  gathered = found["all-gather"].bytes - micros * 2 * kernels * 7 // 8
  assert tables <= gathered * 8 // 7 <= micros * tables
  # Parts of rows: q, k, v and the result of every layer change sides; the two
  # key/value heads are repeated for eight devices.
  found = of(1, 1, 1, 8)
  width = CONFIG.num_heads * CONFIG.head_dim
  swapped = 2 * CONFIG.num_layers * 4 * B * T * width * 4 // 8
  assert found["all-to-all"].bytes == swapped * 7 // 8
  whose = B * T * 4  # A row's segment ids and positions.
  assert found["all-gather"].bytes <= 2 * whose * 7 // 8
  # Copies of the model, whatever shares a row: gradients are added once.
  summed = micros * 2 * params * 7 // 8
  assert summed <= found["all-reduce"].bytes < summed + 1000


def test_moments_lie_where_their_parameters_lie():
  mesh = sharding.make_mesh(1, 2, 2, 2)
  params = jax.eval_shape(transformer.build(CONFIG).init, jax.random.key(0))
  tx = optimizer.make(
    "adamw",
    lambda step: 1e-3,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.1,
    decay_patterns=("kernel$",),
    clip_norm=1.0,
  )
  unused = dict.fromkeys(setup_step.Step._fields)
  step = setup_step.Step(
    **{**unused, "trained": lambda path: "norm" not in path, "tx": tx}
  )
  where = setup_state.state_shardings(step, params, mesh)
  (moments,) = (
    part
    for part in jax.tree.leaves(
      where.opt_state, is_leaf=lambda x: hasattr(x, "mu")
    )
    if hasattr(part, "mu")
  )
  for tree in (moments.mu, moments.nu):
    assert trees.flatten(tree) == trees.flatten(where.params)
  spec = trees.flatten(moments.mu)["layers/attn/q/kernel"].spec
  assert spec == PartitionSpec(None, "fsdp", "tensor")
  assert moments.count.spec == PartitionSpec()


def test_sizes_that_the_mesh_does_not_divide():
  mesh = sharding.make_mesh(2, 1, 2, 2)
  six = dataclasses.replace(CONFIG, num_heads=6)
  with pytest.raises(
    ValueError, match=r"got 4 for 6 heads, expected .* \[1, 2, 3, 6\]"
  ):
    transformer.build(six, mesh=sharding.make_mesh(2, 1, 4))
  with pytest.raises(ValueError, match=r"got 'xla' with more devices"):
    transformer.build(six, mesh=mesh, attention="xla")
  with pytest.raises(ValueError, match=r"mesh.expert: got 2 for 0 experts"):
    transformer.build(CONFIG, mesh=sharding.make_mesh(4, 1, 1, expert=2))
  config = base.get_config()
  config.data.seq_len = 33
  with pytest.raises(
    ValueError, match=r"data.seq_len: got 33 for mesh.context=2, expected"
  ):
    build.check_batch_size(config, mesh)
  config.batch_size = 3
  with pytest.raises(ValueError, match=r"batch_size: got 3 for accum_steps=1"):
    build.check_batch_size(config, mesh)
