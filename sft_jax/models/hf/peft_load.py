"""PEFT folders read: what others trained becomes our adapters.

The names are those of `peft`. What we would compute otherwise is refused by
name: a setting that is not understood is never ignored.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import safe_open

from sft_jax.common import trees
from sft_jax.common.trees import Tree
from sft_jax.models import transformer
from sft_jax.models.config import ModelConfig
from sft_jax.models.hf import parameter_map, peft_moe
from sft_jax.models.hf.peft import CONFIG, PREFIX, WEIGHTS, fused_modules
from sft_jax.models.lora.lora import LoraConfig


class Adapter(NamedTuple):
  """A PEFT folder as our own.

  Attributes:
    lora: build the model with it.
    leaves: {path: array} that replace the fresh ones; see `place`.
  """

  lora: LoraConfig
  leaves: dict[str, np.ndarray]


def load_adapter(path: str | Path, config: ModelConfig) -> Adapter:
  """Reads a PEFT folder that adapts a model of this config.

  Raises:
    ValueError: no such folder; a kind or a setting of adapter that we do not
      have; tensors that do not fit the model or are not in every layer.
  """
  folder = Path(path)
  for name in (CONFIG, WEIGHTS):
    if not (folder / name).is_file():
      raise ValueError(
        f"{folder}: no {name}; expected a PEFT adapter saved as safetensors. "
        "Check lora.path."
      )
  theirs = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
  _check_config(folder, theirs)
  tensors = _read(folder)
  shapes = trees.flatten(
    jax.eval_shape(transformer.build(config).init, jax.random.key(0))
  )
  leaves: dict[str, np.ndarray] = {}
  targets, ranks, alphas, whole = [], [], [], []
  found = [
    *_of_modules(folder, tensors, theirs, shapes, config),
    *_of_experts(folder, tensors, theirs, config),
  ]
  for module, rank, alpha, halves in found:
    leaves |= {f"{module}/lora_{half}": x for half, x in halves.items()}
    short = module.removeprefix("layers/")
    targets.append(rf"^{module}/kernel$")
    ranks.append((rf"^{short}$", rank))
    alphas.append((rf"^{short}$", float(alpha)))
  for leaf, shape in shapes.items():
    places = parameter_map.places(leaf, shape.shape, config)
    if f"{PREFIX}{places[0].name}" in tensors:
      x = np.empty(shape.shape, np.float32)
      for place in places:
        part = tensors[f"{PREFIX}{place.name}"][place.cut]
        x[place.index] = part.T if place.transpose else part
      leaves[leaf] = x
      whole.append(rf"^{leaf}$")
  known = {
    f"{PREFIX}{place.name}"
    for leaf, shape in shapes.items()
    for place in parameter_map.places(leaf, shape.shape, config)
  }
  if config.tie_embeddings:  # Written once more by some versions of peft.
    known.add(f"{PREFIX}lm_head.weight")
  odd = sorted(tensors.keys() - known)
  if odd or not targets:
    raise ValueError(
      f"{folder}: {len(odd)} tensors are unknown: {odd[:3]}; expected adapters "
      f"of a {config.family}. Is it another base model's?"
    )
  lora = LoraConfig(
    rank=theirs["r"],
    alpha=float(theirs["lora_alpha"]),
    targets=tuple(targets),
    rank_pattern=tuple(r for r in ranks if r[1] != theirs["r"]),
    alpha_pattern=tuple(a for a in alphas if a[1] != theirs["lora_alpha"]),
    rslora=bool(theirs.get("use_rslora")),
    dora=bool(theirs.get("use_dora")),
    dropout=float(theirs.get("lora_dropout") or 0.0),
    also_train=tuple(whole),
  )
  return Adapter(lora, leaves)


class _Found(NamedTuple):
  """What a folder has for one of our modules: {'a' 'b' or 'm': its array}."""

  module: str
  rank: int
  alpha: float
  halves: dict[str, np.ndarray]


def _of_modules(
  folder: Path,
  tensors: dict[str, np.ndarray],
  theirs: dict[str, Any],
  shapes: dict[str, Any],
  config: ModelConfig,
) -> Iterator[_Found]:
  """Takes out the adapters of what is a module to PEFT."""
  for ours in fused_modules(config).values():
    kernels = [f"{module}/kernel" for module in ours]
    if kernels[0] not in shapes:
      continue
    stack = shapes[kernels[0]].shape[:-2]
    modules = list(parameter_map.modules(ours[0], config, stack).values())
    parts = {}
    for half, end in _ENDS.items():
      found = _take(folder, tensors, [f"{PREFIX}{m}{end}" for m in modules])
      if found is not None:
        parts[half] = np.swapaxes(found, 1, -1)
    if not parts:
      continue
    (rank, alpha), *more = {_settings(theirs, name) for name in modules}
    expected = {"a", "b", *("m" if theirs.get("use_dora") else "")}
    if more or parts.keys() != expected or parts["a"].shape[-1] != rank:
      raise ValueError(
        f"{folder}: {modules[0]} has the parts {sorted(parts)} in "
        f"{[x.shape for x in parts.values()]}, (rank, alpha) "
        f"{[(rank, alpha), *more]} by {CONFIG}; expected {sorted(expected)} "
        "and one rank in all layers. Save the adapter again."
      )
    start = 0
    for module, kernel in zip(ours, kernels, strict=True):
      own = slice(start, start + shapes[kernel].shape[-1])
      halves = {
        half: x if half == "a" else x[..., own] for half, x in parts.items()
      }
      yield _Found(module, rank, alpha, halves)
      start = own.stop


def _of_experts(
  folder: Path,
  tensors: dict[str, np.ndarray],
  theirs: dict[str, Any],
  config: ModelConfig,
) -> Iterator[_Found]:
  """Takes out those of the experts, which are parameters to PEFT."""

  def take(within: str) -> np.ndarray | None:
    layers = range(config.num_layers)
    at = [f"{PREFIX}model.layers.{i}.{within}" for i in layers]
    return _take(folder, tensors, at)

  declared = theirs.get("target_parameters") or []
  found = peft_moe.halves(declared, take, config, str(folder))
  for module, target, a, b in found:
    settings = {
      _settings(theirs, f"model.layers.{i}.{target}")
      for i in range(config.num_layers)
    }
    (rank, alpha), *more = settings
    if more or a.shape[-1] != rank:
      raise ValueError(
        f"{folder}: {target} has an A of the rank {a.shape[-1]}, and (rank, "
        f"alpha) {sorted(settings)} by {CONFIG}; expected one rank in all "
        "layers. Save the adapter again."
      )
    yield _Found(module, rank, alpha, {"a": a, "b": b})


def _settings(theirs: dict[str, Any], name: str) -> tuple[int, float]:
  """The rank and alpha of a module or parameter, by its whole name."""
  return (
    _by_pattern(theirs.get("rank_pattern"), name, theirs["r"]),
    _by_pattern(theirs.get("alpha_pattern"), name, theirs["lora_alpha"]),
  )


_ENDS = {
  "a": ".lora_A.weight",
  "b": ".lora_B.weight",
  "m": ".lora_magnitude_vector",
}


def _read(folder: Path) -> dict[str, np.ndarray]:
  with safe_open(folder / WEIGHTS, framework="numpy") as file:
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _take(
  folder: Path, tensors: dict[str, np.ndarray], wanted: list[str]
) -> np.ndarray | None:
  """Takes the tensors of all layers out, stacked; None if there are none."""
  parts = [tensors.pop(name) for name in wanted if name in tensors]
  if not parts:
    return None
  if len(parts) < len(wanted) or len({part.shape for part in parts}) > 1:
    raise ValueError(
      f"{folder}: {wanted[0]} and its like are not in every layer, or not in "
      "one shape; expected the same adapters in all layers, as they are "
      "stacked. Merge the adapter with peft and load the merged model."
    )
  return np.stack(parts)


# What we read, or what says nothing of the arithmetic.
_READ = {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"}
_READ |= {"use_rslora", "use_dora", "modules_to_save", "ensure_weight_tying"}
_READ |= {"target_parameters"}
_SAY_NOTHING = {
  "target_modules",
  "exclude_modules",
  "task_type",
  "peft_version",
}
_SAY_NOTHING |= {"base_model_name_or_path", "revision", "inference_mode"}
_SAY_NOTHING |= {"auto_mapping", "megatron_core", "qalora_group_size"}
_SAY_NOTHING |= {"fan_in_fan_out"}  # Conv1D or Linear: the family knows.
_SAY_NOTHING |= {"layers_pattern", "runtime_config"}
# Starts that leave the base model as it is.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def _check_config(folder: Path, theirs: dict[str, Any]) -> None:
  """Refuses, by name, what would be computed otherwise than here."""
  odd = {
    key: value
    for key, value in theirs.items()
    if key not in _READ | _SAY_NOTHING and value
  }
  if odd.pop("peft_type", None) != "LORA":
    odd["peft_type"] = theirs.get("peft_type")
  if odd.get("bias") == "none":
    del odd["bias"]
  if odd.get("init_lora_weights") in _PLAIN_STARTS:
    odd.pop("init_lora_weights", None)
  if odd:
    raise ValueError(
      f"{folder / CONFIG}: {', '.join(f'{k}={v!r}' for k, v in odd.items())}; "
      "expected a LORA without these. Merge the adapter with peft and load the "
      "merged model. One whose start changes the base (pissa) can be saved by "
      "peft with path_initial_model_for_weight_conversion."
    )


def _by_pattern(patterns: dict | None, module: str, default: Any) -> Any:
  """PEFT's rule: the first key that is the whole or the end of a name."""
  for key, value in (patterns or {}).items():
    if re.match(rf"(.*\.)?({key})$", module):
      return value
  return default


def place(params: Tree, leaves: dict[str, np.ndarray]) -> Tree:
  """Puts a loaded adapter's leaves in the place of the fresh ones.

  Raises:
    ValueError: a leaf that the parameters lack or hold in another shape.
  """
  flat = dict(trees.flatten(params))
  for path, x in leaves.items():
    if path not in flat or flat[path].shape != x.shape:
      got = flat[path].shape if path in flat else None
      raise ValueError(
        f"lora.path: {path} is {x.shape} in the adapter and {got} in the "
        "model; expected the same. Build the model with the adapter's own "
        "LoraConfig."
      )
    flat[path] = jax.make_array_from_callback(
      x.shape,
      flat[path].sharding,
      lambda index, x=x, dtype=flat[path].dtype: x[index].astype(dtype),
    )
  return trees.unflatten(flat)
