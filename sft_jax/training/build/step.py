"""The step of a run from its config, which neither data nor weights shape."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

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
from sft_jax.step import loss_groups, optimizer, preferences
from sft_jax.step.distillation import Divergence, TopK
from sft_jax.step.loss import HeadRows, Loss, LossSums, Objective
from sft_jax.step.train_step import make_train_step
from sft_jax.training.build.data import Config, kept_kind, pair_kind


def _is_text(batch: Batch) -> jax.Array:
  """Which targets [B, T] are raw text."""
  if batch.roles is None:  # Of made-up batches.
    return jnp.zeros(batch.tokens.shape, bool)
  return jnp.asarray(batch.roles) == TOKEN_ROLES.index("text")


class Step(NamedTuple):
  """What of a run depends on neither data nor weights; see `make_step`.

  Attributes:
    loss_fn: (all parameters, batch) -> sums over its trained tokens.
    measure_fn: the same of the data's own tokens, and how far from the base's
      the predictions are, unless compare=False, and where the parameters tell;
      see `models.lora.base_model`. With documents=n its last B * n groups are
      the documents of each row, n at most, of pairs the chosen sides; see
      `loss_groups.documents`.
    row_nats: (all parameters, batch [B, T]) -> nats of each row's trained
      tokens [B].
    base_logps: (all parameters, batch [B, T] of pairs) -> the base's log p of
      each side [N, 2], which preference.reference=kept holds; the parameters'
      own where they hold no base.
    trained: whether the parameter of a path is trained.
    tx: the optimizer over the trained parameters.
    train_step: (state, batch) -> (state, metrics), not yet compiled.
  """

  loss_fn: Callable[..., LossSums]
  measure_fn: Callable[..., LossSums]
  row_nats: Callable[[trees.Tree, Batch], jax.Array]
  base_logps: Callable[[trees.Tree, Batch], jax.Array]
  trained: Callable[[str], bool]
  tx: optax.GradientTransformation
  train_step: Callable


def warmup_steps(config: Config, num_steps: int) -> int:
  """Steps of a run of so many in which the learning rate rises."""
  if config.optim.warmup_steps >= 0:
    return config.optim.warmup_steps
  return int(config.optim.warmup_fraction * num_steps)


def schedule(config: Config, num_steps: int) -> optax.Schedule:
  """The learning rate of a run of so many steps; of 1, where none is known.

  A run knows it: 'auto' stays only for trials and for what compiles alone.
  Where a run was extended at step b to end at step e, the rate from b on is

      constant  that of step b - 1
      rewarm    the schedule of a run of e - b steps, its warm-up too
      stretch   that of a run of e steps: what the steps before b had is past
  """
  rate = config.optim.learning_rate

  def planned(steps: int) -> optax.Schedule:
    return optimizer.schedule(
      config.optim.schedule,
      peak=1.0 if rate == "auto" else rate,
      warmup_steps=warmup_steps(config, steps),
      num_steps=steps,
      final_fraction=config.optim.final_fraction,
      decay_fraction=config.optim.decay_fraction,
    )

  extended = config.optim.get("extended", ())  # Not in older workdirs.
  ends = [*(begin for begin, _ in extended), num_steps]
  made: Any = planned(ends[0])
  for (begin, how), end in zip(extended, ends[1:], strict=True):
    if how == "stretch":
      made = planned(end)
      continue
    later = optax.constant_schedule(float(made(begin - 1)))
    if how == "rewarm":
      later = planned(end - begin)
    made = optax.join_schedules([made, later], [begin])
  return made


def make_optimizer(
  config: Config, model: Model, num_steps: int
) -> optax.GradientTransformation:
  """What config.optim says, over the schedule of a run of so many steps."""
  optim = config.optim
  moments = ("b1", "b2", "eps", "mu_dtype", "nu_dtype")
  rates = [(pattern, float(factor)) for pattern, factor in optim.rates]
  if model.lora:
    rates.append(("lora_b$", config.lora.plus_ratio))
  return optimizer.make(
    optim.name,
    schedule(config, num_steps),
    weight_decay=optim.weight_decay,
    decay_patterns=optim.decay,
    clip_norm=optim.clip_norm,
    # Neither is in older workdirs.
    ema=optim.get("ema", 0.0),
    anchor=optim.get("anchor", 0.0),
    rates=rates,
    rounding_seed=optimizer.rounding_seed(optim.rounding, config.seed),
    **{name: optim[name] for name in moments},
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
  teacher: Model | None = None,
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
    teacher: the functions of another model whose parameters are under
      `base_model.TEACHER`; see distill.teacher.

  Raises ValueError: a setting of config.optim that does not exist; a loss of
  one's own together with loss.kl, pairs or a teacher; a kept reference on
  CPU devices divided by mesh.tensor or mesh.context.
  """
  for key in ("loss.kl", "preference.loss", "distill.teacher"):
    section, _, name = key.partition(".")
    on = config.get(section, {}).get(name)  # Not in older workdirs.
    if loss is not None and on:
      raise ValueError(
        f"{key}: got {on!r} with a loss of your own, expected {type(on)()!r}: "
        "it replaces the objective. Make it a part of your loss."
      )
  choice, most_pairs = preference(config), 0
  paired, distill = bool(pair_kind(config)), config.get("distill", {})
  if choice:
    lengths = [int(s.store.lengths.min()) for s in streams if s] or [8]
    most_pairs = config.data.seq_len // min(lengths)
  if distill.get("teacher") == "kept":
    loss = TopK(distill.weight, distill.ce)
  learning_rate = schedule(config, num_steps)
  rounding_seed = optimizer.rounding_seed(config.optim.rounding, config.seed)
  own = tx is not None
  tx = tx or make_optimizer(config, model, num_steps)
  trains = lora.trained(model.lora)
  trained = lambda path: (
    trains(path)
    and not trees.matches_any(config.optim.freeze, path)
    and not base_model.is_copy(path)
  )
  names = [group_names(stream) for stream in streams if stream] or [
    loss_groups.names(TOKEN_ROLES, ())
  ]
  # A stream's own sources come last: shorter lists are a prefix.
  num_groups = max(map(len, names))
  own_terms = ("z_loss", "label_smoothing", "dft", "kl")
  objective = Objective(**{k: config.loss[k] for k in own_terms})
  if distill.get("teacher"):
    kind = (distill.divergence, distill.mix, distill.temperature)
    objective = objective._replace(
      kl=distill.weight, ce=distill.ce, divergence=Divergence(*kind)
    )

  is_kept = kept_kind(config) == "reference"
  if (
    is_kept
    and mesh
    and mesh.devices.flat[0].platform == "cpu"
    and (parts := mesh.shape["tensor"] * mesh.shape["context"]) > 1
  ):
    # XLA enters sums that do not depend on each other in any order there, and
    # its devices wait for one another without end.
    raise ValueError(
      "preference.reference: got 'kept' with CPU devices divided by "
      f"mesh.tensor * mesh.context={parts}, expected 1: such a step hangs. "
      "Use mesh.data or mesh.fsdp."
    )
  kl_on_text = config.loss.get("kl_on") == "text" and objective.kl
  averages = distill.get("teacher") in ("average", "self_average")
  teacher = model if averages else teacher

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

  head = {
    "chunk_tokens": config.loss.chunk_tokens,
    "softcap": model.config.logit_softcap,
    "rows": sharding.row_sharding(mesh) if mesh else None,
  }
  sums = partial(losses.linear_cross_entropy, **head)

  def loss_fn(
    params: trees.Tree,
    batch: Batch,
    dropout_key: jax.Array | None = None,
    measure: bool = False,
    compare: bool = True,
    documents: int = 0,
  ) -> LossSums:
    base = None
    compares = measure and compare and config.eval.kl
    if compares or (needs_base(config) and (choice or not measure)):
      base = base_model.base_of(params, trained)
      base = None if base is None else predict(base, batch)
    if teacher and not measure:
      row = (batch.tokens, batch.positions, batch.segment_ids)
      # The average of weights that no step has changed is these.
      theirs = params.get(base_model.TEACHER, params if averages else None)
      base = teacher.hidden(theirs, *row), teacher.head(theirs)
    if paired and not choice and not measure:
      assert base is not None  # `hold_base` sees to it.
      own = preferences.of_the_other_side(base[0], batch, _is_text(batch))
      base = own, base[1]
    predicted = predict(params, batch, dropout_key)
    trains = preferences.chosen_only(batch) if paired else batch
    groups, number = loss_groups.of(trains, len(TOKEN_ROLES)), num_groups
    if documents:
      segments = jnp.asarray(batch.segment_ids)
      whole = batch._replace(segment_ids=(segments + paired) // (1 + paired))
      each = loss_groups.documents(whole, documents, num_groups)
      groups = jnp.concatenate([groups, each], axis=-1)
      number += documents * len(batch.tokens)
    measured = partial(
      sums,
      *(*predicted, batch.targets),
      weights=trains.loss_weights,
      groups=groups,
      num_groups=number,
    )
    # General text has no reference, and is no pair.
    unknown = measure and is_kept and batch.teacher_logps is None
    if choice and not unknown:
      reference = None
      if is_kept:
        assert batch.teacher_logps is not None  # `load_stores` sees to it.
        kept = jnp.asarray(batch.teacher_logps)[..., 0]
        reference = preferences.of_documents(kept, batch, most_pairs)
      elif needs_base(config):
        assert base is not None  # `hold_base` sees to it.
        reference = preferences.document_logps(base, batch, most_pairs, **head)
      return preferences.objective(
        *(choice, predicted, batch, reference),
        measured(base=base if compares else None),
        most_pairs,
        **head,
      )
    if measure:
      return measured(base=base)
    if loss is None and not kl_on_text:
      return measured(base=base, objective=objective)
    if loss is None:
      # Sums of raw text, by the base, and of all else, by the rows.
      text = _is_text(batch)
      weighed = lambda keep: jnp.where(keep, trains.loss_weights, 0)
      by_base = measured(
        weights=weighed(text), base=base, objective=objective._replace(ce=0)
      )
      by_rows = measured(
        weights=weighed(~text), objective=objective._replace(kl=0.0)
      )
      both = (by_rows, by_base._replace(base=None))
      return jax.tree.map(jnp.add, *both)._replace(base=by_base.base)
    extras = {k: x for k, x in batch._asdict().items() if x is not None}
    extras |= getattr(loss, "extras", lambda batch: {})(batch)
    return measured(objective=loss, extras=extras)

  def row_nats(params: trees.Tree, batch: Batch) -> jax.Array:
    found = loss_fn(params, batch, measure=True, compare=False, documents=1)
    return found.groups.nats[num_groups:]

  def base_logps(params: trees.Tree, batch: Batch) -> jax.Array:
    base = base_model.base_of(params, trained) or params
    predicted = predict(base, batch)
    return preferences.document_logps(predicted, batch, most_pairs, **head)

  return Step(
    loss_fn=loss_fn,
    measure_fn=partial(loss_fn, measure=True),
    row_nats=row_nats,
    base_logps=base_logps,
    trained=trained,
    tx=tx,
    train_step=make_train_step(
      loss_fn,
      tx,
      None if own else learning_rate,
      seed=config.seed if model.lora and model.lora.dropout else None,
      group_names=names[0],
      rounding_seed=rounding_seed,
      average=base_model.TEACHER if averages else "",
    ),
  )


def group_names(stream: Stream) -> tuple[str, ...]:
  """What the groups of a stream's tokens are called."""
  store = stream.store
  short = store.stats.short_names()
  return loss_groups.names(TOKEN_ROLES, [short[s.label] for s in store.sources])


def preference(config: Config) -> preferences.Preference | None:
  """The loss of pairs of a config; None where it trains on answers."""
  if pair_kind(config) not in ("both", "any"):
    return None
  fields = preferences.Preference._fields
  return preferences.Preference(**{x: config.preference[x] for x in fields})


def needs_base(config: Config) -> bool:
  """Whether every step asks the base."""
  choice = preference(config)
  refers = choice and choice.loss not in preferences.WITHOUT_REFERENCE
  return bool(
    config.loss.kl
    or config.get("distill", {}).get("teacher") in ("base", "self")
    or (refers and kept_kind(config) != "reference")
  )
