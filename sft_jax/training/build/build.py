"""Building a run from its config: data, model, state and step.

Only `training` and `commands` read `config`: everything below takes plain
arguments.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sft_jax.common import hub, machines, sharding, trees
from sft_jax.common.batch import Batch
from sft_jax.data.chat import template as templates
from sft_jax.data.chat import template_export
from sft_jax.data.pipeline import Stream
from sft_jax.data.tokenizers import tokenizer as tokenizers
from sft_jax.evals import behaviors
from sft_jax.models.lora import base_model
from sft_jax.models.transformer import Model
from sft_jax.step.loss import LossSums
from sft_jax.step.train_step import TrainState, init_state
from sft_jax.training.build import data as setup_data
from sft_jax.training.build import model as setup_model
from sft_jax.training.build import state as setup_state
from sft_jax.training.build import step as setup_step
from sft_jax.training.build.data import NOTHING, Config, Log, Own
from sft_jax.training.planning import suggest

_FEW_STEPS = 20


class BuiltRun(NamedTuple):
  """All that a run needs, built from a config; see `build_run`."""

  source: hub.Snapshot
  machine: machines.Machine
  mesh: Mesh
  tokenizer: tokenizers.Tokenizer
  model: Model
  state: TrainState
  state_shardings: TrainState
  loss_fn: Callable[[trees.Tree, Batch], LossSums]
  measure_fn: Callable[..., LossSums]
  trained: Callable[[str], bool]
  train_step: Callable
  num_steps: int
  flops_per_token: float
  stream: Stream
  held_out: Stream | None
  general_text: Stream | None
  train_rows: Stream | None
  items: list[behaviors.Item]
  knowledge: list[behaviors.Item]
  row_nats: Callable[[trees.Tree, Batch], jax.Array]
  suggestion: suggest.Suggestion | None = None


def build_run(config: Config, log: Log, own: Own = NOTHING) -> BuiltRun:
  """Builds mesh, data, model, state and step; logs what takes time.

  In `config` it leaves what it found: a date, a learning rate of 'auto'.
  """
  given = config
  mesh = sharding.make_mesh(**config.mesh)
  check_batch_size(config, mesh)
  source = setup_model.find_model(config)
  # From here on a local folder, whatever the model was called.
  tokenizer = setup_data.load_tokenizer(config, source.folder, log)
  config = config.copy_and_resolve_references()
  config.model.path = str(source.folder)
  if tokenizer.chat_template is not None:
    template = templates.chat_template(tokenizer)
    options = setup_data.make_render_options(config)
    for line in template_export.described(template, options):
      log(line)
  log(f"Reading {own.rows or config.data.train} ...")
  data = setup_data.load_data(config, tokenizer, log, own)
  num_steps = config.steps or data.stream.num_steps
  assert num_steps is not None  # Only a stream without epochs has no end.
  if num_steps < _FEW_STEPS:
    log(_few_steps(config, data.stream, num_steps))
  model, params = setup_model.load_model(config, mesh, log)
  setup_state.check_reference(config, params, data.stream, data.held_out)
  narrow = not model.lora and config.model.param_dtype == "bfloat16"
  if narrow and config.optim.rounding == "nearest":
    log(
      "model.param_dtype is bfloat16 and optim.rounding 'nearest': updates "
      "below 1/512 of a weight are lost. 'stochastic' keeps them on average."
    )
  device = mesh.devices.flat[0]
  if (device.platform, config.model.dtype) == ("cpu", "bfloat16"):
    log(
      "model.dtype is bfloat16, which a CPU emulates, several times slower "
      "than float32. Set --config.model.dtype=float32 here."
    )
  if tokenizer.vocab_size > model.config.vocab_size:
    raise ValueError(
      f"{config.model.path}: the tokenizer has {tokenizer.vocab_size} ids, "
      f"expected at most {model.config.vocab_size}, the rows of the embedding. "
      "It belongs to another model."
    )
  limit = model.config.position_limit
  if limit is not None and config.data.seq_len > limit:
    raise ValueError(
      f"data.seq_len: got {config.data.seq_len}, expected at most {limit}, the "
      f"positions that {config.model.path} has learned. Lower it."
    )

  suggestion = None
  if config.optim.learning_rate == "auto" and not own.optimizer:
    suggestion = suggest.find_rate(
      *(config, model, mesh, params, data.stream, data.held_out),
      *(num_steps, log, own),
    )
    log(f"optim.learning_rate is 'auto': {suggestion}")
    for one in (given, config):
      one.optim.learning_rate = suggestion.rate
  streams = (data.stream, data.held_out, data.general_text)
  teacher = setup_model.load_teacher(config, tokenizer, mesh, log)
  step = setup_step.make_step(
    *(config, model, mesh, num_steps, streams),
    loss=own.loss,
    tx=own.optimizer,
    teacher=teacher and teacher[0],
  )
  params = setup_state.hold_base(config, step, params, jnp.copy)
  if teacher:
    size = trees.num_bytes(teacher[1])
    log(f"distill.teacher: {size / 1e9:.3f} GB beside the model.")
    params[base_model.TEACHER] = teacher[1]
  if copies := params.get(base_model.COPIES):
    log(
      f"base: {trees.count(copies):,} parameters are held twice, as they "
      f"train and as the base's, {trees.num_bytes(copies) / 1e9:.3f} GB in all."
    )
  shardings = setup_state.state_shardings(step, params, mesh)
  state = jax.jit(
    lambda params: init_state(params, step.trained, step.tx),
    out_shardings=shardings,
    donate_argnums=0,
  )(params)
  return BuiltRun(
    source=source,
    machine=machines.find_machine(""),
    mesh=mesh,
    tokenizer=tokenizer,
    model=model,
    state=state,
    state_shardings=shardings,
    num_steps=num_steps,
    flops_per_token=setup_state.flops_per_token(
      step,
      model,
      trees.merge(state.params, state.frozen),
      data.stream.store.lengths,
    ),
    **{k: x for k, x in step._asdict().items() if k in BuiltRun._fields},
    suggestion=suggestion,
    **data._asdict(),
  )


def _few_steps(config: Config, stream: Stream, num_steps: int) -> str:
  """What a run of few steps is warned of, and what would give it more."""
  line = f"warning: {num_steps} steps are few to learn from."
  if config.steps:
    return f"{line} steps=0 makes as many as epochs={config.epochs} give."
  packs = num_steps * config.batch_size
  # Halved, the batch is still divided by micro-batches and devices.
  size = config.batch_size
  while size % 2 == 0 and packs // size < _FEW_STEPS:
    size //= 2
  epochs = -(-_FEW_STEPS * config.epochs // num_steps)
  return (
    f"{line} batch_size={size} gives about {packs // size}, epochs={epochs} "
    f"at least {_FEW_STEPS}."
  )


def check_batch_size(config: Config, mesh: Mesh) -> None:
  """Raises ValueError unless every device gets as much of every part."""
  sharding.check_rows(mesh, config.batch_size, config.accum_steps)
  if config.data.seq_len % mesh.shape["context"]:
    raise ValueError(
      f"data.seq_len: got {config.data.seq_len} for mesh.context="
      f"{mesh.shape['context']}, expected a multiple. Change one of them."
    )


def batches_on(mesh: Mesh, stream: Stream) -> Iterator[Batch]:
  """The batches of a stream, their rows on the devices of a mesh."""
  own = sharding.own_rows(mesh, stream.batch_size)
  for batch in stream.batches(rows=own):
    yield sharding.put_rows(batch, sharding.row_sharding(mesh))
