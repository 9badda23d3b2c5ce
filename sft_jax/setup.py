"""Building a run from its config: data, model, state and step.

The rooms that read `config` are this one, `setup_data` and `setup_model`
beside it, and `present` and `train` above: everything below takes plain
arguments.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from sft_jax import (
  fit,
  hub,
  optim,
  rounding,
  setup_data,
  setup_model,
  sharding,
  token_groups,
  topology,
  trees,
)
from sft_jax.batch import Batch
from sft_jax.data import (
  template_export,
  templates,
  tokenizers,
)
from sft_jax.data.encode import PARTS
from sft_jax.data.pipeline import Stream
from sft_jax.evals import behaviour_sets
from sft_jax.losses import GroupSums, LossSums, linear_cross_entropy
from sft_jax.models import reference
from sft_jax.models.transformer import Model
from sft_jax.objective import NATS, Objective
from sft_jax.setup_data import Config, Say
from sft_jax.train_step import TrainState, init_state, make_train_step


class Setup(NamedTuple):
  """All that a run needs, built from a config; see `setup`."""

  source: hub.Snapshot
  machine: topology.Machine
  mesh: Mesh
  tokenizer: tokenizers.Tokenizer
  model: Model
  state: TrainState
  state_shardings: TrainState
  loss_fn: Callable[[trees.Tree, Batch], LossSums]
  measure_fn: Callable[[trees.Tree, Batch], LossSums]
  trained: Callable[[str], bool]
  document_loss: Callable[[trees.Tree, Batch, int], GroupSums]
  train_step: Callable
  num_steps: int
  flops_per_token: float
  stream: Stream
  held_out: Stream | None
  general_text: Stream | None
  train_rows: Stream | None
  items: list[behaviour_sets.Item]
  knowledge: list[behaviour_sets.Item]
  row_nats: Callable[[trees.Tree, Batch], jax.Array]


class Step(NamedTuple):
  """What of a run depends on neither data nor weights; see `make_step`.

  Attributes:
    loss_fn: (all parameters, batch) -> sums over its trained tokens.
    measure_fn: the same, and how far from the base's the predictions are,
      where the parameters tell; see `models.reference`.
    row_nats: (all parameters, batch [B, T]) -> nats of each row's trained
      tokens [B].
    trained: whether the parameter of a path is trained.
    tx: the optimiser over the trained parameters.
    train_step: (state, batch) -> (state, metrics), not yet compiled.
    document_loss: (all parameters, batch, most documents of a row) -> sums of
      each document; see `token_groups.documents`.
  """

  loss_fn: Callable[..., LossSums]
  measure_fn: Callable[[trees.Tree, Batch], LossSums]
  row_nats: Callable[[trees.Tree, Batch], jax.Array]
  trained: Callable[[str], bool]
  tx: optax.GradientTransformation
  train_step: Callable
  document_loss: Callable[[trees.Tree, Batch, int], GroupSums]


def setup(config: Config, say: Say) -> Setup:
  """Builds mesh, data, model, state and step; announces what takes time."""
  mesh = sharding.make_mesh(**config.mesh)
  check_batch_size(config, mesh)
  source = setup_model.find_model(config)
  # From here on a local folder, whatever the model was called.
  config = config.copy_and_resolve_references()
  config.model.path = str(source.folder)
  tokenizer = tokenizers.load_tokenizer(config.model.path)
  if tokenizer.chat_template is not None:
    template = templates.chat_template(tokenizer)
    for line in template_export.described(
      template, setup_data.make_policy(config)
    ):
      say(line)
  say(f"Reading {config.data.train} ...")
  data = setup_data.load_data(config, tokenizer, say)
  num_steps = config.steps or data.stream.num_steps
  assert num_steps is not None  # Only a stream without epochs has no end.
  model, params = setup_model.load_model(config, mesh, say)
  if (config.model.param_dtype, config.optim.rounding) == (
    "bfloat16",
    "nearest",
  ):
    say(
      "model.param_dtype is bfloat16 and optim.rounding 'nearest': updates "
      "below 1/512 of a weight are lost. 'stochastic' keeps them on average."
    )
  device = mesh.devices.flat[0]
  if (device.platform, config.model.dtype) == ("cpu", "bfloat16"):
    say(
      "model.dtype is bfloat16, which a CPU emulates, several times slower "
      "than float32. Set --config.model.dtype=float32 here."
    )
  if tokenizer.vocab_size > model.config.vocab_size:
    raise ValueError(
      f"{config.model.path}: the tokenizer has {tokenizer.vocab_size} ids for "
      f"{model.config.vocab_size} rows of the embedding, expected at most as "
      "many. The tokenizer belongs to another model."
    )
  limit = model.config.position_limit
  if limit is not None and config.data.seq_len > limit:
    raise ValueError(
      f"data.seq_len: got {config.data.seq_len}, expected at most {limit}, the "
      f"positions that {config.model.path} has learned. Lower it."
    )

  streams = (data.stream, data.held_out, data.general_text)
  step = make_step(config, model, mesh, num_steps, streams)
  params = hold_base(config, step, params, jnp.copy)
  if copies := params.get(reference.COPIES):
    say(
      f"loss.kl: {trees.count(copies):,} parameters are held twice, as they "
      f"train and as the base's, {trees.num_bytes(copies) / 1e9:.3f} GB in all."
    )
  shardings = state_shardings(step, params, mesh)
  state = jax.jit(
    lambda params: init_state(params, step.trained, step.tx),
    out_shardings=shardings,
    donate_argnums=0,
  )(params)
  return Setup(
    source=source,
    machine=topology.find(""),
    mesh=mesh,
    tokenizer=tokenizer,
    model=model,
    state=state,
    state_shardings=shardings,
    loss_fn=step.loss_fn,
    measure_fn=step.measure_fn,
    trained=step.trained,
    document_loss=step.document_loss,
    train_step=step.train_step,
    num_steps=num_steps,
    flops_per_token=flops_per_token(
      step,
      model,
      trees.merge(state.params, state.frozen),
      data.stream.store.lengths,
    ),
    row_nats=step.row_nats,
    **data._asdict(),
  )


def schedule(config: Config, num_steps: int) -> optax.Schedule:
  """The learning rate of a run of so many steps."""
  return optim.schedule(
    config.optim.schedule,
    peak=config.optim.learning_rate,
    warmup_steps=config.optim.warmup_steps,
    num_steps=num_steps,
    final_fraction=config.optim.final_fraction,
  )


def make_step(
  config: Config,
  model: Model,
  mesh: Mesh | None,
  num_steps: int,
  streams: Sequence[Stream | None] = (),
) -> Step:
  """The step of a run of `num_steps`, which neither data nor weights shape.

  The loop runs it, `setup_plan` compiles it for machines that are elsewhere.
  Of `streams`, those that losses are measured on and first the one that is
  trained on, only the sources count: they are told apart in its metrics.
  """
  learning_rate = schedule(config, num_steps)
  rounding_seed = rounding.seed_of(config.optim.rounding, config.seed)
  tx = optim.adamw(
    learning_rate,
    b1=config.optim.b1,
    b2=config.optim.b2,
    eps=config.optim.eps,
    weight_decay=config.optim.weight_decay,
    decay_patterns=config.optim.decay,
    clip_norm=config.optim.clip_norm,
    rates=(("lora_b$", config.lora.plus_ratio),) if model.lora else (),
    mu_dtype=config.optim.mu_dtype,
    nu_dtype=config.optim.nu_dtype,
    rounding_seed=rounding_seed,
  )
  trains = model.lora.trains if model.lora else lambda path: True
  trained = lambda path: trains(path) and not reference.is_copy(path)
  names = [group_names(stream) for stream in streams if stream] or [
    token_groups.names(PARTS, ())
  ]
  objective = Objective(
    z_loss=config.loss.z_loss,
    label_smoothing=config.loss.label_smoothing,
    dft=config.loss.dft,
    kl=config.loss.kl,
  )

  def predict(
    params: trees.Tree, batch: Batch, dropout_key: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Hidden states, and the head they meet."""
    hidden = model.hidden(
      params,
      batch.tokens,
      batch.positions,
      batch.segment_ids,
      dropout_key=dropout_key,
    )
    return hidden, model.head(params).astype(hidden.dtype)

  def sums(
    params: trees.Tree,
    batch: Batch,
    groups: jax.Array,
    num_groups: int,
    dropout_key: jax.Array | None = None,
    base: trees.Tree | None = None,
    objective: Objective = NATS,
  ) -> LossSums:
    return linear_cross_entropy(
      *predict(params, batch, dropout_key),
      batch.targets,
      batch.loss_weights,
      groups,
      base=None if base is None else predict(base, batch),
      num_groups=num_groups,
      objective=objective,
      chunk_tokens=config.loss.chunk_tokens,
      softcap=model.config.logit_softcap,
      rows=sharding.rows(mesh) if mesh else None,
    )

  def loss_fn(
    params: trees.Tree,
    batch: Batch,
    dropout_key: jax.Array | None = None,
    measure: bool = False,
  ) -> LossSums:
    base = None
    if config.loss.kl or measure:
      base = reference.base_of(params, trained)
    groups = token_groups.of(batch, len(PARTS))
    # A stream's own sources come last: shorter lists are a prefix.
    most = max(map(len, names))
    return sums(params, batch, groups, most, dropout_key, base, objective)

  def document_loss(params: trees.Tree, batch: Batch, most: int) -> GroupSums:
    groups = token_groups.documents(batch, most)
    return sums(params, batch, groups, most * len(batch.tokens)).groups

  def row_nats(params: trees.Tree, batch: Batch) -> jax.Array:
    return document_loss(params, batch, 1).nats

  return Step(
    loss_fn=loss_fn,
    measure_fn=partial(loss_fn, measure=config.eval.kl),
    document_loss=document_loss,
    row_nats=row_nats,
    trained=trained,
    tx=tx,
    train_step=make_train_step(
      loss_fn,
      tx,
      learning_rate,
      seed=config.seed if model.lora and model.lora.dropout else None,
      group_names=names[0],
      rounding_seed=rounding_seed,
    ),
  )


def hold_base(
  config: Config,
  step: Step,
  params: trees.Tree,
  copy: Callable[[Any], Any],
) -> trees.Tree:
  """The parameters, and with loss.kl what the base needs beside them.

  Args:
    config: of the run.
    step: whose loss compares.
    params: arrays, or their shapes.
    copy: what makes one more of a leaf.

  Raises:
    ValueError: a coefficient that is none, or no base to keep to.
  """
  if not config.loss.kl:
    return params
  if config.loss.kl < 0 or config.model.from_scratch:
    raise ValueError(
      f"loss.kl: got {config.loss.kl} with model.from_scratch="
      f"{config.model.from_scratch}, expected 0 or more, and a model that "
      "knows something. Set loss.kl to 0."
    )
  copies = reference.to_copy(params, step.trained)
  return reference.with_copies(params, jax.tree.map(copy, copies))


def group_names(stream: Stream) -> tuple[str, ...]:
  """What the groups of a stream's tokens are called."""
  store = stream.store
  short = store.ledger.short_names()
  return token_groups.names(PARTS, [short[s.label] for s in store.sources])


def check_batch_size(config: Config, mesh: Mesh) -> None:
  """Raises ValueError unless every device gets as much of every part."""
  sharding.check_rows(mesh, config.batch_size, config.accum_steps)
  if config.data.seq_len % mesh.shape["context"]:
    raise ValueError(
      f"data.seq_len: got {config.data.seq_len} for mesh.context="
      f"{mesh.shape['context']}, expected a multiple. Change one of them."
    )


def state_shardings(step: Step, params: trees.Tree, mesh: Mesh) -> TrainState:
  """Moments lie where their parameters lie; counters everywhere.

  Args:
    step: whose optimiser and choice of what trains make the state.
    params: arrays or shapes, trained and frozen.
    mesh: the devices.
  """
  shapes = jax.eval_shape(
    lambda params: init_state(params, step.trained, step.tx), params
  )
  whole = sharding.replicated(mesh)
  of_params = sharding.param_shardings(shapes.params, mesh)
  return TrainState(
    step=whole,
    params=of_params,
    frozen=sharding.param_shardings(shapes.frozen, mesh),
    opt_state=optax.tree_map_params(
      step.tx,
      lambda _, s: s,
      shapes.opt_state,
      of_params,
      transform_non_params=lambda _: whole,
    ),
  )


def flops_per_token(
  step: Step,
  model: Model,
  params: trees.Tree,
  lengths: Sequence[int] | np.ndarray,
) -> float:
  """FLOPs per token of documents of these lengths; see `fit`."""
  c = model.config
  num_trained, num_frozen = fit.matmul_params(
    reference.own(params), step.trained, experts_per_token=c.experts_per_token
  )
  seen = {kind: fit.mean_context(lengths, kind.window) for kind in c.kinds}
  return fit.model_flops_per_token(
    trained_matmul_params=num_trained,
    frozen_matmul_params=num_frozen,
    num_layers=c.num_layers,
    num_heads=c.num_heads,
    head_dim=c.head_dim,
    context=sum(seen[kind] for kind in c.layers) / c.num_layers,
  )


def batches_on(mesh: Mesh, stream: Stream) -> Iterator[Batch]:
  """The batches of a stream, their rows on the devices of a mesh."""
  own = sharding.own_rows(mesh, stream.batch_size)
  for batch in stream.batches(rows=own):
    yield sharding.put_rows(batch, sharding.rows(mesh))
