"""Adapters of experts as PEFT keeps them: on the stack of all experts.

transformers, from 5 on, holds the experts of a layer in two parameters, which
PEFT adapts whole (`target_parameters`). With E experts and the rank R,

    lora_A [E * R, in]     row e * R + r
    lora_B [out, R * E]    column r * E + e

Two parameters of one module are two wrappers around it, in the order of the
module: the name of the inner one, gate and up, has a `base_layer` in it.

In such models PEFT takes every target module that is named like an expert's
(`gate_proj`) for the experts, in shared experts and dense layers too. There the
target is the parameter (`mlp.shared_experts.gate_proj.weight`), whose A and B
are those of a module.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from sft_jax.models.config import ModelConfig, layers_of
from sft_jax.models.families import FAMILIES

# What transformers has, and which of ours they hold, innermost first.
_PARAMETERS = {
  "gate_up_proj": ("layers/moe/gate", "layers/moe/up"),
  "down_proj": ("layers/moe/down",),
}
MODULES: frozenset[str] = frozenset(sum(_PARAMETERS.values(), ()))

# A [L, E, in, R] and s B [L, E, R, out] of one of our modules.
Pair = tuple[np.ndarray, np.ndarray]


def to_peft(
  pairs: Mapping[str, Pair], config: ModelConfig
) -> Iterator[tuple[str, int, dict[str, np.ndarray]]]:
  """The adapters of the experts, parameter by parameter. Yields (the parameter
  within a layer, the rank of each expert, {name within PEFT's folder, but for
  its prefix: tensor})."""
  parameters = _parameters(config)
  held = {
    name: [module for module in ours if module in pairs]
    for name, ours in parameters.items()
  }
  present = [name for name in held if held[name]]
  for name, within in _wrappers(present, config):
    a = np.concatenate([pairs[module][0] for module in held[name]], axis=-1)
    width = len(parameters[name]) * pairs[held[name][0]][1].shape[-1]
    halves = []
    for module in held[name]:
      half = pairs[module][1]
      wide = np.zeros((*half.shape[:-1], width), half.dtype)
      wide[..., _outputs(name, module, width, config)] = half
      halves.append(wide)
    tensors = {}
    whole = np.concatenate(halves, axis=-2)
    for i, x, y in zip(layers_with_experts(config), a, whole, strict=True):
      at = f"model.layers.{i}.{within}"
      rows = x.swapaxes(1, 2).reshape(-1, x.shape[1])
      columns = y.transpose(2, 1, 0).reshape(width, -1)
      tensors |= {f"{at}.lora_A.weight": rows, f"{at}.lora_B.weight": columns}
    yield f"{_block(config)}.{name}", a.shape[-1], tensors


def layers_with_experts(config: ModelConfig) -> list[int]:
  """Their numbers; all, where no layer has an MLP in their place."""
  return list(layers_of(config).get("moe", range(config.num_layers)))


def from_peft(
  declared: Sequence[str],
  take: Callable[[str], np.ndarray | None],
  config: ModelConfig,
  where: str,
) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
  """Reads what `to_peft` writes, or PEFT; gate and up share their A there.

  `declared` are PEFT's `target_parameters`; `take` gives the tensors of one
  name within a layer, of all layers. Yields (our module, the parameter within a
  layer that holds it, A [L, E, in, R], B [L, E, R, out] without the scale).

  Raises ValueError: a parameter that is no stack of experts; a stack that is
  declared and not there, or of another shape.
  """
  parameters = _parameters(config)
  targets = {f"{_block(config)}.{name}": name for name in parameters}
  names, E = set(), config.num_experts
  for target in declared:
    mine = [t for t in targets if f"model.layers.0.{t}".endswith(f".{target}")]
    if len(mine) != 1 or not E:
      raise ValueError(
        f"{where}: target_parameters holds {target!r}; expected "
        f"{list(targets)}, and a model with experts. Merge the adapter with "
        "peft and load the merged model."
      )
    names.add(targets[mine[0]])
  present = [name for name in parameters if name in names]
  for name, within in _wrappers(present, config):
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
    for module in parameters[name]:
      own = b[..., _outputs(name, module, b.shape[-1], config)]
      yield module, f"{_block(config)}.{name}", a, own


def named_like_an_expert(theirs: str, config: ModelConfig) -> bool:
  """Whether PEFT takes a module for experts, by the end of its name."""
  if not config.num_experts or FAMILIES[config.family].experts_bare:
    return False
  names = FAMILIES[config.family].names
  return theirs.rpartition(".")[2] in {
    names.get(module, "").rpartition(".")[2] for module in MODULES
  }


def _parameters(config: ModelConfig) -> dict[str, tuple[str, ...]]:
  if config.gated_mlp:
    return _PARAMETERS
  down = "down_proj"
  return {"up_proj": ("layers/moe/up",), down: _PARAMETERS[down]}


def _block(config: ModelConfig) -> str:
  """Where transformers has a layer's experts in memory; Mixtral's move."""
  family = FAMILIES[config.family]
  router = family.names.get("layers/moe/router", "model.layers.{}.mlp.gate")
  block = router.split(".")[3]
  moved = block == "block_sparse_moe" and family.experts_apart
  # Gemma's router is beside the experts.
  block = f"{block}.experts".removeprefix("router.")
  return "mlp.experts" if moved else block


def _wrappers(
  names: list[str], config: ModelConfig
) -> Iterator[tuple[str, str]]:
  """(parameter, name of what is wrapped around it), the innermost first."""
  for depth, name in zip(range(len(names))[::-1], names, strict=True):
    yield name, _block(config) + ".base_layer" * depth


def _outputs(name: str, module: str, width: int, config: ModelConfig) -> slice:
  """Which of the outputs of its parameter are a module's: gate and up lie one
  after the other, or, in gpt_oss, in turns."""
  sharing = _parameters(config)[name]
  place, size = sharing.index(module), width // len(sharing)
  if FAMILIES[config.family].experts_in_turns:
    return slice(place, None, len(sharing))
  return slice(place * size, (place + 1) * size)
