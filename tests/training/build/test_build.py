"""What a config says of the step reaches it."""

import jax
import numpy as np
import pytest

import tiny
from configs import base
from sft_jax.common import sharding, trees
from sft_jax.models import transformer
from sft_jax.models.lora.lora import LoraConfig
from sft_jax.step.train_step import init_state, split_micro_batches
from sft_jax.training import selfcheck
from sft_jax.training.build import step as setup_step

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
