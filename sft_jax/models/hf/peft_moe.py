"""Adapters of experts as PEFT keeps them: on the stack of all experts.

transformers, from 5 on, holds the experts of a layer in two parameters, which
PEFT adapts whole (`target_parameters`). With E experts and the rank R,

    lora_A [E * R, in]     row e * R + r
    lora_B [out, R * E]    column r * E + e

Two parameters of one module are two wrappers around it, in the order of the
module: the name of the inner one, gate and up, has a `base_layer` in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
# Those that share a parameter, in their order.
_BESIDE: Mapping[str, int] = {"layers/moe/gate": 0, "layers/moe/up": 1}

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
  made = []
  for name, within in _wrappers([name for name in held if held[name]]):
    pairs = {module: pair(module) for module in held[name]}
    a = np.concatenate([one for one, _ in pairs.values()], axis=-1)
    b = np.concatenate(
      [_widened(module, half, config) for module, (_, half) in pairs.items()],
      axis=-2,
    )
    tensors = {}
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
      at = f"model.layers.{i}.{within}"
      rows = x.swapaxes(1, 2).reshape(-1, x.shape[1])
      columns = y.transpose(2, 1, 0).reshape(y.shape[2], -1)
      tensors |= {f"{at}.lora_A.weight": rows, f"{at}.lora_B.weight": columns}
    made.append(Stack(f"{_BLOCK}.{name}", a.shape[-1], tensors))
  return made


class Halves(NamedTuple):
  """What a folder has for the experts of one of our modules.

  Attributes:
    module: ours, such as 'layers/moe/up'.
    target: the parameter that holds it, within a layer.
    a: A [L, E, in, R].
    b: B [L, E, R, out], without the scale.
  """

  module: str
  target: str
  a: np.ndarray
  b: np.ndarray


def halves(
  declared: Sequence[str],
  take: Callable[[str], np.ndarray | None],
  config: ModelConfig,
  where: str,
) -> Iterator[Halves]:
  """Reads what `stacks` writes, or PEFT.

  Gate and up share their A there: each gets the whole of it, and its own part
  of B.

  Args:
    declared: PEFT's `target_parameters`.
    take: gives the tensors of one name within a layer, of all layers.
    config: the model's.
    where: errors begin with it.

  Raises:
    ValueError: a parameter that is no stack of experts; a stack that is
      declared and not there, or whose shape is not that of the experts.
  """
  names = []
  for target in declared:
    mine = [
      name
      for name in _PARAMETERS
      if config.num_experts
      and f"model.layers.0.{_BLOCK}.{name}".endswith(f".{target}")
    ]
    if len(mine) != 1:
      raise ValueError(
        f"{where}: target_parameters holds {target!r}; expected "
        f"{[f'{_BLOCK}.{name}' for name in _PARAMETERS]}, and a model with "
        "experts. Merge the adapter with peft and load the merged model."
      )
    names += mine
  names = [name for name in _PARAMETERS if name in names]
  E = config.num_experts
  for name, within in _wrappers(names):
    a, b = (take(f"{within}.lora_{half}.weight") for half in "AB")
    if a is None or b is None or a.shape[1] % E or b.shape[2] != a.shape[1]:
      shapes = [x.shape[1:] if x is not None else None for x in (a, b)]
      raise ValueError(
        f"{where}: {within} has A and B of shapes {shapes}; expected [E R, in] "
        f"and [out, R E] with E = {E}. Save the adapter again."
      )
    L, rows, width = a.shape
    a = a.reshape(L, E, rows // E, width).swapaxes(2, 3)
    b = b.reshape(L, b.shape[1], rows // E, E).transpose(0, 3, 2, 1)
    for module in _PARAMETERS[name]:
      own = b[..., _outputs(module, b.shape[-1], config)]
      yield Halves(module, f"{_BLOCK}.{name}", a, own)


def _wrappers(names: list[str]) -> Iterator[tuple[str, str]]:
  """(parameter, name of what is wrapped around it), the innermost first."""
  for depth, name in zip(range(len(names))[::-1], names, strict=True):
    yield name, _BLOCK + ".base_layer" * depth


def _widened(module: str, half: np.ndarray, config: ModelConfig) -> np.ndarray:
  """B [L, E, R, F] among the outputs of its parameter."""
  if module not in _BESIDE:
    return half
  width = 2 * half.shape[-1]
  wide = np.zeros((*half.shape[:-1], width), half.dtype)
  wide[..., _outputs(module, width, config)] = half
  return wide


def _outputs(module: str, width: int, config: ModelConfig) -> slice:
  """Which of the outputs of its parameter are a module's: gate and up lie one
  after the other, or, in gpt_oss, in turns."""
  if module not in _BESIDE:
    return slice(None)
  place, half = _BESIDE[module], width // 2
  if FAMILIES[config.family].stacked_experts:
    return slice(place, None, 2)
  return slice(place * half, (place + 1) * half)
