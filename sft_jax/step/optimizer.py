"""What a gradient becomes: schedules, optimizers by name, rounding.

    clip -> direction (OPTIMIZERS) -> weight decay -> rates -> learning rate

Layers are stacked: a kernel [L, in, out] holds L matrices, experts [L, E, in,
out] L * E of them, a norm's scale [L, D] L vectors. An optimizer that looks at
matrices is given each by itself (`per_matrix`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32
from optax import GradientTransformation

from sft_jax.common import trees

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def schedule(
  name: str,
  *,
  peak: float,
  warmup_steps: int,
  num_steps: int,
  final_fraction: float,
  decay_fraction: float = 0.2,
) -> optax.Schedule:
  """Learning rate by optimizer step: warm-up from 0, then decay.

  Step s < warmup_steps has peak * (s + 1) / warmup_steps, so that the first
  step moves. After it the rate falls to peak * final_fraction at num_steps
  ('cosine', 'linear'), stays ('constant'), or stays and falls linearly over the
  last `decay_fraction` of the steps ('wsd'; Hu et al. 2024, arXiv 2404.06395).

  Raises ValueError: a warm-up longer than the run or running into the decay.
  """
  if warmup_steps >= num_steps:
    raise ValueError(
      f"optim.warmup_steps: got {warmup_steps} for a run of {num_steps} "
      "steps, expected fewer. Shorten the warm-up or train longer."
    )
  decay_steps = num_steps - warmup_steps
  if name == "cosine":
    decay = optax.cosine_decay_schedule(peak, decay_steps, final_fraction)
  elif name == "linear":
    decay = optax.linear_schedule(peak, peak * final_fraction, decay_steps)
  elif name == "wsd":
    falling = round(decay_fraction * num_steps)
    if not 0 < falling <= decay_steps:
      raise ValueError(
        f"optim.decay_fraction: got {decay_fraction} of {num_steps} steps with "
        f"{warmup_steps} of warm-up, expected between 1 and {decay_steps} "
        "steps. Change it, or shorten the warm-up."
      )
    decay = optax.linear_schedule(
      *(peak, peak * final_fraction, falling), decay_steps - falling
    )
  else:
    assert name == "constant", name
    decay = optax.constant_schedule(peak)
  if warmup_steps == 0:
    return decay
  warmup = lambda step: peak * (step + 1) / warmup_steps
  return optax.join_schedules([warmup, decay], [warmup_steps])


# -- Optimizers ---------------------------------------------------------------


class Moments(NamedTuple):
  """How an optimizer averages gradients; each reads what it has use for.

  Attributes:
    b1: decay of the first moment; momentum of sgd and muon.
    b2: decay of the second moment; of lion's first.
    eps: added to the root of the second moment.
    mu_dtype, nu_dtype: in which the first and the second moment are stored,
      float32 or bfloat16 (adamw and muon); the arithmetic is float32.
    rounding_seed: of bfloat16 moments, see `round_tree`.
  """

  b1: float
  b2: float
  eps: float
  mu_dtype: Any = jnp.float32
  nu_dtype: Any = jnp.float32
  rounding_seed: int | None = None


def make(
  name: str,
  learning_rate: optax.Schedule,
  *,
  weight_decay: float,
  decay_patterns: Sequence[str],
  clip_norm: float,
  rates: Sequence[tuple[str, float]] = (),
  ema: float = 0.0,
  anchor: float = 0.0,
  **moments: Any,
) -> GradientTransformation:
  """The chain of this module's first lines around one of `OPTIMIZERS`.

  Args:
    weight_decay: decoupled, multiplied by the learning rate; 0 = off.
    decay_patterns: parameter paths that decay; norms and biases should not.
    clip_norm: largest global norm of the gradients; 0 = no clipping.
    rates: ((pattern, factor), ...) over parameter paths: the first that matches
      multiplies the learning rate, of the decay too. LoRA+ is (('lora_b$',
      16.0),) (Hayou et al. 2024, arXiv 2402.12354).
    ema: decay of an average of the weights, see `Average`; 0 = none.
    anchor: decay of the change w - w0, as weight_decay is of w (L2-SP, Li et
      al. 2018, arXiv 1802.01483), of all that trains; 0 = none.
    moments: the fields of `Moments`.

  Raises ValueError: narrow moments of an optimizer that does not have them.
  """
  settings = Moments(**moments)
  narrow = {jnp.dtype(settings.mu_dtype), jnp.dtype(settings.nu_dtype)}
  if name not in ("adamw", "muon") and narrow != {jnp.dtype(jnp.float32)}:
    raise ValueError(
      f"optim.mu_dtype, optim.nu_dtype: got {settings.mu_dtype} and "
      f"{settings.nu_dtype} with optim.name {name!r}, expected float32. Set "
      "both to float32, or optim.name to 'adamw'."
    )
  decays = lambda params: trees.map_paths(
    lambda path, _: trees.matches_any(decay_patterns, path), params
  )
  rules = (*rates, ("", 1.0))
  scaled = lambda path, u: u * trees.first_match(rules, path, "optim.rates")
  by_path: Any = lambda updates, _: trees.map_paths(scaled, updates)
  return optax.chain(
    optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
    OPTIMIZERS[name](settings),
    optax.add_decayed_weights(weight_decay, mask=decays),
    *([_anchored(anchor)] if anchor else []),
    *([optax.stateless(by_path)] if rates else []),
    optax.scale_by_learning_rate(learning_rate),
    *([_average(ema)] if ema else []),
  )


class Anchor(NamedTuple):
  """`weights`: the first ones, float32, in the tree of the trained ones."""

  weights: Any


def _anchored(strength: float) -> GradientTransformation:
  def update(updates, state, params=None):
    pull = lambda u, w, w0: u + strength * (w.astype(jnp.float32) - w0)
    return jax.tree.map(pull, updates, params, state.weights), state

  # Copies: a step gives its old arrays away.
  return GradientTransformation(
    lambda params: Anchor(jax.tree.map(jnp.copy, params)), update
  )


class Average(NamedTuple):
  """`weights`: a <- decay a + (1 - decay) w after each step, from the first
  weights on; float32, in the tree of the trained parameters."""

  weights: Any


def _average(decay: float) -> GradientTransformation:
  def update(updates, state, params=None):
    mix = lambda a, w, u: decay * a + (1 - decay) * (w.astype(jnp.float32) + u)
    return updates, Average(jax.tree.map(mix, state.weights, params, updates))

  return GradientTransformation(
    lambda params: Average(jax.tree.map(jnp.copy, params)), update
  )


def _adam(moments: Moments) -> GradientTransformation:
  """`optax.scale_by_adam` in float32, with moments kept in given dtypes. Raises
  ValueError: a bfloat16 moment, rounded to nearest, that would never decay: it
  has 8 bits, so a change below 1 in 256 is none."""
  b1, b2, eps, mu_dtype, nu_dtype, seed = moments
  mu_dtype, nu_dtype = jnp.dtype(mu_dtype), jnp.dtype(nu_dtype)
  for name, dtype, decay in (("mu", mu_dtype, b1), ("nu", nu_dtype, b2)):
    if dtype == jnp.bfloat16 and seed is None and 1 - decay < 2**-8:
      raise ValueError(
        f"optim.{name}_dtype: got bfloat16 with a decay of {decay} and "
        "rounding to nearest, expected a decay of at most 0.996, as smaller "
        "changes are lost. Set optim.rounding to 'stochastic', or the dtype "
        "to float32."
      )

  def init(params):
    mu, nu = (
      jax.tree.map(lambda p, dtype=dtype: jnp.zeros(p.shape, dtype), params)
      for dtype in (mu_dtype, nu_dtype)
    )
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

  def update(updates, state, params=None):
    del params
    count = state.count + 1
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    g = wide(updates)
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, wide(state.mu), g)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, wide(state.nu), g)
    hat1, hat2 = 1 - b1**count, 1 - b2**count
    direction = lambda m, v: m / hat1 / (jnp.sqrt(v / hat2) + eps)
    found = jax.tree.map(direction, mu, nu)
    mu = round_tree(mu, state.mu, seed, count, 1)
    nu = round_tree(nu, state.nu, seed, count, 2)
    return found, optax.ScaleByAdamState(count, mu, nu)

  return GradientTransformation(init, update)


def is_matrix(path: str) -> bool:
  """True for kernels and for the factors of an adapter; tables are none.

  >>> is_matrix('layers/attn/q/lora_a'), is_matrix('embed/embedding')
  (True, False)
  """
  return path.endswith(("/kernel", "/lora_a", "/lora_b"))


def per_matrix(tx: GradientTransformation) -> GradientTransformation:
  """Applies `tx` to each matrix or vector of the stacked layers by itself.

  For factored moments, orthogonalization, or norms of one tensor; not for what
  looks at the whole tree (global norms, masks).

  Returns a transformation whose state is a tree like the parameters', in the
  place of each the state of `tx` with the leading axes of its stack.
  """

  def stacked(fn: Callable, path: str, ndim: int) -> Callable:
    own = (2 if is_matrix(path) else 1) if path.startswith("layers/") else ndim
    for _ in range(ndim - own):
      fn = jax.vmap(fn)
    return fn

  def init(params):
    one = lambda path, x: stacked(tx.init, path, x.ndim)(x)
    return trees.map_paths(one, params)

  def update(updates, state, params=None):
    moved, states = {}, {}
    values = trees.flatten(updates if params is None else params)
    for path, g in trees.flatten(updates).items():
      own = state
      for key in path.split("/"):
        own = own[key]
      one = stacked(tx.update, path, g.ndim)
      moved[path], states[path] = one(g, own, values[path])
    return trees.unflatten(moved), trees.unflatten(states)

  return GradientTransformation(init, update)


def _adafactor(moments: Moments) -> GradientTransformation:
  """Second moments as rows and columns (Shazeer & Stern, arXiv 1804.04235).
  Without momentum and scaling by the parameters' size, as Hugging Face's
  Trainer runs it: learning rates are those of AdamW."""
  del moments
  clip = optax.clip_by_block_rms(1.0)
  return per_matrix(optax.chain(optax.scale_by_factored_rms(), clip))


def _muon(moments: Moments) -> GradientTransformation:
  """Matrices by Muon (Jordan 2024), scaled to AdamW's size; others by AdamW.

  An orthogonalized update times 0.2 sqrt(max(in, out)) has the root mean square
  of AdamW's, whose learning rates so stay right (Liu et al. 2025, arXiv
  2502.16982).
  """
  scale = lambda update: 0.2 * max(jnp.shape(update)) ** 0.5 * update
  resize = optax.stateless(lambda updates, _: jax.tree.map(scale, updates))
  muon = optax.contrib.scale_by_muon(beta=moments.b1, mu_dtype=jnp.float32)
  matrices = per_matrix(optax.chain(muon, resize))
  others = _adam(moments)

  def init(params):
    mine, rest = trees.partition(params, is_matrix)
    return {"muon": matrices.init(mine), "adam": others.init(rest)}

  def update(updates, state, params=None):
    mine: Any
    rest: Any
    mine, rest = trees.partition(updates, is_matrix)
    mine, muon = matrices.update(mine, state["muon"])
    rest, adam = others.update(rest, state["adam"])
    return trees.merge(mine, rest), {"muon": muon, "adam": adam}

  return GradientTransformation(init, update)


# The direction of a step by name, from its settings; one more is one line.
OPTIMIZERS: dict[str, Callable[[Moments], GradientTransformation]] = {
  "adamw": _adam,  # Loshchilov & Hutter, arXiv 1711.05101.
  "adafactor": _adafactor,
  "lion": lambda m: optax.scale_by_lion(m.b1, m.b2, jnp.float32),
  "sgd": lambda m: optax.trace(m.b1, accumulator_dtype=jnp.float32),
  "muon": _muon,
}


# -- Rounding to bfloat16 -----------------------------------------------------


def rounding_seed(name: str, seed: int) -> int | None:
  """The seed of 'stochastic' rounding; None where it is to 'nearest'."""
  # Not the run's own seed, which dropout draws from.
  return seed + 1 if name == "stochastic" else None


def stochastic_round(
  key: jax.Array, x: Float32[Array, "..."]
) -> BFloat16[Array, "..."]:
  """One of the two bfloat16 around x, with E[result] = x.

  A bfloat16 has 8 significant bits: rounded to nearest, a step below 1/512 of a
  weight, as most of fine-tuning are, is lost and the weight never moves.
  Rounded up as often as it is near the upper neighbor, it is right on average:

      1 + 0.001:  1.0078125 in 12.8 % of the draws, 1 in the others

  The lower 16 bits of x are its distance to the lower neighbor: 16 random bits
  are added, which carry over in that share of the draws, and they are cut off.
  Values that are not finite stay.
  """
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  cut = (bits + noise) & jnp.uint32(0xFFFF0000)
  cut = jax.lax.bitcast_convert_type(cut, jnp.float32)
  # The cut value is a bfloat16 already: nothing is rounded here.
  return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def round_tree(
  tree: trees.Tree,
  like: trees.Tree,
  seed: int | None,
  step: jax.Array | int,
  what: int,
) -> trees.Tree:
  """Float32 leaves in the dtypes of `like`; stochastic where there is a seed.
  Draws are a function of (seed, step, what, index of the leaf): the same on any
  mesh and after a resume. `what` distinguishes trees of one step."""
  leaves, structure = jax.tree.flatten(tree)
  rounded = []
  for i, (x, y) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True)):
    if seed is not None and y.dtype == jnp.bfloat16:
      key = jax.random.key(seed)
      for number in (step, what, i):
        key = jax.random.fold_in(key, number)
      rounded.append(stochastic_round(key, x))
    else:
      rounded.append(x.astype(y.dtype))
  return jax.tree.unflatten(structure, rounded)
