"""What a config says of the step reaches it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from configs import base
from sft_jax.common import sharding, trees
from sft_jax.models import transformer
from sft_jax.models.config import read_config
from sft_jax.models.lora import lora
from sft_jax.models.lora.lora import LoraConfig
from sft_jax.step.train_step import init_state, split_micro_batches
from sft_jax.training import selfcheck
from sft_jax.training.build import model as build_model
from sft_jax.training.build import step as setup_step
from sft_jax.training.build.data import load_tokenizer

V = tiny.SPECK.vocab_size


def nats(dropout):
  """Of a batch in evaluation, and at two steps of training that move little."""
  config = base.get_config()
  config.optim.learning_rate = 0.0
  adapters = LoraConfig(rank=2, alpha=64.0, dropout=dropout)
  model = transformer.build(tiny.SPECK, lora=adapters)
  mesh = sharding.make_mesh(8, 1, 1)
  step = setup_step.make_step(config, model, mesh, num_steps=100)
  params = trees.map_paths(
    lambda path, x: x + 0.1 if path.endswith("lora_b") else x,
    jax.jit(model.init)(jax.random.key(0)),
  )
  batch = selfcheck.toy_batch(8, 16, V)
  evaluated = jax.jit(step.loss_fn)(params, batch).nats
  state = init_state(params, step.trained, step.tx)
  train_step, trained = jax.jit(step.train_step), []
  for _ in range(2):
    state, pairs = train_step(state, split_micro_batches(batch, 1))
    trained.append(pairs["loss/nats_per_token"][0])
  return float(evaluated), [float(x) for x in trained]


def test_dropout_is_of_training_alone():
  plain, steps = nats(0.0)
  assert steps == pytest.approx([plain, plain], rel=1e-5)
  evaluated, steps = nats(0.5)
  assert evaluated == pytest.approx(plain, rel=1e-5)
  gaps = np.abs(np.array([*steps, steps[0] - steps[1] + plain]) / plain - 1)
  assert gaps.min() > 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_train_alone_get_the_tables_gradient(tied):
  """As those rows of the whole tables would, head and lookup added up."""
  config = base.get_config()
  spec = dataclasses.replace(tiny.SPECK, tie_embeddings=tied)
  ids = (2, 5, V - 1)
  adapters = LoraConfig(rank=2, alpha=4.0, token_rows=ids)
  batch = jax.tree.map(jnp.asarray, selfcheck.toy_batch(2, 16, V))

  def gradient(lora, params, trained):
    model = transformer.build(spec, lora=lora)
    step = setup_step.make_step(config, model, None, 100)
    chosen, rest = trees.partition(params, trained)
    loss = lambda p: step.loss_fn(trees.merge(p, rest), batch).objective
    return trees.flatten(jax.jit(jax.grad(loss))(chosen)), step

  params = transformer.build(spec).init(jax.random.key(0))
  tables = lambda path: path.endswith("/embedding")
  want, _ = gradient(None, params, tables)
  adapted = lora.init(jax.random.key(1), params, adapters)
  got, step = gradient(adapters, adapted, lambda p: p.endswith("lora_rows"))
  assert len(got) == (1 if tied else 2)
  for path, g in got.items():
    table = want[path.replace("lora_rows", "embedding")]
    np.testing.assert_allclose(
      g, table[np.array(ids)], atol=1e-5 * np.abs(table).max()
    )
  assert {p for p in trees.flatten(adapted) if step.trained(p)} > got.keys()
  assert not any(step.trained(path) for path in want)


def test_new_tokens_grow_the_model_and_train_alone():
  config = base.get_config()
  config.lora.rank = 2
  config.model.new_tokens = ("<|first|>", "<|second|>")
  old = read_config(config.model.path)
  tokenizer = load_tokenizer(config, config.model.path)
  new = [tokenizer.special_tokens[text] for text in config.model.new_tokens]
  lines = []
  mesh = sharding.make_mesh(8, 1, 1)
  config.model.chat_template = "chatml"
  model, params = build_model.load_model(config, mesh, lines.append)
  rows = model.lora.token_rows
  stop = load_tokenizer(config, config.model.path).special_tokens["<|im_end|>"]
  assert {stop, *new} <= set(rows)
  assert model.config.vocab_size >= max(*new, *rows) + 1 > old.vocab_size
  assert len(params["embed"]["embedding"]) == model.config.vocab_size
  assert len(params["embed"]["lora_rows"]) == len(rows)
  assert any("grows from" in line for line in lines)
  config.lora.new_token_rows = ()
  assert not build_model.load_model(config, mesh, print)[0].lora.token_rows
  config.lora.new_token_rows = ("<|nobody|>",)
  with pytest.raises(ValueError, match=r"new_token_rows: \['<\|nobody\|>'\]"):
    build_model.load_model(config, mesh, print)
