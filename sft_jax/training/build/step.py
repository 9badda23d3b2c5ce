"""The step of a run from its config, which neither data nor weights shape."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sft_jax.common import sharding, trees
from sft_jax.common.batch import Batch
from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.pipeline import Stream
from sft_jax.models.lora import base_model, lora
from sft_jax.models.transformer import Model
from sft_jax.step import loss as losses
from sft_jax.step import loss_groups, optimizer
from sft_jax.step.loss import GroupSums, HeadRows, Loss, LossSums, Objective
from sft_jax.step.train_step import make_train_step
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
  c = config.optim
  return optimizer.schedule(
    c.schedule,
    peak=c.learning_rate,
    warmup_steps=warmup_steps(config, num_steps),
    num_steps=num_steps,
    final_fraction=c.final_fraction,
    decay_fraction=c.decay_fraction,
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
  """The step of a run of `num_steps`.

  The loop runs it, `abstract` compiles it for machines that are not here.

  Args:
    mesh: the devices; None is one.
    streams: those that losses are measured on, the training data first; of
      each only the names of the sources are read, for the metrics.
    loss: minimized in place of config.loss, see `step.loss.Loss`. A method
      `loss.extras(batch)` gives further arrays [B, T, ...] by name. Measured
      is the cross-entropy all the same.
    tx: used in place of config.optim; it contains its own learning rate.

  Raises ValueError: a setting of config.optim that does not exist; a loss of
  one's own together with loss.kl.
  """
  if loss is not None and config.loss.kl:
    raise ValueError(
      f"loss.kl: got {config.loss.kl} with a loss of your own, expected 0: it "
      "replaces the objective. Add the divergence to your loss."
    )
  learning_rate = schedule(config, num_steps)
  rounding_seed = optimizer.rounding_seed(config.optim.rounding, config.seed)
  own, optim = tx is not None, config.optim
  moments = ("b1", "b2", "eps", "mu_dtype", "nu_dtype")
  rates = [(pattern, float(factor)) for pattern, factor in optim.rates]
  if model.lora:
    rates.append(("lora_b$", config.lora.plus_ratio))
  tx = tx or optimizer.make(
    optim.name,
    learning_rate,
    weight_decay=optim.weight_decay,
    decay_patterns=optim.decay,
    clip_norm=optim.clip_norm,
    rates=rates,
    rounding_seed=rounding_seed,
    **{name: optim[name] for name in moments},
  )
  trains = lora.trained(model.lora)
  trained = lambda path: (
    trains(path)
    and not trees.matches_any(config.optim.freeze, path)
    and not base_model.is_copy(path)
  )
  names = [group_names(stream) for stream in streams if stream] or [
    loss_groups.names(TOKEN_ROLES, ())
  ]
  objective = Objective(**{k: config.loss[k] for k in Objective._fields})

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
    objective: Objective | Loss = losses.NATS,
    extras: dict[str, jax.Array] | None = None,
  ) -> LossSums:
    return losses.linear_cross_entropy(
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


def group_names(stream: Stream) -> tuple[str, ...]:
  """What the groups of a stream's tokens are called."""
  store = stream.store
  short = store.stats.short_names()
  return loss_groups.names(TOKEN_ROLES, [short[s.label] for s in store.sources])
