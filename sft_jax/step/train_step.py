"""One optimizer step, as a pure function of state and batch.

Pretraining, full fine-tuning and LoRA differ in the batch's weights and in
which leaves are in `state.params`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sft_jax.common import trees
from sft_jax.common.batch import Batch
from sft_jax.step import loss_groups, optimizer
from sft_jax.step.loss import LossSums

# (all parameters, batch of rows) -> sums over its trained tokens; a third
# argument, a key, where the loss draws at random.
LossFn = Callable[..., LossSums]
Metrics = dict[str, tuple[jax.Array, jax.Array]]


class TrainState(NamedTuple):
  """Everything a step reads and writes besides the batch.

  Attributes:
    step: int32 scalar array, the number of steps taken.
    params: the trained leaves; gradients and moments exist for these only.
    frozen: the other leaves, returned untouched.
    opt_state: the optimizer's state over `params`.
  """

  step: Any
  params: trees.Tree
  frozen: trees.Tree
  opt_state: Any


def model_params(state: TrainState) -> trees.Tree:
  """All parameters; of the trained ones their average, if one is kept."""
  is_average = lambda x: isinstance(x, optimizer.Average)
  leaves = jax.tree.leaves(state.opt_state, is_leaf=is_average)
  trained = state.params
  for kept in filter(is_average, leaves):
    narrow = lambda a, w: a.astype(w.dtype)
    trained = jax.tree.map(narrow, kept.weights, trained)
  return trees.merge(trained, state.frozen)


def init_state(
  params: trees.Tree,
  trained: Callable[[str], bool],
  tx: optax.GradientTransformation,
) -> TrainState:
  """The state of step 0; `trained` chooses leaves by path."""
  chosen, frozen = trees.partition(params, trained)
  # Moments are float32 whatever the parameters are; no copy is kept.
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), chosen)
  return TrainState(jnp.zeros((), jnp.int32), chosen, frozen, tx.init(wide))


def make_train_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  learning_rate: optax.Schedule | None,
  *,
  seed: int | None = None,
  group_names: Sequence[str] = (),
  rounding_seed: int | None = None,
  average: str = "",
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """`train_step(state, batch, loss_limit=inf) -> (state, metrics)`.

  The batch has a leading axis of micro-batches, [A, B / A, T]. Gradients of the
  *sums* are added over micro-batches (float32) and divided once by the weight
  of the whole batch, so the result does not depend on how it was cut:

      g = sum_a grad(sum_{bt} w * nll) / sum_{abt} w

  Another objective may stand for nll (`loss.Objective`), and another weight for
  the sum of w (`LossSums.count`: of pairs, not tokens). A step whose gradients
  are not finite changes nothing but the step count and says so in
  `optim/nonfinite`, and one whose loss is above `loss_limit` nats per token in
  `optim/spike`: the caller decides what to do about it.

  With a `seed` the loss is given a key, fold_in(fold_in(key(seed), step), a),
  of each micro-batch a: a resumed run draws what it would have drawn, and with
  dropout, and only then, the cut matters. Gradients and updates are float32
  whatever the parameters are; with a `rounding_seed` parameters in bfloat16 are
  rounded stochastically. With `average` the loss finds under that name
  `model_params` of the state before the step, a teacher that follows the
  weights (arXiv 1703.01780).

  Metrics are (sum, weight) pairs, to be added over steps and divided last:
  loss/nats_per_token (of plain nll, whatever the objective), acc/token,
  entropy/nats, of each group named loss/<group> and acc/<group>, loss/kl
  (KL(base || tuned), nats per token) where the loss compares with a base,
  loss/<name> of each named sum of a loss of one's own, data/trained_fraction
  (trained tokens over tokens), data/fill (tokens over slots), optim/grad_norm
  (before clipping), optim/update_ratio (norm of the change over norm of the
  parameters), optim/learning_rate (unless it is None: an optimizer whose rate
  is its own), optim/nonfinite, optim/spike.
  """

  def micro_gradient(state: TrainState, batch: Batch, index: Any):
    keys = ()
    if seed is not None:
      key = jax.random.fold_in(jax.random.key(seed), state.step)
      keys = (jax.random.fold_in(key, index),)

    teacher = {average: model_params(state)} if average else {}

    def objective(params):
      every = trees.merge(params, state.frozen) | teacher
      sums = loss_fn(every, batch, *keys)
      return sums.objective, sums

    differentiate = jax.value_and_grad(objective, has_aux=True)
    (_, sums), gradient = differentiate(state.params)
    return sums, gradient

  def train_step(state: TrainState, batch: Batch, loss_limit: Any = jnp.inf):
    number = batch.tokens.shape[0]
    first = (state, jax.tree.map(lambda x: x[0], batch), 0)

    def add_micro(carry, micro):
      found = micro_gradient(state, *micro)
      add = lambda total, x: total + x.astype(jnp.float32)
      return jax.tree.map(add, carry, found), None

    if number == 1:
      sums, gradient = micro_gradient(*first)
    else:
      wide = lambda x: jnp.zeros(x.shape, jnp.float32)
      zeros = jax.tree.map(wide, jax.eval_shape(micro_gradient, *first))
      micros = (batch, jnp.arange(number))
      (sums, gradient), _ = jax.lax.scan(add_micro, zeros, micros)

    with jax.named_scope("optimizer"):
      # A batch without a trained token divides by 1, not by 0.
      inverse = lambda x: 1.0 / jnp.where(x > 0, x, 1.0)
      count = sums.weight if sums.count is None else sums.count
      scale = inverse(count)
      gradient = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, gradient)
      grad_norm = optax.tree.norm(gradient)
      finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums.objective)
      spike = finite & ~(sums.nats * inverse(sums.weight) <= loss_limit)
      updates, opt_state = tx.update(gradient, state.opt_state, state.params)
      add = lambda p, u: p.astype(jnp.float32) + u
      params = jax.tree.map(add, state.params, updates)
      draw = (rounding_seed, state.step, 0)
      params = optimizer.round_tree(params, state.params, *draw)
      keep = lambda new, old: jnp.where(finite & ~spike, new, old)
      new_state = TrainState(
        step=state.step + 1,
        params=jax.tree.map(keep, params, state.params),
        frozen=state.frozen,
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
      )
      ratio = optax.tree.norm(updates) / optax.tree.norm(state.params)
    # The optimizer counts the steps that were applied, and so the rate.
    name, one = "ScaleByScheduleState", jnp.ones((), jnp.float32)
    schedules = optax.tree.get_all_with_path(state.opt_state, name)
    applied = schedules[0][1].count if schedules else state.step
    with jax.named_scope("metrics"):
      tokens = (batch.segment_ids > 0).sum()
      trained = (batch.loss_weights != 0).sum()
    values = {
      "loss/nats_per_token": (sums.nats, sums.weight),
      "acc/token": (sums.correct, sums.weight),
      "entropy/nats": (sums.entropy, sums.weight),
      **loss_groups.pairs(sums.groups, group_names),
      **({"loss/kl": (sums.base.kl, sums.weight)} if sums.base else {}),
      **{f"loss/{k}": (x, count) for k, x in (sums.named or {}).items()},
      "data/trained_fraction": (trained, tokens),
      "data/fill": (tokens, jnp.asarray(batch.segment_ids.size)),
      "optim/grad_norm": (grad_norm, one),
      "optim/update_ratio": (ratio, one),
      "optim/nonfinite": (1.0 - finite, one),
      "optim/spike": (spike.astype(jnp.float32), one),
    }
    if learning_rate:
      rate = jnp.asarray(learning_rate(applied))
      values["optim/learning_rate"] = (rate, one)
    return new_state, values

  return train_step


def split_micro_batches(batch: Batch, accum_steps: int) -> Batch:
  """[B, T] -> [A, B / A, T], on the host: cutting a batch that is already
  spread over devices would move its rows."""
  num_rows = batch.tokens.shape[0]
  if num_rows % accum_steps:
    raise ValueError(
      f"accum_steps: got {accum_steps} for {num_rows} rows per process, "
      "expected a divisor. Change batch_size or accum_steps."
    )
  return jax.tree.map(
    lambda x: x.reshape(accum_steps, num_rows // accum_steps, *x.shape[1:]),
    batch,
  )
