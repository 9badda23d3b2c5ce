"""The state of a run: what it holds, where that is, what a token costs it."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sft_jax.checkpointing import digests
from sft_jax.common import flops, sharding, trees
from sft_jax.data.pipeline import Stream
from sft_jax.models.config import ATTENTION
from sft_jax.models.lora import base_model
from sft_jax.models.lora.lora import is_adapter
from sft_jax.models.transformer import Model
from sft_jax.step.train_step import TrainState, init_state
from sft_jax.training.build.data import Config, kept_kind
from sft_jax.training.build.step import Step, needs_base
from sft_jax.training.config import OptimizerConfig


def hold_base(
  config: Config,
  step: Step,
  params: trees.Tree,
  copy: Callable[[Any], Any],
) -> trees.Tree:
  """The parameters (or shapes), and what the base needs beside, if asked.

  `copy` makes one more of a leaf.

  Raises ValueError: a pattern of config.optim that matches nothing, or leaves
  nothing to train.
  """
  paths = [path for path in trees.flatten(params) if step.trained(path)]
  for key, choices, rules in (
    ("rates", paths, [pattern for pattern, _ in config.optim.rates]),
    ("freeze", trees.flatten(params), config.optim.freeze),
    # Those of the default are for all models, trained in whatever way.
    ("decay", paths, set(config.optim.decay) - set(OptimizerConfig.decay)),
  ):
    for pattern in sorted(rules):
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
  if not needs_base(config):
    return params
  copies = base_model.to_copy(params, step.trained)
  return base_model.with_copies(params, jax.tree.map(copy, copies))


def base_digest(config: Config, params: trees.Tree) -> str:
  """Of a model as it was loaded, adapters aside, and of its precision."""
  leaves = trees.flatten(base_model.own(params)).items()
  base = {path: x for path, x in leaves if not is_adapter(path)}
  text = json.dumps([config.model.dtype, digests.describe(base, {})])
  return hashlib.sha256(text.encode()).hexdigest()


def check_reference(
  config: Config, params: trees.Tree, *streams: Stream | None
) -> None:
  """Raises ValueError if preference.reference=kept is of another model."""
  if kept_kind(config) != "reference":
    return
  base = base_digest(config, params)
  for kept in (stream.store.teacher for stream in streams if stream):
    if kept and kept.base != base:
      raise ValueError(
        "preference.reference: got 'kept' of another model or precision than "
        f"{config.model.path} in {config.model.dtype}; expected this one's. "
        "Run sft-jax teach with this config again."
      )


def state_shardings(step: Step, params: trees.Tree, mesh: Mesh) -> TrainState:
  """Where every leaf of the state of these parameters (or shapes) is."""
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
  # Wider heads count as more of what they see.
  pairs = [
    flops.mean_context(lengths, kind.window)
    * (c.kv_shape(kind.mixer)[1] / c.head_dim)
    for kind in c.layers
    if kind.mixer in ATTENTION
  ]
  # Products with a state [H, P] of each head: it is written and read, and by
  # the delta rule read once more.
  products = {"mamba": 2, "delta": 3}
  states = sum(products.get(kind.mixer, 0) for kind in c.layers)
  return flops.model_flops_per_token(
    trained_matmul_params=num_trained,
    frozen_matmul_params=num_frozen,
    num_layers=len(pairs),
    num_heads=c.num_heads,
    head_dim=c.head_dim,
    context=sum(pairs) / max(len(pairs), 1),
    state_params=states * c.mixer_heads * c.mixer_state * c.mixer_width,
  )
