"""LoRA: which kernels are adapted, fresh adapters, and folding them in.

The arithmetic of the adapted product is in `layers.Linear`.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp

from sft_jax import trees
from sft_jax.trees import Tree

_PRESETS = {
  "all-linear": (r"^layers/.*/kernel$",),
  "attention": (r"^layers/attn/.*/kernel$",),
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """What to adapt, and how strongly.

  Attributes:
    rank: R.
    alpha: the update is multiplied by alpha / rank.
    targets: 'all-linear', 'attention', or patterns over kernel paths such as
      (r'attn/(q|v)/',). Every pattern must match a kernel.
  """

  rank: int
  alpha: float
  targets: str | tuple[str, ...] = "all-linear"

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(
        f"lora: rank is {self.rank}; expected at least 1. "
        "Set lora.rank, or build the model without LoRA."
      )

  @property
  def scale(self) -> float:
    """The factor of the adapter's product."""
    return self.alpha / self.rank


def is_adapter(path: str) -> bool:
  """True for adapter leaves: with LoRA these train and nothing else does.

  >>> is_adapter('layers/attn/q/lora_a'), is_adapter('layers/attn/q/kernel')
  (True, False)
  """
  return path.endswith(("/lora_a", "/lora_b"))


def target_paths(params: Tree, targets: str | tuple[str, ...]) -> list[str]:
  """Paths of the kernels that the targets choose.

  Raises:
    ValueError: a pattern that matches no kernel of a layer.
  """
  if isinstance(targets, str):
    patterns = _PRESETS.get(targets, (targets,))
  else:
    patterns = tuple(targets)
  kernels = [
    path
    for path in trees.flatten(params)
    if path.startswith("layers/") and path.endswith("/kernel")
  ]
  for pattern in patterns:
    if not any(re.search(pattern, path) for path in kernels):
      raise ValueError(
        f"lora: target {pattern!r} matches no kernel; expected "
        f"{sorted(_PRESETS)} or patterns over {kernels}. Mend lora.targets."
      )
  if not patterns:
    raise ValueError(
      "lora: targets is empty; expected at least one pattern. Set lora.targets."
    )
  return [path for path in kernels if trees.matches_any(patterns, path)]


def init(
  key: jax.Array,
  params: Tree,
  lora: LoraConfig,
  *,
  dtype: jnp.dtype | type = jnp.float32,
) -> Tree:
  """Returns `params` with fresh adapters beside the chosen kernels.

  A is uniform within +-1/sqrt(in) (kaiming_uniform with a = sqrt(5), as
  PEFT); B is zero, so the adapted model starts as exactly the base model.
  """
  flat = dict(trees.flatten(params))
  for i, path in enumerate(target_paths(params, lora.targets)):
    *stack, fan_in, fan_out = flat[path].shape
    parent = path.removesuffix("/kernel")
    bound = 1 / math.sqrt(fan_in)
    flat[f"{parent}/lora_a"] = jax.random.uniform(
      jax.random.fold_in(key, i),
      (*stack, fan_in, lora.rank),
      dtype,
      minval=-bound,
      maxval=bound,
    )
    flat[f"{parent}/lora_b"] = jnp.zeros((*stack, lora.rank, fan_out), dtype)
  return trees.unflatten(dict(sorted(flat.items())))


def merge(params: Tree, lora: LoraConfig) -> Tree:
  """Folds every adapter into its kernel, in float32; for export only.

  The result holds no adapter and has the kernels' own dtypes.
  """
  flat = trees.flatten(params)
  merged = {path: x for path, x in flat.items() if not is_adapter(path)}
  for path in flat:
    if path.endswith("/lora_a"):
      parent = path.removesuffix("/lora_a")
      kernel = flat[f"{parent}/kernel"]
      delta = jnp.matmul(
        flat[path].astype(jnp.float32),
        flat[f"{parent}/lora_b"].astype(jnp.float32),
        precision="highest",
      )
      whole = kernel.astype(jnp.float32) + lora.scale * delta
      merged[f"{parent}/kernel"] = whole.astype(kernel.dtype)
  return trees.unflatten(merged)
