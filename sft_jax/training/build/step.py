"""The step of a run from its config, which neither data nor weights shape."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from sft_jax.common import flops, sharding, trees
from sft_jax.common.batch import Batch
from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.pipeline import Stream
from sft_jax.models.lora import base_model
from sft_jax.models.transformer import Model
from sft_jax.step import loss_groups, optimizer
from sft_jax.step.loss import (
  NATS,
  GroupSums,
  HeadRows,
  Loss,
  LossSums,
  Objective,
  linear_cross_entropy,
)
from sft_jax.step.train_step import TrainState, init_state, make_train_step
from sft_jax.training.build.data import Config


class Step(NamedTuple):
  """What of a run depends on neither data nor weights; see `make_step`.

  Attributes:
    loss_fn: (all parameters, batch) -> sums over its trained tokens.
    measure_fn: the same, and how far from the base's the predictions are,
      where the parameters tell; see `models.lora.base_model`.
    row_nats: (all parameters, batch [B, T]) -> nats of each row's trained
      tokens [B].
    trained: whether the parameter of a path is trained.
    tx: the optimizer over the trained parameters.
    train_step: (state, batch) -> (state, metrics), not yet compiled.
    document_loss: (all parameters, batch, most documents of a row) -> sums of
      each document; see `loss_groups.documents`.
  """

  loss_fn: Callable[..., LossSums]
  measure_fn: Callable[[trees.Tree, Batch], LossSums]
  row_nats: Callable[[trees.Tree, Batch], jax.Array]
  trained: Callable[[str], bool]
  tx: optax.GradientTransformation
  train_step: Callable
  document_loss: Callable[[trees.Tree, Batch, int], GroupSums]


def warmup_steps(config: Config, num_steps: int) -> int:
  """Steps of a run of so many in which the learning rate rises."""
  if config.optim.warmup_steps >= 0:
    return config.optim.warmup_steps
  return int(config.optim.warmup_fraction * num_steps)


def schedule(config: Config, num_steps: int) -> optax.Schedule:
  """The learning rate of a run of so many steps."""
  return optimizer.schedule(
    config.optim.schedule,
    peak=config.optim.learning_rate,
    warmup_steps=warmup_steps(config, num_steps),
    num_steps=num_steps,
    final_fraction=config.optim.final_fraction,
    decay_fraction=config.optim.decay_fraction,
  )


def make_step(
  config: Config,
  model: Model,
  mesh: Mesh | None,
  num_steps: int,
  streams: Sequence[Stream | None] = (),
  *,
  loss: Loss | None = None,
  tx: optax.GradientTransformation | None = None,
) -> Step:
  """The step of a run of `num_steps`, which neither data nor weights shape.

  The loop runs it, `abstract` compiles it for machines that are not here.

  Args:
    config: of the run.
    model: its functions.
    mesh: the devices; None is one.
    num_steps: length of the run.
    streams: those that losses are measured on, the training data first; of
      each only the names of the sources are read, for the metrics.
    loss: minimized in place of config.loss, see `step.loss.Loss`. A method
      `loss.extras(batch)` gives further arrays [B, T, ...] by name. Measured
      is the cross-entropy all the same.
    tx: used in place of config.optim; it contains its own learning rate.

  Raises:
    ValueError: a setting of config.optim that does not exist; a loss of one's
      own together with loss.kl.
  """
  if loss is not None and config.loss.kl:
    raise ValueError(
      f"loss.kl: got {config.loss.kl} with a loss of your own, expected 0: it "
      "replaces the objective. Add the divergence to your loss."
    )
  learning_rate = schedule(config, num_steps)
  rounding_seed = optimizer.rounding_seed(config.optim.rounding, config.seed)
  own = tx is not None
  tx = tx or optimizer.make(
    config.optim.name,
    learning_rate,
    b1=config.optim.b1,
    b2=config.optim.b2,
    eps=config.optim.eps,
    weight_decay=config.optim.weight_decay,
    decay_patterns=config.optim.decay,
    clip_norm=config.optim.clip_norm,
    rates=(
      *((pattern, float(factor)) for pattern, factor in config.optim.rates),
      *((("lora_b$", config.lora.plus_ratio),) if model.lora else ()),
    ),
    mu_dtype=config.optim.mu_dtype,
    nu_dtype=config.optim.nu_dtype,
    rounding_seed=rounding_seed,
  )
  trains = model.lora.trains if model.lora else lambda path: True
  trained = lambda path: (
    trains(path)
    and not trees.matches_any(config.optim.freeze, path)
    and not base_model.is_copy(path)
  )
  names = [group_names(stream) for stream in streams if stream] or [
    loss_groups.names(TOKEN_ROLES, ())
  ]
  objective = Objective(
    z_loss=config.loss.z_loss,
    label_smoothing=config.loss.label_smoothing,
    dft=config.loss.dft,
    kl=config.loss.kl,
  )

  def predict(
    params: trees.Tree, batch: Batch, dropout_key: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array | HeadRows]:
    """Hidden states, and the head they meet."""
    hidden = model.hidden(
      params,
      batch.tokens,
      batch.positions,
      batch.segment_ids,
      dropout_key=dropout_key,
    )
    head = model.head(params).astype(hidden.dtype)
    of_head = params["embed" if model.config.tie_embeddings else "head"]
    if model.lora and "lora_rows" in of_head:
      head = HeadRows(
        jax.lax.stop_gradient(head),
        jnp.array(model.lora.token_rows),
        of_head["lora_rows"],
      )
    return hidden, head

  def sums(
    params: trees.Tree,
    batch: Batch,
    groups: jax.Array,
    num_groups: int,
    dropout_key: jax.Array | None = None,
    base: trees.Tree | None = None,
    objective: Objective | Loss = NATS,
    extras: dict[str, jax.Array] | None = None,
  ) -> LossSums:
    return linear_cross_entropy(
      *predict(params, batch, dropout_key),
      batch.targets,
      batch.loss_weights,
      groups,
      base=None if base is None else predict(base, batch),
      num_groups=num_groups,
      objective=objective,
      extras=extras,
      chunk_tokens=config.loss.chunk_tokens,
      softcap=model.config.logit_softcap,
      rows=sharding.row_sharding(mesh) if mesh else None,
    )

  def loss_fn(
    params: trees.Tree,
    batch: Batch,
    dropout_key: jax.Array | None = None,
    measure: bool = False,
  ) -> LossSums:
    base = None
    if config.loss.kl or (measure and config.eval.kl):
      base = base_model.base_of(params, trained)
    groups = loss_groups.of(batch, len(TOKEN_ROLES))
    # A stream's own sources come last: shorter lists are a prefix.
    most = max(map(len, names))
    arguments = (params, batch, groups, most, dropout_key, base)
    if loss is None or measure:
      return sums(*arguments, objective)
    extras = {k: x for k, x in batch._asdict().items() if x is not None}
    extras |= getattr(loss, "extras", lambda batch: {})(batch)
    return sums(*arguments, loss, extras)

  def document_loss(params: trees.Tree, batch: Batch, most: int) -> GroupSums:
    groups = loss_groups.documents(batch, most)
    return sums(params, batch, groups, most * len(batch.tokens)).groups

  def row_nats(params: trees.Tree, batch: Batch) -> jax.Array:
    return document_loss(params, batch, 1).nats

  return Step(
    loss_fn=loss_fn,
    measure_fn=partial(loss_fn, measure=True),
    document_loss=document_loss,
    row_nats=row_nats,
    trained=trained,
    tx=tx,
    train_step=make_train_step(
      loss_fn,
      tx,
      None if own else learning_rate,
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
    ValueError: a pattern of config.optim that matches nothing; a negative
      coefficient; no base model.
  """
  paths = [path for path in trees.flatten(params) if step.trained(path)]
  for key, choices in (("rates", paths), ("freeze", trees.flatten(params))):
    for rule in config.optim[key]:
      pattern = rule if key == "freeze" else rule[0]
      if not any(re.search(pattern, path) for path in choices):
        raise ValueError(
          f"optim.{key}: {pattern!r} matches nothing, expected patterns over "
          f"{list(choices)}. Change optim.{key}."
        )
  if not paths:
    raise ValueError(
      f"optim.freeze: got {tuple(config.optim.freeze)}, which leaves nothing "
      "to train; expected patterns of some parameters. Narrow optim.freeze."
    )
  if not config.loss.kl:
    return params
  if config.loss.kl < 0 or config.model.from_scratch:
    raise ValueError(
      f"loss.kl: got {config.loss.kl} with model.from_scratch="
      f"{config.model.from_scratch}, expected 0 or more, and a model that "
      "knows something. Set loss.kl to 0."
    )
  copies = base_model.to_copy(params, step.trained)
  return base_model.with_copies(params, jax.tree.map(copy, copies))


def group_names(stream: Stream) -> tuple[str, ...]:
  """What the groups of a stream's tokens are called."""
  store = stream.store
  short = store.stats.short_names()
  return loss_groups.names(TOKEN_ROLES, [short[s.label] for s in store.sources])


def state_shardings(step: Step, params: trees.Tree, mesh: Mesh) -> TrainState:
  """Where every leaf of the state is stored.

  Args:
    step: whose optimizer and choice of what trains make the state.
    params: arrays or shapes, trained and frozen.
    mesh: the devices.
  """
  shapes = jax.eval_shape(
    lambda params: init_state(params, step.trained, step.tx), params
  )
  whole = sharding.replicated(mesh)
  return TrainState(
    step=whole,
    params=sharding.param_shardings(shapes.params, mesh),
    frozen=sharding.param_shardings(shapes.frozen, mesh),
    opt_state=sharding.state_shardings(shapes.opt_state, shapes.params, mesh),
  )


def flops_per_token(
  step: Step,
  model: Model,
  params: trees.Tree,
  lengths: Sequence[int] | np.ndarray,
) -> float:
  """FLOPs per token of documents of these lengths; see common/flops.py."""
  c = model.config
  num_trained, num_frozen = flops.matmul_params(
    base_model.own(params), step.trained, experts_per_token=c.experts_per_token
  )
  seen = {kind: flops.mean_context(lengths, kind.window) for kind in c.kinds}
  return flops.model_flops_per_token(
    trained_matmul_params=num_trained,
    frozen_matmul_params=num_frozen,
    num_layers=c.num_layers,
    num_heads=c.num_heads,
    head_dim=c.head_dim,
    context=sum(seen[kind] for kind in c.layers) / c.num_layers,
  )
