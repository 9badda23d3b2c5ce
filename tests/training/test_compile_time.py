"""A deep model compiles about as fast as a shallow one: layers are a loop."""

import time

import jax
import optax
import pytest

from sft_jax.common.batch import Batch
from sft_jax.models import transformer
from sft_jax.models.config import config_from_fields
from sft_jax.step.loss import linear_cross_entropy
from sft_jax.step.train_step import init_state, make_train_step


def lowered(num_layers: int, *, scan: bool = True):
  """The training step of a small Llama, from shapes alone."""
  config = config_from_fields(
    "llama",
    vocab_size=128,
    num_layers=num_layers,
    d_model=32,
    d_ff=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    max_positions=128,
  )
  model = transformer.build(config, attention="blocks", scan=scan)
  tx = optax.adamw(1e-4)

  def loss_fn(params, batch):
    hidden = model.hidden(
      params, batch.tokens, batch.positions, batch.segment_ids
    )
    where = batch.targets, batch.loss_weights
    return linear_cross_entropy(hidden, model.head(params), *where)

  ids = jax.ShapeDtypeStruct((1, 2, 128), "int32")
  weights = jax.ShapeDtypeStruct((1, 2, 128), "float32")
  state = jax.eval_shape(
    lambda key: init_state(model.init(key), lambda path: True, tx),
    jax.random.key(0),
  )
  step = make_train_step(loss_fn, tx, optax.constant_schedule(1e-4))
  return jax.jit(step).lower(state, Batch(ids, ids, weights, ids, ids))


def num_instructions(program) -> int:
  return program.compile().as_text().count(" = ")


def test_the_program_does_not_grow_with_its_layers():
  """Which is what bounds the time; unrolled, it does grow."""
  shallow, deep = (num_instructions(lowered(n)) for n in (2, 8))
  assert deep < 1.02 * shallow
  assert num_instructions(lowered(4, scan=False)) > 1.3 * num_instructions(
    lowered(2, scan=False)
  )


@pytest.mark.slow
def test_32_layers_compile_within_half_more_time_than_8():
  """CPU seconds of all threads, the better of two: others may be at work."""
  programs = {n: lowered(n) for n in (8, 32)}
  best = dict.fromkeys(programs, float("inf"))
  for _ in range(2):
    for n, program in programs.items():
      started = time.process_time()
      program.compile()
      best[n] = min(best[n], time.process_time() - started)
  assert best[32] < 1.5 * best[8]
