"""Experts: against all of them in float64, and against transformers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from sft_jax.common import sharding, trees
from sft_jax.common.batch import Batch
from sft_jax.inference import sampler
from sft_jax.models import transformer
from sft_jax.models.config import parse_config
from sft_jax.models.hf import load_save, peft_load, peft_save
from sft_jax.models.layers.grouped import grouped_matmul, permute
from sft_jax.models.lora import lora, quantize
from sft_jax.models.lora.lora import LoraConfig
from sft_jax.models.moe import (
  Moe,
  Routing,
  clipped_swiglu,
  route,
)
from sft_jax.step import train_step
from sft_jax.step.loss import linear_cross_entropy

B, T, D, F = 8, 6, 8, 12


slow = pytest.mark.slow


def swiglu(gate, up):
  return jax.nn.silu(gate) * up


def make(seed=0, *, wide=0.5, rank=0, k=2, normalize=True, **changes):
  """A layer and wide parameters, biases and adapters included."""
  fields = {
    **{"num_experts": 4, "d_ff": F, "activation": swiglu},
    "routing": Routing(k, normalize),
    **({"lora": LoraConfig(rank=rank, alpha=rank / 2)} if rank else {}),
  }
  layer = Moe(**(fields | changes))
  shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((B, T, D)))
  shapes = {p: x.shape for p, x in trees.flatten(shapes["params"]).items()}
  for path, shape in list(shapes.items()):
    if rank and path.endswith("/kernel") and len(shape) == 3:
      parent = path.removesuffix("/kernel")
      shapes[f"{parent}/lora_a"] = (*shape[:2], rank)
      shapes[f"{parent}/lora_b"] = (shape[0], rank, shape[2])
  rng = np.random.default_rng(seed)
  params = {
    p: (wide * rng.standard_normal(s)).astype(np.float32)
    for p, s in shapes.items()
  }
  return layer, trees.unflatten(params)


def inputs(seed=1):
  return jax.random.normal(jax.random.key(seed), (B, T, D))


def call(layer, params, x, weigh=None):
  """The layer's values; with `weigh` the gradients to its inputs too."""
  fn = lambda params, x: layer.apply({"params": params}, x)

  def both(params, x):
    y, pull = jax.vjp(fn, params, x)
    return y, *pull(weigh)

  return jax.jit(fn if weigh is None else both)(params, x)


def by_hand(params, x, *, k, normalize, activation):
  """Every expert for every token, then those that count, in float64."""
  p = {path: np.float64(a) for path, a in trees.flatten(params).items()}

  def linear(name, x):
    bias = p[f"{name}/bias"][:, None] if f"{name}/bias" in p else 0
    return x @ p[f"{name}/kernel"] + bias

  tokens = np.float64(x).reshape(-1, D)
  y = linear("down", activation(linear("gate", tokens), linear("up", tokens)))
  logits = tokens @ p["router/kernel"] + p.get("router/bias", 0)
  shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  last = np.sort(shares, axis=1)[:, -k][:, None]
  shares = np.where(shares >= last, shares, 0)
  if normalize:
    shares /= shares.sum(1, keepdims=True)
  return np.einsum("me,emd->md", shares, y).reshape(x.shape)


def numpy_swiglu(gate, up):
  return gate / (1 + np.exp(-gate)) * up


def numpy_clipped(gate, up):
  gate, up = np.minimum(gate, 0.7), np.clip(up, -0.7, 0.7)
  return gate / (1 + np.exp(-1.5 * gate)) * (up + 1)


CLIPPED = partial(clipped_swiglu, alpha=1.5, limit=0.7)
CASES = {
  "normalised": ({}, numpy_swiglu),
  "not normalised": ({"normalize": False, "k": 3}, numpy_swiglu),
  "top 1": ({"normalize": False, "k": 1}, numpy_swiglu),
  "all": ({"k": 4}, numpy_swiglu),
  "biases": ({"use_bias": True, "activation": CLIPPED}, numpy_clipped),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_all_experts_in_float64(case):
  changes, activation = CASES[case]
  layer, params = make(**changes)
  x = inputs()
  hand = lambda params, x: by_hand(
    params,
    x,
    k=layer.routing.k,
    normalize=layer.routing.normalize,
    activation=activation,
  )
  weigh = inputs(2)
  y, to_params, to_x = call(layer, params, x, weigh)
  np.testing.assert_allclose(y, hand(params, x), atol=1e-5)
  # Along a random direction of each leaf, by central differences.
  rng = np.random.default_rng(3)
  leaves = {**trees.flatten({"p": params}), "x": x}
  grads = {**trees.flatten({"p": to_params}), "x": to_x}
  for path, leaf in leaves.items():
    step = rng.standard_normal(leaf.shape)
    sides = []
    for h in (1e-6, -1e-6):
      moved = leaves | {path: np.float64(leaf) + h * step}
      tree = trees.unflatten({k: v for k, v in moved.items() if k != "x"})
      sides.append(np.sum(hand(tree["p"], moved["x"]) * np.asarray(weigh)))
    want = (sides[0] - sides[1]) / 2e-6
    got = np.sum(np.float64(grads[path]) * step)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=path)


def test_shares_add_up_to_one_or_to_what_the_chosen_have():
  logits = jnp.array([[1.0, 3.0, 2.0, -1.0]])
  shares, experts = route(logits, Routing(2))
  assert experts.tolist() == [[1, 2]]
  np.testing.assert_allclose(shares.sum(), 1, rtol=1e-6)
  whole, _ = route(logits, Routing(2, normalize=False))
  np.testing.assert_allclose(
    whole, jax.nn.softmax(logits)[:, np.array([1, 2])], rtol=1e-6
  )


def test_a_correction_chooses_and_does_not_weigh():
  """Two groups of two: the better one by its two corrected scores, and of it
  the shares are the scores without the correction."""
  scores = np.array([0.9, 0.2, 0.6, 0.3], np.float32)
  logits = jnp.log(scores / (1 - scores))[None]
  grouped = Routing(1, sigmoid=True, groups=2, top_groups=1, scale=3.0)
  shares, experts = route(logits, grouped._replace(normalize=False))
  assert experts.tolist() == [[0]]
  np.testing.assert_allclose(shares, [[2.7]], rtol=1e-5)
  correction = jnp.array([-0.5, 0.1, 0.0, 0.35])
  shares, experts = route(
    logits, grouped._replace(k=2, normalize=False), correction
  )
  assert experts.tolist() == [[3, 2]]
  np.testing.assert_allclose(shares, [[0.9, 1.8]], rtol=1e-5)
  shares, _ = route(logits, grouped._replace(k=2), correction)
  np.testing.assert_allclose(shares, [[1.0, 2.0]], rtol=1e-5)
  # As DeepSeek-V2: a group is as good as its best, and all weigh.
  best = Routing(2, False, groups=2, top_groups=1, best=1)
  shares, experts = route(logits, best)
  assert experts.tolist() == [[0, 1]]
  np.testing.assert_allclose(shares[0], jax.nn.softmax(logits)[0, :2], 1e-5)


def test_a_token_does_not_depend_on_the_others():
  """Law 3, bit for bit: another order, other neighbours, the same values."""
  layer, params = make()
  apply = jax.jit(lambda x: layer.apply({"params": params}, x))
  x = inputs()
  whole = apply(x)
  order = np.random.default_rng(0).permutation(B * T)
  mixed = apply(x.reshape(-1, D)[order].reshape(B, T, D)).reshape(-1, D)
  np.testing.assert_array_equal(mixed, whole.reshape(-1, D)[order])
  crowd = jnp.tile(x[:1, :1], (B, T, 1)).at[3, 4].set(x[3, 4])
  np.testing.assert_array_equal(apply(crowd)[3, 4], whole[3, 4])


GROUPED = {
  "routing": Routing(2, sigmoid=True, groups=2, top_groups=1, scale=1.5),
  **{"num_experts": 8, "correction": 1},
}


@pytest.mark.parametrize(
  ("told", "sizes", "changes"),
  [
    (True, (2, 2, 2), {}),
    (True, (1, 2, 2, 1, 2), GROUPED),
    (True, (1, 1, 1, 1, 8), GROUPED),
    # No device has a whole number of experts: XLA divides the work.
    pytest.param(True, (1, 2, 1, 1, 4), {"num_experts": 6}, marks=slow),
    pytest.param(False, (2, 2, 2), {}, marks=slow),
    pytest.param(False, (1, 2, 2, 1, 2), GROUPED, marks=slow),
  ],
)
def test_devices_do_not_matter(told, sizes, changes):
  """Whether the layer is told of the mesh or XLA divides its work."""
  layer, params = make(rank=2, use_bias=True, **changes)
  mesh = sharding.make_mesh(*sizes)
  x, weigh = inputs(), inputs(2)

  want = call(layer, params, x, weigh)
  stacked = trees.unflatten(
    {f"layers/moe/{p}": a[None] for p, a in trees.flatten(params).items()}
  )
  places = sharding.param_shardings(stacked, mesh)
  placed = jax.device_put(stacked, places)["layers"]["moe"]
  kernel = placed["down"]["kernel"]
  experts, over = kernel.shape[1], mesh.shape["expert"]
  assert kernel.sharding.shard_shape(kernel.shape)[1:3] == (
    experts // (1 if experts % over else over),
    F // mesh.shape["tensor"],
  )
  placed = jax.tree.map(lambda a: a[0], placed)
  rows = jax.device_put(x, sharding.row_sharding(mesh))
  got = call(layer.clone(mesh=mesh if told else None), placed, rows, weigh)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    got,
    want,
  )


def test_on_a_mesh_no_device_sees_the_others_tokens():
  """Each sorts its own: no gathering of rows, in or out of the loops."""
  mesh = sharding.make_mesh(8, 1, 1)
  layer, params = make(mesh=mesh)
  params = jax.device_put(params, sharding.replicated(mesh))
  x = jax.device_put(inputs(), sharding.row_sharding(mesh))

  def gathers(layer):
    apply = jax.jit(lambda p, x: layer.apply({"params": p}, x))
    return apply.lower(params, x).compile().as_text().count("all-gather")

  assert gathers(layer) == 0
  assert gathers(layer.clone(mesh=None)) > 0


def test_adapters_equal_the_merged_experts():
  layer, params = make(rank=3, use_bias=True)
  flat = trees.flatten(params)
  merged = {p: a for p, a in flat.items() if "lora" not in p}
  for name in ("gate", "up", "down"):
    delta = flat[f"{name}/lora_a"] @ flat[f"{name}/lora_b"]
    merged[f"{name}/kernel"] = flat[f"{name}/kernel"] + 0.5 * delta
  x = inputs()
  got = call(layer, params, x)
  want = call(layer, trees.unflatten(merged), x)
  np.testing.assert_allclose(got, want, atol=2e-4)
  base = {p: a for p, a in flat.items() if "lora" not in p}
  without = call(layer, trees.unflatten(base), x)
  assert np.abs(without - want).max() > 0.1


def test_quantised_experts_are_the_experts_they_decode_to():
  """Values and gradients of inputs and adapters, beside a router that stays."""
  layer, params = make(rank=2)
  params = jax.tree.map(jnp.asarray, params)
  packed = quantize.pack_tree({"layers": {"moe": params}}, "nf4")
  packed = trees.flatten(packed["layers"]["moe"])
  assert "router/kernel" in packed
  assert packed["gate/kernel_codes"].shape == (4, D // 2, F)
  decoded = dict(quantize.unpack(packed, p) for p in packed if "_codes" in p)
  is_adapter = lambda path: "lora" in path
  trained, _ = trees.partition(params, is_adapter)
  x = inputs()

  def gradients(frozen):
    frozen = trees.unflatten(
      {p: a for p, a in frozen.items() if "lora" not in p}
    )

    def loss(trained, x):
      whole = trees.merge(trained, frozen)
      return jnp.sin(layer.apply({"params": whole}, x)).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(trained, x)

  plain = trees.flatten(params) | decoded
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
    gradients(packed),
    gradients(plain),
  )


def test_adapters_of_a_model_built_without_are_refused():
  layer, params = make(rank=3)
  with pytest.raises(ValueError, match="the parameters hold a LoRA adapter"):
    call(layer.clone(lora=None), params, inputs())


# -- In a model ----------------------------------------------------------------

CONFIG = parse_config(
  {
    "model_type": "qwen3_moe",
    "vocab_size": 40,
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
  }
)


def one_batch():
  """Eight rows, each a document of its own to learn by heart."""
  rows = np.random.default_rng(0).integers(0, 40, (8, 13), np.int32)
  ones = np.ones((8, 12), np.int32)
  positions = np.broadcast_to(np.arange(12, dtype=np.int32), (8, 12))
  return Batch(
    rows[:, :-1], rows[:, 1:], ones.astype(np.float32), ones, positions
  )


def make_step(tx, **choices):
  """(model, train step, fresh state)."""
  model = transformer.build(CONFIG, **choices)

  def loss_fn(params, batch):
    hidden = model.hidden(
      params, batch.tokens, batch.positions, batch.segment_ids
    )
    return linear_cross_entropy(
      hidden, model.head(params), batch.targets, batch.loss_weights
    )

  params = jax.jit(transformer.build(CONFIG).init)(jax.random.key(0))
  step = train_step.make_train_step(loss_fn, tx, lambda step: 0.01)
  return model, step, train_step.init_state(params, lambda path: True, tx)


@pytest.mark.parametrize(
  "scan", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_a_model_learns_rows_by_heart_and_says_them(scan):
  model, step, state = make_step(optax.adam(0.01), scan=scan)
  batch, step = one_batch(), jax.jit(step)
  for _ in range(60):
    state, metrics = step(state, train_step.split_micro_batches(batch, 1))
  total, weight = metrics["loss/nats_per_token"]
  assert total / weight < 0.05
  replies = sampler.generate(
    model.decode,
    model.logits,
    model.init_cache,
    state.params,
    batch.tokens[:, :4].tolist(),
    stop_ids=(),
    max_new_tokens=8,
  )
  said = [reply.tokens for reply in replies]
  assert said == batch.targets[:, 3:11].tolist()


@pytest.mark.slow
def test_a_step_on_a_mesh_is_the_step_on_one_device():
  batch = train_step.split_micro_batches(one_batch(), 1)
  _, step, state = make_step(optax.sgd(1.0))
  want, metrics = jax.jit(step)(state, batch)
  mesh = sharding.make_mesh(2, 2, 2)
  _, step, state = make_step(optax.sgd(1.0), mesh=mesh)
  places = sharding.param_shardings(state.params, mesh)
  whole = sharding.replicated(mesh)
  state = state._replace(
    params=jax.device_put(state.params, places),
    step=jax.device_put(state.step, whole),
  )
  rows = sharding.row_sharding(mesh, leading_axes=1)
  got, pairs = jax.jit(step)(state, sharding.put_rows(batch, rows))
  np.testing.assert_allclose(
    pairs["loss/nats_per_token"], metrics["loss/nats_per_token"], rtol=1e-5
  )
  for path, x in trees.flatten(want.params).items():
    there = trees.flatten(got.params)[path]
    np.testing.assert_allclose(there, x, atol=5e-6, err_msg=path)


# -- Against transformers' own blocks -----------------------------------------


def theirs(family):
  """Their block, its state as our parameters, and our layer."""
  torch = pytest.importorskip("torch", reason="live oracle: needs torch")
  transformers = pytest.importorskip("transformers", reason="live oracle")
  models = transformers.models
  sizes = {
    "hidden_size": D,
    "intermediate_size": F,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
  }
  torch.manual_seed(0)
  if family == "mixtral":
    config = transformers.MixtralConfig(**sizes)
    block = models.mixtral.modeling_mixtral.MixtralSparseMoeBlock(config)
    layer, _ = make()
  elif family == "qwen3_moe":
    config = transformers.Qwen3MoeConfig(**sizes, moe_intermediate_size=F)
    block = models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config)
    layer, _ = make(normalize=False)
  else:
    config = transformers.GptOssConfig(**sizes, swiglu_limit=0.7)
    block = models.gpt_oss.modeling_gpt_oss.GptOssMLP(config)
    activation = partial(clipped_swiglu, alpha=1.702, limit=0.7)
    layer, _ = make(use_bias=True, activation=activation)
  state = {}
  with torch.no_grad():
    for name, weight in block.named_parameters():
      weight.copy_(0.5 * torch.randn(weight.shape))
      state[name] = weight.numpy()
  return torch, block, ours(state), layer


def ours(state):
  """Their tensors, gradients or weights, as our parameters."""
  fused = state["experts.gate_up_proj"]
  if "router.weight" in state:
    bias = state["experts.gate_up_proj_bias"]
    gate, up = fused[..., ::2], fused[..., 1::2]
    return {
      "router": {
        "kernel": state["router.weight"].T,
        "bias": state["router.bias"],
      },
      "gate": {"kernel": gate, "bias": bias[:, ::2]},
      "up": {"kernel": up, "bias": bias[:, 1::2]},
      "down": {
        "kernel": state["experts.down_proj"],
        "bias": state["experts.down_proj_bias"],
      },
    }
  fused = fused.swapaxes(1, 2)
  return {
    "router": {"kernel": state["gate.weight"].T},
    "gate": {"kernel": fused[..., :F]},
    "up": {"kernel": fused[..., F:]},
    "down": {"kernel": state["experts.down_proj"].swapaxes(1, 2)},
  }


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_values_and_gradients_equal_transformers(family):
  torch, block, params, layer = theirs(family)
  x, weigh = inputs(), inputs(2)
  want = block(torch.tensor(np.asarray(x)))
  want = want[0] if isinstance(want, tuple) else want
  (want * torch.tensor(np.asarray(weigh))).sum().backward()
  y, got, _ = call(layer, params, x, weigh)
  np.testing.assert_allclose(y, want.detach().numpy(), atol=1e-5)
  grads = {n: w.grad.numpy() for n, w in block.named_parameters()}
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()),
    got,
    ours(grads),
  )


# -- Layers with and without experts ---------------------------------------


@pytest.mark.parametrize(
  ("fields", "dense"),
  [
    ({"mlp_only_layers": [1]}, [0, 1, 0, 0]),
    ({"decoder_sparse_step": 2}, [1, 0, 1, 0]),
    ({"mlp_only_layers": [3], "decoder_sparse_step": 2}, [1, 0, 1, 1]),
  ],
)
def test_dense_layers_among_those_of_experts(fields, dense, tmp_path):
  """As transformers computes them; written back byte for byte."""
  torch = pytest.importorskip("torch", reason="live oracle: needs torch")
  transformers = pytest.importorskip("transformers", reason="live oracle")
  config = transformers.AutoConfig.for_model(
    "qwen3_moe",
    **{"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40},
    **{"moe_intermediate_size": 16, "num_hidden_layers": 4, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4},
    **{"num_experts_per_tok": 2, "max_position_embeddings": 64},
    **fields,
  )
  theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
  seed = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for weight in theirs.parameters():
      weight.copy_(torch.randn(weight.shape, generator=seed) * 0.2)
  theirs.save_pretrained(tmp_path / "theirs")
  tokens = np.random.default_rng(0).integers(0, 61, (2, 16))
  with torch.no_grad():
    want = theirs(torch.tensor(tokens)).logits.numpy()
  model, params = load_save.load_pretrained(tmp_path / "theirs")
  assert [kind.dense for kind in model.config.layers] == dense
  assert params["layers"]["mlp"]["up"]["kernel"].shape == (sum(dense), 24, 40)

  def loss(params):
    logits = model.logits(params, model.hidden(params, tokens))
    return jnp.sum(jnp.sin(logits)), logits

  (_, got), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(got, want, atol=2e-5)
  assert all(float(jnp.max(jnp.abs(x))) > 0 for x in jax.tree.leaves(gradients))
  fresh = jax.eval_shape(model.init, jax.random.key(0))
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
  load_save.save_pretrained(tmp_path / "ours", model, params)
  written = load_file(tmp_path / "ours" / "model.safetensors")
  for name, x in load_file(tmp_path / "theirs" / "model.safetensors").items():
    np.testing.assert_array_equal(written.pop(name), x)
  assert not written
  _adapters_of_some_layers_come_back(model, params, tokens, tmp_path / "peft")


def _adapters_of_some_layers_come_back(base, frozen, tokens, folder):
  """Gate and up share an adapter in the folder, so outputs are compared."""
  config, adapters = base.config, LoraConfig(rank=2, alpha=1.0)
  model = transformer.build(config, lora=adapters)
  params = lora.init(jax.random.key(0), frozen, adapters)
  flat = trees.flatten(params)
  for path, x in flat.items():
    flat[path] = 0.1 + x if path.endswith("/lora_b") else x
  params = trees.unflatten(flat)
  peft_save.save_adapter(folder, model, params, base="base")
  found = peft_load.load_adapter(folder, config)
  again = lora.init(jax.random.key(1), frozen, found.lora)
  again = peft_load.place_adapter(again, found.leaves)
  same = transformer.build(config, lora=found.lora)
  got, want = same.hidden(again, tokens), model.hidden(params, tokens)
  np.testing.assert_allclose(got, want, atol=2e-5)
  assert np.abs(want - base.hidden(frozen, tokens)).max() > 1e-2


# -- Grouped products --------------------------------------------------


def draw(rng, *shape):
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@jax.jit
def both_ways(x, kernel, sizes, dy):
  y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, kernel)
  return y, *pull(dy)


@given(st.lists(st.integers(0, 40), min_size=3, max_size=3), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_values_and_gradients_equal_a_product_per_group(cuts, seed):
  rows, groups = 40, 4
  sizes = np.diff([0, *sorted(cuts), rows])
  rng = np.random.default_rng(seed)
  x, kernel = draw(rng, rows, 3), draw(rng, groups, 3, 5)
  dy = draw(rng, rows, 5)
  y, dx, dw = map(np.asarray, both_ways(x, kernel, sizes, dy))
  x, kernel, dy = map(np.asarray, (x, kernel, dy))
  group = np.repeat(np.arange(groups), sizes)
  for i, g in enumerate(group):
    np.testing.assert_allclose(y[i], x[i] @ kernel[g], atol=1e-5)
    np.testing.assert_allclose(dx[i], kernel[g] @ dy[i], atol=1e-5)
  for g in range(groups):
    want = x[group == g].T @ dy[group == g]
    np.testing.assert_allclose(dw[g], want, atol=1e-4)


def test_a_row_does_not_depend_on_the_other_rows():
  """Bit for bit, wherever in its group and in its block a row lies."""
  rng = np.random.default_rng(0)
  x, kernel = draw(rng, 48, 16), draw(rng, 2, 16, 8)
  sizes = jnp.array([21, 27])
  whole = grouped_matmul(x, kernel, sizes)
  changed = np.array([0, 3, 20, 22, 47])
  other = grouped_matmul(x.at[changed].set(1e30), kernel, sizes)
  same = np.setdiff1d(np.arange(48), changed)
  np.testing.assert_array_equal(whole[same], other[same])


def test_no_gradient_of_a_frozen_kernel_is_formed():
  """The second loop of the backward pass is left out, not thrown away."""
  x, kernel = jnp.ones((64, 8)), jnp.ones((4, 8, 8))
  sizes = jnp.full(4, 16)

  def loops(argnums):
    fn = jax.grad(lambda *a: jnp.sum(grouped_matmul(*a) ** 2), argnums)
    text = jax.jit(fn).lower(x, kernel, sizes).compile().as_text()
    return text.count(" while(")

  assert loops((0,)) == loops((0, 1)) - 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_kept(dtype):
  x, kernel = jnp.ones((6, 4), dtype), jnp.ones((2, 4, 3), dtype)
  fn = lambda x, w: grouped_matmul(x, w, jnp.array([2, 4]))
  y, pull = jax.vjp(fn, x, kernel)
  assert y.dtype == dtype
  assert {g.dtype for g in pull(y)} == {jnp.dtype(dtype)}


def test_permute_and_its_gradient():
  rng = np.random.default_rng(0)
  x, order = draw(rng, 6, 2), jnp.asarray(rng.permutation(6))
  inverse = jnp.argsort(order)
  y, pull = jax.vjp(lambda x: permute(x, order, inverse), x)
  np.testing.assert_array_equal(y, x[order])
  np.testing.assert_array_equal(pull(y)[0], x)
