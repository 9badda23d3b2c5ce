"""The step is the same however its batch is cut and spread."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sft_jax import sharding, trees
from sft_jax.batch import Batch
from sft_jax.losses import linear_cross_entropy
from sft_jax.models import lora, transformer
from sft_jax.models.config import parse_config
from sft_jax.train_step import (
  init_state,
  make_train_step,
  split_micro_batches,
)

B, T, V = 16, 24, 64
CONFIG = parse_config(
  {
    "model_type": "qwen3",
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
  }
)


def everything(path: str) -> bool:
  del path
  return True


@pytest.fixture(scope="module")
def batch() -> Batch:
  """Two documents a row and padding; weights strongly uneven over rows."""
  rng = np.random.default_rng(0)
  segment_ids = np.zeros((B, T), np.int32)
  segment_ids[:, :10], segment_ids[:, 10:21] = 1, 2
  positions = np.concatenate([np.arange(10), np.arange(11), np.zeros(3)])
  share = np.linspace(0.02, 0.95, B)[:, None]
  weights = (rng.random((B, T)) < share) * rng.choice([0.5, 1, 2], (B, T))
  weights[segment_ids == 0] = 0
  return Batch(
    rng.integers(0, V, (B, T)).astype(np.int32),
    rng.integers(0, V, (B, T)).astype(np.int32),
    weights.astype(np.float32),
    segment_ids,
    np.broadcast_to(positions, (B, T)).astype(np.int32),
  )


def make(trained=everything, tx=None, adapters=None):
  """(step function, fresh state) of a tiny model under SGD."""
  model = transformer.build(CONFIG, lora=adapters)
  tx = tx or optax.sgd(1.0)

  def loss_fn(params, batch):
    hidden = model.hidden(
      params, batch.tokens, batch.positions, batch.segment_ids
    )
    return linear_cross_entropy(
      hidden, model.head(params), batch.targets, batch.loss_weights
    )

  step = make_train_step(loss_fn, tx, lambda step: 0.5)
  state = init_state(model.init(jax.random.key(0)), trained, tx)
  return step, state


def assert_close(a, b, **tolerance):
  for path, x in trees.flatten(a).items():
    np.testing.assert_allclose(
      x, trees.flatten(b)[path], err_msg=path, **tolerance
    )


def mean(pairs, name: str) -> float:
  total, weight = pairs[name]
  return float(total) / float(weight)


@pytest.fixture(scope="module")
def whole(batch):
  step, state = make()
  return jax.jit(step)(state, split_micro_batches(batch, 1))


@pytest.mark.parametrize("accum_steps", [2, 4, 16])
def test_accumulation_does_not_matter(batch, whole, accum_steps):
  step, state = make()
  got, pairs = jax.jit(step)(state, split_micro_batches(batch, accum_steps))
  for name in ("loss/nats_per_token", "acc/token", "optim/grad_norm"):
    np.testing.assert_allclose(mean(pairs, name), mean(whole[1], name), 1e-5)
  assert_close(got.params, whole[0].params, atol=2e-6)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)])
def test_devices_do_not_matter(batch, whole, sizes, capfd):
  mesh = sharding.make_mesh(*sizes)
  step, state = make()
  params = jax.device_put(
    state.params, sharding.param_shardings(state.params, mesh)
  )
  state = state._replace(
    params=params, step=jax.device_put(state.step, sharding.replicated(mesh))
  )
  rows = sharding.rows(mesh, leading_axes=1)
  spread = sharding.put_rows(split_micro_batches(batch, 2), rows)
  got, pairs = jax.jit(step)(state, spread)
  for name in ("loss/nats_per_token", "acc/token", "optim/grad_norm"):
    np.testing.assert_allclose(mean(pairs, name), mean(whole[1], name), 1e-5)
  assert_close(got.params, whole[0].params, atol=5e-6)
  # With fsdp and tensor together, jax 0.12 gathers the embedding's output
  # anew (docs/log.md); the sums above are right all the same.
  if mesh.shape["tensor"] == 1:
    assert "rematerialization" not in capfd.readouterr().err


def test_row_order_does_not_matter(batch, whole):
  order = np.random.default_rng(1).permutation(B)
  step, state = make()
  shuffled = jax.tree.map(lambda x: x[order], batch)
  got, _ = jax.jit(step)(state, split_micro_batches(shuffled, 4))
  assert_close(got.params, whole[0].params, atol=2e-6)


def test_packing_changes_nothing(batch):
  """Law 3: nats, weight and gradients of packed rows equal those alone."""
  step, state = make()
  alone = []
  for segment, start, stop in ((1, 0, 10), (2, 10, 21)):
    pad = ((0, 0), (0, T - (stop - start)))
    cut = jax.tree.map(lambda x: np.pad(x[:, start:stop], pad), batch)  # noqa: B023
    alone.append(cut)
    assert set(np.unique(cut.segment_ids)) == {0, segment}
  alone = jax.tree.map(lambda *x: np.concatenate(x), *alone)
  packed = jax.jit(step)(state, split_micro_batches(batch, 1))
  single = jax.jit(step)(state, split_micro_batches(alone, 1))
  for i in range(2):
    np.testing.assert_allclose(
      packed[1]["loss/nats_per_token"][i],
      single[1]["loss/nats_per_token"][i],
      rtol=1e-6,
    )
  assert_close(packed[0].params, single[0].params, atol=2e-6)


def test_padding_content_does_not_matter(batch, whole):
  rng = np.random.default_rng(2)
  noise = rng.integers(0, V, (B, T)).astype(np.int32)
  padding = batch.segment_ids == 0
  other = batch._replace(tokens=np.where(padding, noise, batch.tokens))
  step, state = make()
  got, _ = jax.jit(step)(state, split_micro_batches(other, 1))
  assert_close(got.params, whole[0].params, atol=0)


def test_only_the_chosen_leaves_move(batch):
  adapters = lora.LoraConfig(rank=4, alpha=8.0, targets="all-linear")
  step, state = make(lora.is_adapter, optax.adamw(1e-2), adapters)
  assert all("lora" in path for path in trees.flatten(state.params))
  assert trees.count(state.opt_state) == 2 * trees.count(state.params) + 1
  got, _ = jax.jit(step)(state, split_micro_batches(batch, 1))
  assert_close(got.frozen, state.frozen, atol=0)
  moved = trees.flatten(
    jax.tree.map(lambda a, b: bool((a != b).any()), got.params, state.params)
  )
  assert all(moved[path] for path in moved if path.endswith("lora_b"))


def test_a_nonfinite_gradient_changes_nothing(batch):
  step, state = make(tx=optax.adam(1e-2))
  poison = batch._replace(
    loss_weights=np.where(batch.loss_weights > 1, np.inf, batch.loss_weights)
  )
  got, pairs = jax.jit(step)(state, split_micro_batches(poison, 1))
  assert pairs["optim/nonfinite"][0] == 1
  assert_close(got.params, state.params, atol=0)
  assert int(got.step) == 1
  fine, pairs = jax.jit(step)(got, split_micro_batches(batch, 1))
  assert pairs["optim/nonfinite"][0] == 0
  assert np.isfinite(mean(pairs, "loss/nats_per_token"))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(fine.params))


def test_a_batch_without_trained_tokens_is_no_nan(batch):
  step, state = make()
  empty = batch._replace(loss_weights=np.zeros_like(batch.loss_weights))
  got, pairs = jax.jit(step)(state, split_micro_batches(empty, 2))
  assert pairs["loss/nats_per_token"] == (0, 0)
  assert_close(got.params, state.params, atol=0)


def test_rows_that_cannot_be_cut_are_refused(batch):
  with pytest.raises(ValueError, match="accum_steps: got 3 for 16 rows"):
    split_micro_batches(batch, 3)


def test_sgd_moves_by_the_mean_gradient(batch, whole):
  """Against jax.grad of the dense loss, divided once."""
  model = transformer.build(CONFIG)
  params = model.init(jax.random.key(0))

  def dense(params):
    z = model.logits(
      params,
      model.hidden(params, batch.tokens, batch.positions, batch.segment_ids),
    )
    nll = -jnp.take_along_axis(
      jax.nn.log_softmax(z), batch.targets[..., None], -1
    )[..., 0]
    return (batch.loss_weights * nll).sum() / batch.loss_weights.sum()

  loss, gradient = jax.jit(jax.value_and_grad(dense))(params)
  np.testing.assert_allclose(
    mean(whole[1], "loss/nats_per_token"), loss, rtol=1e-5
  )
  want = jax.tree.map(lambda p, g: p - g, params, gradient)
  assert_close(whole[0].params, want, atol=2e-6)
