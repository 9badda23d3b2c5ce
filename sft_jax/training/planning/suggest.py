"""Which learning rate: published sweeps, then a short probe of the run itself.

    prior   5e-5 (2000 / width)^p, 10 times that under LoRA    (`prior_rate`)
    trials  the run's first k steps, cut into updates of fewer packs, at rates
            around it, from the same start, each followed by the held-out loss
                                                               (`make_trial`)
    rate    the lowest point of a parabola through loss and log rate
                                                               (`find_rate`)

All of it is a function of (config, data, model), so a run that is started again
finds the same. Sources, and how good the rate is: docs/learning_rate.md.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from sft_jax.common import sharding, trees
from sft_jax.data.pipeline import Stream
from sft_jax.models.config import ModelConfig
from sft_jax.models.transformer import Model
from sft_jax.step.train_step import init_state, split_micro_batches
from sft_jax.training.build import state as setup_state
from sft_jax.training.build import step as setup_step
from sft_jax.training.build.data import NOTHING, Config, Log, Own

COST = 0.05  # Share of the run's computation that trials may take.
_SPACING = 10**0.5  # Between the rates of neighboring trials.
_FORWARD = 1 / 3  # Of a training step.
# Updates that a trial makes of a step's packs, at most: the best rate of one or
# two whole steps is far above a run's, of as many packs in eight updates it is
# near to it, see docs/learning_rate.md.
_UPDATES = 8


class Suggestion(NamedTuple):
  rate: float  # The peak to train with.
  prior: float  # What the published sweeps say.
  steps: int = 0  # Of a trial; 0 where the run is too short for any.
  # (rate, held-out nats per token) of each, by rate.
  trials: tuple[tuple[float, float], ...] = ()

  def __str__(self) -> str:
    line = f"learning rate {self.rate:.2g}. Published sweeps say "
    line += f"{self.prior:.2g}"
    if not self.trials:
      return f"{line}; the run is too short for trials within {COST:.0%} of it."
    each = (f"{loss:.4g} at {rate:.2g}" for rate, loss in self.trials)
    losses = ", ".join(each)
    return f"{line}; held-out loss after {self.steps} steps: {losses}."


def prior_rate(config: Config, shape: ModelConfig) -> float:
  """The peak that published sweeps over models and data found best.

      5e-5 x m x (2000 / width)^p

  with m = 1, or 10 under LoRA with alpha 32 at any rank, and p = 0.781 for
  Llama, 0.0775 for Qwen; below a width of 2,000, where no sweep of Qwen is
  known, 0.781 too (Schulman et al. 2025, LoRA Without Regret, and its
  cookbook's `hyperparam_utils`). Other families count as Llama. Early in
  training a step moves the weights by alpha times the rate, so a smaller alpha
  takes a larger rate. Lion takes a tenth (Chen et al. 2023, arXiv 2302.06675: 3
  to 10 times less than AdamW).

  Raises ValueError: an optimizer or objective without published sweeps.
  """
  for key in ("preference.loss", "distill.teacher"):
    section, _, name = key.partition(".")
    if on := config.get(section, {}).get(name):
      raise ValueError(
        f"optim.learning_rate: got 'auto' with {key}={on!r}, expected '': the "
        "sweeps are of cross-entropy. Name a rate."
      )
  factors = {"adamw": 1.0, "lion": 0.1}
  if config.optim.name not in factors:
    raise ValueError(
      f"optim.learning_rate: got 'auto' with optim.name={config.optim.name!r}, "
      f"expected one of {tuple(factors)}. Name a rate."
    )
  flat = shape.family.startswith("qwen") and shape.d_model >= 2000
  power = 0.0775 if flat else 0.781
  rate = 5e-5 * (2000 / shape.d_model) ** power * factors[config.optim.name]
  if config.lora.rank:
    alpha = config.lora.alpha
    alpha *= math.sqrt(config.lora.rank) if config.lora.rslora else 1.0
    rate *= 10 * 32 / alpha
  return rate


class _Rate(NamedTuple):
  rate: Any


def _times_rate() -> optax.GradientTransformation:
  """Multiplies updates by a number of the state: one program for all rates."""
  return optax.GradientTransformation(
    lambda params: _Rate(jnp.ones(())),
    lambda updates, state, params=None: (
      jax.tree.map(lambda x: x * state.rate, updates),
      state,
    ),
  )


def make_trial(
  config: Config,
  model: Model,
  mesh: Mesh,
  params: trees.Tree,
  stream: Stream,
  held_out: Stream | None,
  *,
  steps: int,
  measured: int,
  own: Own = NOTHING,
  updates: int = 1,
) -> Callable[[float], float]:
  """rate -> held-out nats per token after a trial; inf where not finite.

  A trial is `steps` of the run (its rate 'auto', its schedule cut to so many)
  from `params`, which are left as they are, judged by `measured` batches held
  out, or the next ones for training. `updates`: of each micro-batch's packs; 1
  = steps as the run takes them.
  """
  parts = config.accum_steps * updates
  accum = 1 if updates > 1 else config.accum_steps
  taken = steps * (parts // accum)
  made = config
  if config.optim.warmup_steps >= taken:  # Longer than a trial.
    made = config.copy_and_resolve_references()
    made.optim.warmup_steps = -1
  tx = optax.chain(setup_step.make_optimizer(made, model, taken), _times_rate())
  step = setup_step.make_step(
    *(made, model, mesh, taken, (stream, held_out)), loss=own.loss, tx=tx
  )
  params = setup_state.hold_base(made, step, params, jnp.copy)
  start, frozen = trees.partition(params, step.trained)
  placed = setup_state.state_shardings(step, params, mesh)._replace(frozen={})
  init = jax.jit(
    lambda chosen: init_state(chosen, lambda path: True, tx),
    out_shardings=placed,
  )

  def train(state: Any, frozen: Any, batch: Any) -> Any:
    state, _ = step.train_step(state._replace(frozen=frozen), batch)
    return state._replace(frozen={})

  train = jax.jit(train, donate_argnums=0)
  loss = jax.jit(step.loss_fn)
  put = lambda batch, axes: sharding.put_rows(
    batch, sharding.row_sharding(mesh, leading_axes=axes)
  )

  def trial(rate: float) -> float:
    state = init(start)
    inner, _ = state.opt_state
    state = state._replace(opt_state=(inner, _Rate(np.float32(rate))))
    mine = sharding.own_rows(mesh, config.batch_size, parts=parts)
    for batch in itertools.islice(stream.batches(0, mine), steps):
      cut = split_micro_batches(batch, parts)
      for i in range(0, parts, accum):
        micro = jax.tree.map(lambda x, i=i: x[i : i + accum], cut)
        state = train(state, frozen, put(micro, 1))
    trained = trees.merge(state.params, frozen)
    mine = sharding.own_rows(mesh, config.batch_size)
    judged = (held_out or stream).batches(0 if held_out else steps, mine)
    nats = weight = 0.0
    for batch in itertools.islice(judged, measured):
      sums = loss(trained, put(batch, 0))
      nats, weight = nats + float(sums.nats), weight + float(sums.weight)
    return nats / weight if math.isfinite(nats) and weight else math.inf

  return trial


def _updates(config: Config, mesh: Mesh) -> int:
  """The most, up to `_UPDATES`, into which the mesh divides a step's packs."""
  unit = config.accum_steps * mesh.shape["data"] * mesh.shape["fsdp"]
  fits = lambda n: config.batch_size % (unit * n) == 0
  return next(filter(fits, range(_UPDATES, 0, -1)), 1)


def affordable(num_steps: int, measured: int) -> tuple[int, int]:
  """(trials, steps of each) within `COST` of a run; (0, 0) if there are none.

  Five, or fewer, down to three, where each would have no step.

  >>> affordable(148, 1), affordable(2000, 2), affordable(50, 1)
  ((5, 1), (5, 19), (0, 0))
  """
  for trials in (5, 4, 3):
    steps = max(int(COST * num_steps / trials - measured * _FORWARD), 0)
    if steps:
      return trials, steps
  return 0, 0


def search(
  trial: Callable[[float], float], center: float, trials: int
) -> tuple[float, tuple[tuple[float, float], ...]]:
  """(the best rate, (rate, loss) of every trial by rate).

  Three rates around a center, then further out while the lowest loss, which may
  be inf, is at an edge; at most `trials`. A parabola through the lowest and its
  neighbors gives the rate.
  """
  losses: dict[int, float] = {}
  for number in (0, -1, 1):
    losses[number] = trial(center * _SPACING**number)
  while len(losses) < trials:
    best = min(losses, key=losses.__getitem__)
    edge = best - 1 if best == min(losses) else best + 1
    if edge in losses:
      break
    losses[edge] = trial(center * _SPACING**edge)
  best = min(losses, key=losses.__getitem__)
  left, low, right = (losses.get(best + i, math.inf) for i in (-1, 0, 1))
  bend = left - 2 * low + right
  shift = (left - right) / (2 * bend) if 0 < bend < math.inf else 0.0
  table = [(center * _SPACING**n, losses[n]) for n in sorted(losses)]
  return center * _SPACING ** (best + shift), tuple(table)


def find_rate(
  config: Config,
  model: Model,
  mesh: Mesh,
  params: trees.Tree,
  stream: Stream,
  held_out: Stream | None,
  num_steps: int,
  log: Log,
  own: Own = NOTHING,
) -> Suggestion:
  """The rate of a run whose optim.learning_rate is 'auto'. Raises ValueError:
  an optimizer without published sweeps."""
  prior = prior_rate(config, model.config)
  few = num_steps < 500  # What measuring costs would be missing for trials.
  measured = min((held_out and held_out.num_steps) or 1, 1 if few else 4)
  trials, steps = affordable(num_steps, measured)
  if not trials:
    return Suggestion(prior, prior)
  log(f"Finding the learning rate: {trials} trials of {steps} steps ...")
  trial = make_trial(
    *(config, model, mesh, params, stream, held_out),
    steps=steps,
    measured=measured,
    own=own,
    updates=_updates(config, mesh),
  )
  rate, table = search(trial, prior, trials)
  return Suggestion(float(f"{rate:.3g}"), prior, steps, table)


def batch_and_epochs(config: Config, stream: Stream) -> tuple[int, int]:
  """(packs per step, passes) that published recipes give a number of rows.

  Rows per step: 32 of LIMA's 1,000 rows (Zhou et al. 2023, arXiv 2305.11206) to
  128 of the 939,000 of Tulu 3 (Lambert et al. 2024, arXiv 2411.15124), a line
  between them in the logarithms; half of it under LoRA, which larger batches
  cost more (LoRA Without Regret). Passes: 15 to 2, likewise.
  """
  epoch = stream.stats.epoch
  assert epoch is not None  # A Stream has planned its first epoch.
  rows = len(stream.store.index)
  share = math.log(rows / 1000) / math.log(939)
  share = min(max(share, 0.0), 1.0)
  wanted = 32 * (128 / 32) ** share / (2 if config.lora.rank else 1)
  packs = max(round(wanted * epoch.packs / rows), 1)
  unit = config.accum_steps
  return -(-packs // unit) * unit, round(15 * (2 / 15) ** share)
