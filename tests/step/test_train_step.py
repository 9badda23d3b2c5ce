"""The step is the same however its batch is cut and spread."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from sft_jax.common import flops as fit
from sft_jax.common import sharding, trees
from sft_jax.common.batch import Batch
from sft_jax.models import transformer
from sft_jax.models.config import config_from_fields, parse_config
from sft_jax.models.lora import lora, quantize
from sft_jax.step import loss_groups, optimizer
from sft_jax.step.loss import linear_cross_entropy
from sft_jax.step.train_step import (
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


PARTS, SOURCES = ("user", "answer", "stop"), ("a", "b")
NAMES = loss_groups.names(PARTS, SOURCES)


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
    rng.integers(0, len(PARTS), (B, T)).astype(np.uint8),
    np.where(segment_ids == 2, 1, 0).astype(np.int32),
  )


def make(
  trained=everything, tx=None, adapters=None, codec="", seed=None, mesh=None
):
  """(step function, fresh state) of a tiny model under SGD."""
  model = transformer.build(CONFIG, lora=adapters)
  tx = tx or optax.sgd(1.0)

  def loss_fn(params, batch, dropout_key=None):
    hidden = model.hidden(
      params,
      batch.tokens,
      batch.positions,
      batch.segment_ids,
      dropout_key=dropout_key,
    )
    return linear_cross_entropy(
      hidden,
      model.head(params),
      batch.targets,
      batch.loss_weights,
      loss_groups.of(batch, len(PARTS)),
      num_groups=len(NAMES),
      rows=sharding.row_sharding(mesh) if mesh else None,
    )

  step = make_train_step(
    loss_fn, tx, lambda step: 0.5, seed=seed, group_names=NAMES
  )
  params = model.init(jax.random.key(0))
  if codec:
    params = quantize.pack_tree(params, codec, keep=trained)
  return step, init_state(params, trained, tx)


COMPARED = (
  "loss/nats_per_token",
  "acc/token",
  "entropy/nats",
  "loss/source/b",
  "acc/role/answer",
  "loss/first_token",
  "data/fill",
  "data/trained_fraction",
  "optim/grad_norm",
  "optim/update_ratio",
)


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
  for name in COMPARED:
    np.testing.assert_allclose(mean(pairs, name), mean(whole[1], name), 1e-5)
  assert_close(got.params, whole[0].params, atol=2e-6)
  assert int(got.step) == 1


def test_counts_and_norms_are_those_of_numpy(batch, whole):
  state, pairs = whole
  before = trees.flatten(make()[1].params)
  after = trees.flatten(state.params)
  norm = lambda leaves: np.sqrt(
    sum(np.square(np.asarray(x, np.float64)).sum() for x in leaves)
  )
  change = norm(
    np.asarray(after[p], "f8") - np.asarray(before[p], "f8") for p in before
  )
  # SGD with a rate of 1: the change is the gradient.
  np.testing.assert_allclose(pairs["optim/grad_norm"][0], change, rtol=1e-4)
  ratio = change / norm(before.values())
  np.testing.assert_allclose(pairs["optim/update_ratio"][0], ratio, rtol=1e-4)
  tokens = np.count_nonzero(batch.segment_ids)
  trained = np.count_nonzero(batch.loss_weights)
  assert 0 < trained < tokens < B * T
  assert pairs["data/fill"] == (tokens, B * T)
  assert pairs["data/trained_fraction"] == (trained, tokens)


def test_each_group_has_its_own_mean(batch, whole):
  """Sums over groups, counted by hand over the dense nll of every token."""
  model = transformer.build(CONFIG)
  params = model.init(jax.random.key(0))
  z = model.logits(
    params,
    model.hidden(params, batch.tokens, batch.positions, batch.segment_ids),
  )
  nll = -np.take_along_axis(
    np.asarray(jax.nn.log_softmax(z)), batch.targets[..., None], -1
  )[..., 0]
  trained = batch.loss_weights > 0
  members = {
    "role/user": batch.roles == 0,
    "role/answer": batch.roles == 1,
    "stop_token": batch.roles == 2,
    "source/a": batch.sources == 0,
    "source/b": batch.sources == 1,
    "first_token": np.zeros((B, T), bool),
  }
  for row in range(B):
    for t in range(T):
      first = trained[row, t] and (t == 0 or not trained[row, t - 1])
      members["first_token"][row, t] = first
  assert set(NAMES) == members.keys()
  hit = np.asarray(z).argmax(-1) == batch.targets
  for name, mine in members.items():
    w = batch.loss_weights * mine
    assert w.sum() > 0
    for metric, value in (("loss", nll), ("acc", hit)):
      np.testing.assert_allclose(
        whole[1][f"{metric}/{name}"], [(w * value).sum(), w.sum()], 1e-4
      )


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


DROPPING = lora.LoraConfig(rank=2, alpha=16.0, dropout=0.5)


def widen(state):
  """Adapters away from B = 0, where A and its inputs do not matter yet."""
  rng = np.random.default_rng(3)
  move = lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32)
  return state._replace(params=jax.tree.map(move, state.params))


def test_dropout_is_a_function_of_step_and_micro_batch(batch):
  """The step's gradient is the sum of its parts', each with its own key."""
  step, state = make(DROPPING.trains, adapters=DROPPING, seed=5)
  state, step = widen(state), jax.jit(step)
  cut = split_micro_batches(batch, 2)
  got, _ = step(state, cut)
  # Again is the same; at another step, and for the other half, it is not.
  assert_close(step(state, cut)[0].params, got.params, atol=0)
  later = step(state._replace(step=state.step + 1), cut)[0]
  swapped = step(state, jax.tree.map(lambda x: x[::-1], cut))[0]
  for other in (later, swapped):
    gap = jax.tree.map(
      lambda a, b: jnp.abs(a - b).max(), other.params, got.params
    )
    assert max(jax.tree.leaves(gap)) > 1e-3
  # By hand: a loss of the whole, its halves under fold_in(fold_in(seed, 0), a).
  model = transformer.build(CONFIG, lora=DROPPING)
  key = jax.random.fold_in(jax.random.key(5), 0)

  def nats(trained, part, key):
    params = trees.merge(trained, state.frozen)
    hidden = model.hidden(
      params,
      part.tokens,
      part.positions,
      part.segment_ids,
      dropout_key=key,
    )
    return linear_cross_entropy(
      hidden, model.head(params), part.targets, part.loss_weights
    ).objective

  gradient = jax.jit(jax.grad(nats))
  halves = [
    gradient(
      state.params,
      jax.tree.map(lambda x: x[a], cut),  # noqa: B023
      jax.random.fold_in(key, a),
    )
    for a in (0, 1)
  ]
  total = batch.loss_weights.sum()
  want = jax.tree.map(lambda p, *g: p - sum(g) / total, state.params, *halves)
  assert_close(got.params, want, atol=2e-6)


@pytest.mark.parametrize(
  ("choices", "codec"),
  [
    ({"dora": True, "dropout": 0.25, "also_train": ("norm",)}, ""),
    ({"init": "pissa", "rank_pattern": (("mlp/", 2),)}, "nf4"),
  ],
)
def test_devices_do_not_matter_to_adapters(batch, choices, codec):
  """Every kind of leaf divided over a mesh; dropout draws the same masks."""
  adapters = lora.LoraConfig(rank=4, alpha=8.0, **choices)
  choices = {"adapters": adapters, "codec": codec, "seed": 0}
  step, state = make(adapters.trains, **choices)
  state = widen(state)
  want, _ = jax.jit(step)(state, split_micro_batches(batch, 2))
  mesh = sharding.make_mesh(2, 2, 2)
  step, _ = make(adapters.trains, mesh=mesh, **choices)
  spread = state._replace(
    step=jax.device_put(state.step, sharding.replicated(mesh)),
    **{
      name: jax.device_put(tree, sharding.param_shardings(tree, mesh))
      for name, tree in (("params", state.params), ("frozen", state.frozen))
    },
  )
  rows = sharding.put_rows(
    split_micro_batches(batch, 2), sharding.row_sharding(mesh, leading_axes=1)
  )
  got, _ = jax.jit(step)(spread, rows)
  assert_close(got.params, want.params, atol=5e-6)
  assert_close(got.frozen, state.frozen, atol=0)
  whole = trees.merge(spread.frozen, spread.params)
  divided = {
    path.rpartition("/")[2]
    for path, x in trees.flatten(whole).items()
    if not x.sharding.is_fully_replicated
  }
  assert {"lora_a", "lora_b"} <= divided
  assert {"kernel_codes", "embedding_codes"} <= divided or not codec


def dot_flops(text: str) -> tuple[int, set[tuple[int, ...]]]:
  """(FLOPs of all products of a compiled program, their shapes)."""
  shape_of = {
    name: tuple(map(int, filter(None, dims.split(","))))
    for name, dims in re.findall(r"(%[\w.-]+) = \w+\[([\d,]*)\]", text)
  }
  shape_of |= {
    f"%{name}": tuple(map(int, filter(None, dims.split(","))))
    for name, dims in re.findall(r"([\w.-]+): \w+\[([\d,]*)\]", text)
  }
  total, shapes = 0, set()
  pattern = (
    r"(%[\w.-]+) = .* dot\((%[\w.-]+), .*lhs_contracting_dims={([\d,]*)}"
  )
  for out, left, axes in re.findall(pattern, text):
    summed = [shape_of[left][int(axis)] for axis in axes.split(",")]
    total += 2 * int(np.prod(shape_of[out])) * int(np.prod(summed))
    shapes.add(shape_of[out])
  return total, shapes


def test_lora_forms_no_gradient_of_the_base():
  """Products and memory of a compiled step: rank 16, D = 512, 4 layers."""
  config = config_from_fields(
    "llama",
    vocab_size=8192,
    num_layers=4,
    d_model=512,
    d_ff=2048,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    max_positions=128,
    tie_embeddings=False,
  )
  found = {}
  for name, adapters in (
    ("full", None),
    ("lora", lora.LoraConfig(rank=16, alpha=32.0)),
  ):
    # Unrolled: the body of a loop is printed, and would be counted, once.
    model = transformer.build(config, lora=adapters, scan=False)
    tx = optax.adamw(1e-3)

    def loss_fn(params, batch, model=model):
      hidden = model.hidden(params, batch.tokens)
      return linear_cross_entropy(
        hidden, model.head(params), batch.targets, batch.loss_weights
      )

    trained = adapters.trains if adapters else everything
    state = jax.eval_shape(
      lambda key, model=model, trained=trained, tx=tx: init_state(
        model.init(key), trained, tx
      ),
      jax.random.key(0),
    )
    ids = jax.ShapeDtypeStruct((1, 2, 128), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, 2, 128), jnp.float32)
    step = make_train_step(loss_fn, tx, lambda step: 1e-3)
    compiled = (
      jax.jit(step, donate_argnums=0)
      .lower(state, Batch(ids, ids, weights, ids, ids))
      .compile()
    )
    flops, shapes = dot_flops(compiled.as_text())
    found[name] = (flops, shapes, fit.program(compiled), state)
  flops, shapes, program, state = found["lora"]
  full_flops, full_shapes, full_program, full_state = found["full"]
  assert full_flops > 6 * 256 * (trees.count(full_state.params) - 512 * 8192)
  assert flops <= 0.72 * full_flops, flops / full_flops
  kernels = {(512, 2048), (2048, 512), (8192, 512), (512, 512)}
  turned = {shape[::-1] for shape in kernels}
  assert full_shapes & (kernels | turned)
  assert not shapes & (kernels | turned)
  # No moments of the base (2 x 4 bytes), and no gradient (4 bytes).
  base, adapters = (
    trees.num_bytes(full_state.params),
    trees.num_bytes(state.params),
  )
  saved = full_program.memory - program.memory
  assert saved > 2 * base + 0.5 * base - 3 * adapters
  assert trees.num_bytes(state.opt_state) <= 2 * adapters + 8


def test_steps_are_those_of_the_optimiser_by_hand():
  """Three steps on a loss whose gradient is the parameter: state and rate."""
  rate = optax.linear_schedule(0.1, 0.02, 4)
  tx = optax.adam(rate)

  def loss_fn(params, batch):
    # Half of sum(w p^2), of weight sum(w): the mean gradient is p.
    weight = batch.loss_weights.sum()
    nats = weight * jnp.square(params["p"]).sum() / 2
    return tiny.loss_sums(nats, weight)

  params = {"p": jnp.array([1.0, -2.0, 0.5])}
  state = init_state(params, everything, tx)
  step = jax.jit(make_train_step(loss_fn, tx, rate))
  ids = np.zeros((1, 2, 4), np.int32)
  batch = Batch(ids, ids, np.ones((1, 2, 4), np.float32), ids, ids)
  by_hand, moments = params, tx.init(params)
  for number in range(3):
    state, pairs = step(state, batch)
    old = np.asarray(by_hand["p"])
    updates, moments = tx.update(by_hand, moments, by_hand)
    by_hand = optax.apply_updates(by_hand, updates)
    change = np.linalg.norm(by_hand["p"] - old)
    for name, value in (
      ("optim/grad_norm", np.linalg.norm(old)),
      ("optim/update_ratio", change / np.linalg.norm(old)),
    ):
      np.testing.assert_allclose(pairs[name][0], value, rtol=1e-4)
    np.testing.assert_allclose(state.params["p"], by_hand["p"], rtol=1e-5)
    assert float(pairs["optim/learning_rate"][0]) == float(rate(number))
    assert int(state.step) == number + 1


def test_a_refused_step_moves_no_schedule_on():
  """What is recorded is the rate of the next step that is applied."""
  rate = lambda step: 0.1 * (step + 1.0)

  def loss_fn(params, batch):
    weight = batch.loss_weights.sum()
    return tiny.loss_sums(weight * params["p"].sum(), weight)

  params = {"p": jnp.ones(3)}
  tx = optax.adam(rate)
  state = init_state(params, everything, tx)
  step = jax.jit(make_train_step(loss_fn, tx, rate))
  ids = np.zeros((1, 1, 4), np.int32)
  weights = np.ones((1, 1, 4), np.float32)
  recorded, moved = [], []
  for good in (True, False, True):
    batch = Batch(ids, ids, weights if good else weights * np.nan, ids, ids)
    before = state.params["p"]
    state, pairs = step(state, batch)
    recorded.append(float(pairs["optim/learning_rate"][0]))
    moved.append(float(jnp.max(jnp.abs(state.params["p"] - before))))
  np.testing.assert_allclose(recorded, [0.1, 0.2, 0.2], rtol=1e-6)
  # Adam's steps on a steady gradient have the rate's size.
  np.testing.assert_allclose(moved, [0.1, 0.0, 0.2], atol=0.01)
  assert int(state.step) == 3


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
  assert pairs["optim/nonfinite"][0] == 0
  assert_close(got.params, state.params, atol=0)


@pytest.mark.parametrize("name", ["nearest", "stochastic"])
def test_small_updates_of_bfloat16_parameters(name):
  """200 steps of 1/2000 of a weight are lost to nearest, not to stochastic."""
  sums = lambda params: tiny.loss_sums(
    params["w"].astype(jnp.float32).sum(), jnp.ones(())
  )
  step = make_train_step(
    lambda params, batch: sums(params),
    optax.sgd(1 / 2000),
    lambda step: 1 / 2000,
    rounding_seed=optimizer.rounding_seed(name, 0),
  )
  step = jax.jit(step)
  params = {"w": jnp.ones(4096, jnp.bfloat16)}
  state = init_state(params, everything, optax.sgd(1 / 2000))
  one = Batch(*[np.ones((1, 1, 1), np.int32)] * 5)
  for i in range(200):
    if i == 100:
      half = state
    state, _ = step(state, one)
  weights = np.asarray(state.params["w"], np.float64)
  if name == "nearest":
    assert (weights == 1).all()
  else:
    # From 1 to 0.9 in steps of at most 1/256: the mean of 4,096 is near.
    assert abs(weights.mean() - 0.9) < 2e-3
  # Again from the middle, as after a resume: the same bits.
  for _ in range(100):
    half, _ = step(half, one)
  assert_close(half.params, state.params, atol=0)


@pytest.mark.parametrize("kind", ["full", "lora", "bfloat16"])
@pytest.mark.parametrize("accum_steps", [1, 4])
def test_every_donated_buffer_is_used(batch, kind, accum_steps):
  """Else JAX warns, which is an error here; and all of the state is aliased."""
  adapters = lora.LoraConfig(rank=4, alpha=8.0) if kind == "lora" else None
  trained = adapters.trains if adapters else everything
  low = {}
  if kind == "bfloat16":
    low = {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16", "rounding_seed": 1}
  tx = optimizer.make(
    "adamw",
    lambda step: 1e-3,
    **{"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1},
    decay_patterns=("kernel$",),
    clip_norm=1.0,
    **low,
  )
  step, state = make(trained, tx, adapters)
  if kind == "bfloat16":
    narrow = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    state = init_state(narrow(state.params), everything, tx)
  compiled = (
    jax.jit(step, donate_argnums=0)
    .lower(state, split_micro_batches(batch, accum_steps))
    .compile()
  )
  assert fit.program(compiled).aliased >= trees.num_bytes(state)


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
