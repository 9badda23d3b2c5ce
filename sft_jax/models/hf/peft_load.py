"""PEFT folders, ours or another tool's, read as adapters.

What we would compute otherwise is refused by name, never ignored.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import safe_open

from sft_jax.common import hub, trees
from sft_jax.common.buckets import ranges
from sft_jax.common.trees import Tree
from sft_jax.models import transformer
from sft_jax.models.config import ModelConfig
from sft_jax.models.families import FAMILIES
from sft_jax.models.hf import parameter_map, peft_moe
from sft_jax.models.hf.peft_save import CONFIG, ENDS, PREFIX, ROWS, WEIGHTS
from sft_jax.models.lora.lora import LoraConfig

Tensors = dict[str, np.ndarray]
Json = dict[str, Any]
_MERGE = "Merge the adapter with peft and load the merged model."

# What we read, what the tensors say too, and what says nothing of the
# arithmetic. Conv1D or Linear (fan_in_fan_out): the family knows.
_KEYS = (
  "r lora_alpha lora_dropout rank_pattern alpha_pattern use_rslora use_dora "
  "modules_to_save ensure_weight_tying target_parameters target_modules "
  "trainable_token_indices exclude_modules task_type peft_version eva_config "
  "base_model_name_or_path revision inference_mode auto_mapping megatron_core "
  "qalora_group_size fan_in_fan_out layers_pattern runtime_config"
)
_UNDERSTOOD = frozenset(_KEYS.split())
# Starts that leave the base model as it is.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


class Adapter(NamedTuple):
  """A PEFT folder as our own: build the model with `lora`; `leaves` replace
  its fresh ones, see `place_adapter`."""

  lora: LoraConfig
  leaves: Tensors


def load_adapter(path: str | Path, config: ModelConfig) -> Adapter:
  """Reads a PEFT folder that adapts a model of this config. Raises ValueError:
  no such folder; a kind or a setting of adapter that we do not have; tensors
  that do not fit the model or are not in every layer."""
  folder = hub.find_model(path).folder
  for name in (CONFIG, WEIGHTS):
    if not (folder / name).is_file():
      raise ValueError(
        f"{folder}: no {name}; expected a PEFT adapter saved as safetensors. "
        "Check lora.path."
      )
  ranges.need_all(folder / WEIGHTS)
  theirs = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
  _check_config(folder, theirs)
  with safe_open(folder / WEIGHTS, framework="numpy") as file:
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  shapes = trees.flatten(
    jax.eval_shape(transformer.build(config).init, jax.random.key(0))
  )
  leaves, token_rows = _token_rows(folder, tensors, theirs, config)
  targets, ranks, alphas, whole = [], [], [], []
  weights: set[str] = set()  # Those of modules.
  found = [
    *_of_modules(folder, tensors, theirs, weights, shapes, config),
    *_of_experts(folder, tensors, theirs, weights, config),
  ]
  for module, (rank, alpha), halves in found:
    leaves |= {f"{module}/lora_{half}": x for half, x in halves.items()}
    short = module.removeprefix("layers/")
    targets.append(rf"^{module}/kernel$")
    ranks.append((rf"^{short}$", rank))
    alphas.append((rf"^{short}$", float(alpha)))
  known = set()
  for leaf, shape in shapes.items():
    places = parameter_map.tensor_slices(leaf, shape.shape, config)
    known |= {f"{PREFIX}{place.name}" for place in places}
    if f"{PREFIX}{places[0].name}" in tensors:
      x = np.empty(shape.shape, np.float32)
      for place in places:
        part = tensors[f"{PREFIX}{place.name}"][place.cut]
        x[place.index] = part.T if place.transpose else part
      leaves[leaf] = x
      whole.append(rf"^{leaf}$")
  if config.tie_embeddings and "embed/embedding" in leaves:
    _check_tied(folder, tensors, theirs, config)
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
    token_rows=token_rows,
  )
  return Adapter(lora, leaves)


def place_adapter(params: Tree, leaves: Tensors) -> Tree:
  """Puts a loaded adapter's leaves in the place of the fresh ones. Raises
  ValueError: a leaf that the parameters lack or hold in another shape."""
  flat = dict(trees.flatten(params))
  for path, x in leaves.items():
    if path not in flat or flat[path].shape != x.shape:
      got = flat[path].shape if path in flat else None
      raise ValueError(
        f"lora.path: {path} is {x.shape} in the adapter and {got} in the "
        "model; expected the same. Build the model with its LoraConfig."
      )
    flat[path] = jax.make_array_from_callback(
      x.shape,
      flat[path].sharding,
      lambda index, x=x, dtype=flat[path].dtype: x[index].astype(dtype),
    )
  return trees.unflatten(flat)


def _check_config(folder: Path, theirs: Json) -> None:
  """Refuses, by name, what would be computed otherwise than here."""
  odd = {k: x for k, x in theirs.items() if x and k not in _UNDERSTOOD}
  if odd.pop("peft_type", None) != "LORA":
    odd["peft_type"] = theirs.get("peft_type")
  if odd.get("bias") == "none":
    del odd["bias"]
  if odd.get("init_lora_weights") in _PLAIN_STARTS:
    odd.pop("init_lora_weights", None)
  if odd:
    raise ValueError(
      f"{folder / CONFIG}: {', '.join(f'{k}={v!r}' for k, v in odd.items())}; "
      f"expected a LORA without these. {_MERGE} One whose start changes the "
      "base (pissa): path_initial_model_for_weight_conversion of peft."
    )


def _check_tied(
  folder: Path, tensors: Tensors, theirs: Json, config: ModelConfig
) -> None:
  """Refuses an embedding that was trained apart from the head it is tied to:
  unless peft is told to tie the two again, the head stays the base's."""
  embedding = tensors[f"{PREFIX}{parameter_map.table_name('embed', config)}"]
  head = tensors.get(f"{PREFIX}lm_head.weight")
  apart = head is None and not theirs.get("ensure_weight_tying")
  if apart or (head is not None and not np.array_equal(head, embedding)):
    raise ValueError(
      f"{folder / CONFIG}: modules_to_save={theirs.get('modules_to_save')} "
      "trained the embedding apart from the head, which the base model ties; "
      "expected ensure_weight_tying, or a base with tie_word_embeddings false. "
      "Merge the adapter with peft, untied, and load the merged model."
    )


def _token_rows(
  folder: Path, tensors: Tensors, theirs: Json, config: ModelConfig
) -> tuple[Tensors, tuple[int, ...]]:
  """Takes out the rows of tokens that were trained alone, and their ids."""
  declared = theirs.get("trainable_token_indices") or {}
  leaves: Tensors = {}
  lists = set()
  for at in ("embed",) if config.tie_embeddings else ("embed", "head"):
    module = parameter_map.table_name(at, config).removesuffix(".weight")
    last = module.rpartition(".")[2]
    if isinstance(declared, list):
      declared = {last: declared}  # The embedding's, which comes first.
    rows = tensors.pop(f"{PREFIX}{module}{ROWS}", None)
    ids = declared.get(last, declared.get(module))
    if rows is None and ids is None:
      continue
    if rows is None or ids is None or rows.shape != (len(ids), config.d_model):
      raise ValueError(
        f"{folder}: trainable_token_indices has {ids and len(ids)} ids of "
        f"{module} and the tensor {None if rows is None else rows.shape}; "
        f"expected as many rows of {config.d_model}. Save the adapter again."
      )
    leaves[f"{at}/lora_rows"] = rows[np.argsort(ids)]
    lists.add(tuple(sorted(ids)))
  if len(lists) > 1 or (declared and not lists):
    raise ValueError(
      f"{folder / CONFIG}: trainable_token_indices={declared}; expected the "
      f"same ids for the embedding and the head. {_MERGE}"
    )
  return leaves, next(iter(lists), ())


# (one of our modules, (rank, alpha), {'a' 'b' or 'm': its array}).
_Found = tuple[str, tuple[int, float], Tensors]


def _of_modules(
  folder: Path,
  tensors: Tensors,
  theirs: Json,
  weights: set[str],
  shapes: Json,
  config: ModelConfig,
) -> Iterator[_Found]:
  """Takes out the adapters of what is a module to PEFT, or the weight of one,
  which goes into `weights`."""
  for _, ours in parameter_map.fused_modules(config):
    kernels = [f"{module}/kernel" for module in ours]
    if kernels[0] not in shapes:
      continue
    stack = shapes[kernels[0]].shape[:-2]
    modules = list(parameter_map.modules(ours[0], config, stack).values())
    parts = {}
    for half, end in ENDS.items():
      found = _take(folder, tensors, [f"{PREFIX}{m}{end}" for m in modules])
      if found is not None:
        parts[half] = np.swapaxes(found, 1, -1)
    if not parts:
      continue
    weight = f".{modules[0]}.weight"
    declared = theirs.get("target_parameters") or []
    mine = {x for x in declared if weight.endswith(f".{x}")}
    if mine and not FAMILIES[config.family].conv1d:  # PEFT turns its axes.
      weights |= mine
      modules = [f"{name}.weight" for name in modules]
    first, *more = {_settings(theirs, name) for name in modules}
    expected = {"a", "b", *("m" if theirs.get("use_dora") else "")}
    if more or parts.keys() != expected or parts["a"].shape[-1] != first[0]:
      raise ValueError(
        f"{folder}: {modules[0]} has the parts {sorted(parts)} in "
        f"{[x.shape for x in parts.values()]}, (rank, alpha) "
        f"{[first, *more]} by {CONFIG}; expected {sorted(expected)} and one "
        "rank in all layers. Save the adapter again."
      )
    start = 0
    for module, kernel in zip(ours, kernels, strict=True):
      own = slice(start, start + shapes[kernel].shape[-1])
      halves = {k: x if k == "a" else x[..., own] for k, x in parts.items()}
      yield module, first, halves
      start = own.stop


def _of_experts(
  folder: Path,
  tensors: Tensors,
  theirs: Json,
  weights: set[str],
  config: ModelConfig,
) -> Iterator[_Found]:
  """Takes out those of the experts, which are parameters to PEFT."""
  layers = peft_moe.layers_with_experts(config)
  at = [f"model.layers.{i}." for i in layers]

  def take(within: str) -> np.ndarray | None:
    return _take(folder, tensors, [f"{PREFIX}{x}{within}" for x in at])

  declared = theirs.get("target_parameters") or []
  declared = [x for x in declared if x not in weights]
  found = peft_moe.from_peft(declared, take, config, str(folder))
  for module, target, a, b in found:
    first, *more = {_settings(theirs, x + target) for x in at}
    if more or a.shape[-1] != first[0]:
      raise ValueError(
        f"{folder}: {target} has an A of the rank {a.shape[-1]}, and (rank, "
        f"alpha) {[first, *more]} by {CONFIG}; expected one rank in all "
        "layers. Save the adapter again."
      )
    yield module, first, {"a": a, "b": b}


def _settings(theirs: Json, name: str) -> tuple[int, float]:
  """The rank and alpha of a module or parameter, by its whole name. PEFT's
  rule: the first key that is the whole or the end of a name."""

  def find(patterns: dict | None, default: Any) -> Any:
    for key, value in (patterns or {}).items():
      if re.match(rf"(.*\.)?({key})$", name):
        return value
    return default

  return (
    find(theirs.get("rank_pattern"), theirs["r"]),
    find(theirs.get("alpha_pattern"), theirs["lora_alpha"]),
  )


def _take(folder: Path, tensors: Tensors, wanted: list[str]) -> Any:
  """Takes the tensors of all layers out, stacked; None if there are none."""
  parts = [tensors.pop(name) for name in wanted if name in tensors]
  if not parts:
    return None
  if len(parts) < len(wanted) or len({part.shape for part in parts}) > 1:
    raise ValueError(
      f"{folder}: {wanted[0]} and its like are not in every layer, or not in "
      "one shape; expected the same adapters in all layers, as they are "
      f"stacked. {_MERGE}"
    )
  return np.stack(parts)
