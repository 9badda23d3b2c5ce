"""A run without its data and weights: the step, and the shapes it takes.

The same step that `build_run` builds, so that what is computed from its shapes
(memory, time, collectives) holds for the run.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sft_jax.common import sharding, trees
from sft_jax.common.batch import Batch
from sft_jax.models.config import ModelConfig, read_config
from sft_jax.models.lora import base_model
from sft_jax.models.transformer import Model
from sft_jax.step.train_step import TrainState, init_state
from sft_jax.training import step_runner
from sft_jax.training.build import build
from sft_jax.training.build import state as setup_state
from sft_jax.training.build import step as setup_step
from sft_jax.training.build.data import Config, kept_kind
from sft_jax.training.build.model import build_model, teacher_config


class Outline(NamedTuple):
  """What a run would be, as shapes; see `outline`.

  Attributes:
    state: `jax.ShapeDtypeStruct`s with the shardings of the run's state.
    batch: likewise, [A, B / A, T]: A micro-batches.
  """

  mesh: Mesh
  model: Model
  dtype: Any
  step: setup_step.Step
  state: TrainState
  batch: Batch

  @property
  def params(self) -> trees.Tree:
    """All parameters, trained and frozen."""
    return trees.merge(self.state.params, self.state.frozen)

  def lower(self) -> jax.stages.Lowered:
    """The program that the run would compile."""
    return step_runner.lower(self.step.train_step, self.state, self.batch)


def outline(config: Config, shape: ModelConfig, mesh: Mesh) -> Outline:
  """Builds everything that a run's step is made of, and no array.

  Raises ValueError: whatever of these `build_run` would refuse.
  """
  build.check_batch_size(config, mesh)
  built = build_model(config, shape, mesh)
  # How long a run is decides its learning rates, not the program's shape.
  num_steps = config.steps or max(config.optim.warmup_steps, 0) + 1
  key, theirs, teacher = jax.random.key(config.seed), {}, None
  if other := teacher_config(config):
    teacher = build_model(other, read_config(other.model.path), mesh)
    theirs = {base_model.TEACHER: jax.eval_shape(teacher.init, key)}
  step = setup_step.make_step(
    config, built.model, mesh, num_steps, teacher=teacher and teacher.model
  )
  params = jax.eval_shape(built.init, key)
  params = setup_state.hold_base(config, step, params, lambda x: x) | theirs
  state = jax.eval_shape(lambda p: init_state(p, step.trained, step.tx), params)
  return Outline(
    mesh=mesh,
    model=built.model,
    dtype=jnp.dtype(config.model.dtype),
    step=step,
    state=jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state,
      setup_state.state_shardings(step, params, mesh),
    ),
    batch=batch_shapes(config, mesh),
  )


def batch_shapes(config: Config, mesh: Mesh) -> Batch:
  """The shapes and shardings of a run's batches, in micro-batches."""
  size = (config.accum_steps, config.batch_size // config.accum_steps)
  rows = sharding.row_sharding(mesh, leading_axes=1)

  def slots(dtype: Any, *more: int) -> Any:
    shape = (*size, config.data.seq_len, *more)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

  kept = {"teacher": config.distill.top, "reference": 1}.get(kept_kind(config))
  words = ("tokens", "targets", "segment_ids", "positions", "sources")
  return Batch(
    **{name: slots(jnp.int32) for name in words},
    loss_weights=slots(jnp.float32),
    roles=slots(jnp.uint8),
    **(
      {
        "teacher_ids": slots(jnp.int32, kept),
        "teacher_logps": slots(jnp.float32, kept),
      }
      if kept
      else {}
    ),
  )
