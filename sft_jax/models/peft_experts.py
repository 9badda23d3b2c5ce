"""Adapters of experts as PEFT keeps them: on the stack of all experts.

transformers, from 5 on, holds the experts of a layer in two parameters, which
PEFT adapts whole (`target_parameters`). With E experts and the rank R,

    lora_A [E * R, in]     row e * R + r
    lora_B [out, R * E]    column r * E + e

Two parameters of one module are two wrappers around it, the one declared last
outside: the inner one's name has a `base_layer` in it.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from sft_jax.models.config import ModelConfig
from sft_jax.models.families import FAMILIES

# Where transformers has them, and which of ours they hold, innermost first.
_BLOCK = "mlp.experts"
_PARAMETERS = {
  "gate_up_proj": ("layers/moe/gate", "layers/moe/up"),
  "down_proj": ("layers/moe/down",),
}
MODULES = frozenset(sum(_PARAMETERS.values(), ()))

# A [L, E, in, R] and s B [L, E, R, out] of one of our modules.
Pair = tuple[np.ndarray, np.ndarray]


class Stack(NamedTuple):
  """The adapter of one parameter of all layers.

  Attributes:
    target: the parameter, within a layer.
    rank: of each expert.
    tensors: by their names within PEFT's folder, but for its prefix.
  """

  target: str
  rank: int
  tensors: dict[str, np.ndarray]


def stacks(
  present: set[str], pair: Callable[[str], Pair], config: ModelConfig
) -> list[Stack]:
  """The adapters of the experts.

  Args:
    present: our modules that are adapted.
    pair: gives the halves of one, the scale in the second.
    config: the model's.
  """
  held = {
    name: [module for module in ours if module in present]
    for name, ours in _PARAMETERS.items()
  }
  names = [name for name in held if held[name]]
  made = []
  for depth, name in zip(range(len(names))[::-1], names, strict=True):
    pairs = {module: pair(module) for module in held[name]}
    a = np.concatenate([one for one, _ in pairs.values()], axis=-1)
    b = np.concatenate(
      [_widened(module, half, config) for module, (_, half) in pairs.items()],
      axis=-2,
    )
    within = _BLOCK + ".base_layer" * depth
    tensors = {}
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
      at = f"model.layers.{i}.{within}"
      rows = x.swapaxes(1, 2).reshape(-1, x.shape[1])
      columns = y.transpose(2, 1, 0).reshape(y.shape[2], -1)
      tensors |= {f"{at}.lora_A.weight": rows, f"{at}.lora_B.weight": columns}
    made.append(Stack(f"{_BLOCK}.{name}", a.shape[-1], tensors))
  return made


def _widened(module: str, half: np.ndarray, config: ModelConfig) -> np.ndarray:
  """B [L, E, R, F] among the outputs of its parameter: gate and up lie one
  after the other, or, in gpt_oss, in turns."""
  beside: Mapping[str, int] = {"layers/moe/gate": 0, "layers/moe/up": 1}
  if module not in beside:
    return half
  place, width = beside[module], half.shape[-1]
  wide = np.zeros((*half.shape[:-1], 2 * width), half.dtype)
  if FAMILIES[config.family].stacked_experts:
    wide[..., place::2] = half
  else:
    wide[..., place * width : (place + 1) * width] = half
  return wide
