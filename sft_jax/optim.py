"""The learning-rate schedule and the AdamW chain, by parameter patterns."""

from collections.abc import Sequence

import optax

from sft_jax import trees

SCHEDULES = ("cosine", "linear", "constant")


def schedule(
  name: str,
  *,
  peak: float,
  warmup_steps: int,
  num_steps: int,
  final_fraction: float,
) -> optax.Schedule:
  """Learning rate by optimiser step: warm-up from 0, then decay.

  Step s < warmup_steps has peak * (s + 1) / warmup_steps, so that the first
  step moves; after it the rate falls to peak * final_fraction at num_steps
  ('cosine', 'linear') or stays ('constant').

  Raises:
    ValueError: an unknown name, or a warm-up longer than the run.
  """
  if name not in SCHEDULES:
    raise ValueError(
      f"optim.schedule: got {name!r}, expected one of {SCHEDULES}"
    )
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
  else:
    decay = optax.constant_schedule(peak)
  if warmup_steps == 0:
    return decay
  warmup = lambda step: peak * (step + 1) / warmup_steps
  return optax.join_schedules([warmup, decay], [warmup_steps])


def adamw(
  learning_rate: optax.Schedule,
  *,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  decay_patterns: Sequence[str],
  clip_norm: float,
) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter, arXiv 1711.05101) after global-norm clipping.

  Args:
    learning_rate: schedule over optimiser steps.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled decay, multiplied by the learning rate; 0 = off.
    decay_patterns: parameter paths that decay; norms and biases should not.
    clip_norm: largest global norm of the gradients; 0 = no clipping.
  """
  decays = lambda params: trees.map_paths(
    lambda path, _: trees.matches_any(decay_patterns, path), params
  )
  return optax.chain(
    optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    optax.add_decayed_weights(weight_decay, mask=decays),
    optax.scale_by_learning_rate(learning_rate),
  )
