"""Adapters as PEFT folders: written for other tools, and read from theirs.

    layers/attn/q/lora_a [L, in, R]
      <-> base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight [R, in]

Where several of our kernels share one of their modules (the fused q, k and v
of Phi-3), so do their adapters: A's side by side, B's along the diagonal.
Reading refuses by name what we would compute otherwise: a setting that is not
understood is never ignored.
"""

import json
import math
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
from sft_jax.models.families import FAMILIES
from sft_jax.models.hf import parameter_map, peft_moe
from sft_jax.models.hf.safetensors_files import (
  replace_folder,
  save_tensors,
  write_json,
)
from sft_jax.models.lora import lora as lora_lib
from sft_jax.models.lora.lora import LoraConfig
from sft_jax.models.transformer import Model

_ROWS = ".token_adapter.trainable_tokens_delta"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapter(
  path: str | Path, model: Model, params: Tree, *, base: str
) -> None:
  """Writes the adapters alone, as a PEFT folder for the unchanged base model.

  Parameters that were trained whole are written as `modules_to_save`. A PiSSA
  adapter is written as a plain one of twice the rank, s (A B - A0 B0): what
  peft adds to the *unchanged* base. With a quantized base the adapter learnt
  the rounding too; beside the base in full precision it is a little off, so
  the merged folder of `load_save.save_pretrained` is the exact one.

  Args:
    path: the folder to write.
    model: a model built with `lora`.
    params: its parameters, adapters among them.
    base: name or path of the base model, as PEFT will look for it.

  Raises:
    ValueError: no adapters, experts that were trained whole, or DoRA on a part
      of what is one module to PEFT.
  """
  flat, lora, config = trees.flatten(params), model.lora, model.config
  if lora is None or not any(leaf.endswith("/lora_a") for leaf in flat):
    raise ValueError(
      "save_adapter: no adapters; expected a model built with "
      "lora=LoraConfig(...) and its parameters. Use save_pretrained."
    )
  growth = 2 if lora.init == "pissa" else 1
  top = growth * lora.rank, _grown(lora, lora.alpha, growth)
  tensors, adapted, rank_pattern, alpha_pattern = {}, [], {}, {}
  saved = []
  scale = lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)
  experts = peft_moe.stacks(
    {m for m in peft_moe.MODULES if f"{m}/lora_a" in flat},
    lambda module: _halves(flat, module, lora, scale),
    config,
  )
  for stack in experts:
    tensors |= {f"{PREFIX}{name}": x for name, x in stack.tensors.items()}
    rank_pattern[stack.target] = stack.rank
    alpha_pattern[stack.target] = _grown(
      lora, lora.alpha, stack.rank / lora.rank
    )
  for theirs, ours in fused_modules(config).items():
    if peft_moe.MODULES.intersection(ours):
      _refuse_whole(lora, flat, ours)
    elif any(f"{module}/lora_a" in flat for module in ours):
      adapter = _adapter(flat, ours, lora)
      for i, name in parameter_map.modules(
        ours[0], config, adapter.a.shape
      ).items():
        name = f"{PREFIX}{name}"
        tensors[f"{name}.lora_A.weight"] = adapter.a[i].T
        tensors[f"{name}.lora_B.weight"] = adapter.b[i].T
        if adapter.m is not None:
          tensors[f"{name}.lora_magnitude_vector"] = adapter.m[i]
      adapted.append(theirs)
      if adapter.rank != top[0]:
        rank_pattern[within_layer(theirs)] = adapter.rank
      if adapter.alpha != top[1]:
        alpha_pattern[within_layer(theirs)] = adapter.alpha
    elif any(_trains_whole(lora, flat, module) for module in ours):
      tensors |= _whole(flat, ours, config)
      saved.append(within_layer(theirs))
  rows = {
    parameter_map.tensor_slices(f"{at}/embedding", x.shape, config)[0].name: x
    for at in ("embed", "head")
    if (x := flat.get(f"{at}/lora_rows")) is not None
  }
  for name, x in rows.items():
    tensors[f"{PREFIX}{name.removesuffix('.weight')}{_ROWS}"] = np.asarray(x)
  token_rows = {
    name.removesuffix(".weight").rpartition(".")[2]: list(lora.token_rows)
    for name in rows
  }
  tied = config.tie_embeddings and lora.trains("embed/embedding")
  if tied:  # peft ties the two again, but looks for both.
    x = flat["embed/embedding"]
    (place,) = parameter_map.tensor_slices("embed/embedding", x.shape, config)
    tensors[f"{PREFIX}lm_head.weight"] = tensors[f"{PREFIX}{place.name}"]
  settings = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": top[0],
    "lora_alpha": top[1],
    "lora_dropout": lora.dropout,
    "target_parameters": [stack.target for stack in experts] or None,
    "target_modules": _shortest(adapted, config),
    "rank_pattern": rank_pattern,
    "alpha_pattern": alpha_pattern,
    "use_rslora": lora.rslora,
    "use_dora": lora.dora,
    "modules_to_save": saved or None,
    "trainable_token_indices": token_rows or None,
    "ensure_weight_tying": tied,
    "bias": "none",
    "fan_in_fan_out": FAMILIES[config.family].conv1d,
    "inference_mode": True,
  }

  def write(folder: Path) -> None:
    write_json(folder / CONFIG, settings)
    save_tensors(folder / WEIGHTS, tensors)

  replace_folder(Path(path), CONFIG, write)


# -- Names, both ways --------------------------------------------------------


def fused_modules(config: ModelConfig) -> dict[str, list[str]]:
  """{template of their module: our modules in it, in order}."""
  found: dict[str, list[str]] = {}
  for ours, theirs in FAMILIES[config.family].names.items():
    found.setdefault(theirs, []).append(ours)
  return found


def within_layer(theirs: str) -> str:
  """'model.layers.{}.self_attn.q_proj' -> 'self_attn.q_proj'."""
  return theirs.rpartition("{}.")[2]


def _shortest(adapted: list[str], config: ModelConfig) -> list[str]:
  """'q_proj' for 'self_attn.q_proj' where nothing else ends so.

  The short names are what other tools know.
  """
  last = lambda module: module.rpartition(".")[2]
  others = {last(t) for t in fused_modules(config) if t not in adapted}
  return sorted(
    {within_layer(t) if last(t) in others else last(t) for t in adapted}
  )


# -- Arrays -----------------------------------------------------------------


class _Adapter(NamedTuple):
  """One module's in PEFT's sense: A [L, in, R], B [L, R, out], M [L, out]."""

  a: np.ndarray
  b: np.ndarray
  m: np.ndarray | None
  rank: int
  alpha: float


def _grown(lora: LoraConfig, alpha: float, growth: float) -> float:
  """The alpha that keeps the scale when the rank grows."""
  return alpha * (math.sqrt(growth) if lora.rslora else growth)


def _adapter(
  flat: dict[str, Any], ours: list[str], lora: LoraConfig
) -> _Adapter:
  """The adapters of our modules as one that gives all their outputs."""
  present = [module for module in ours if f"{module}/lora_a" in flat]
  short = lambda module: module.removeprefix("layers/")
  if lora.dora and present != ours:
    raise ValueError(
      f"save_adapter: DoRA on {present}, which share a module with the rest of "
      f"{ours}; expected all of them. Widen lora.targets, or export the merged "
      "model."
    )
  parts_a, parts_b, start = [], [], 0
  widths = [_width(flat, module) for module in ours]
  scale = lora.scale(short(present[0]))
  for module, width in zip(ours, widths, strict=True):
    if module in present:
      a, b = _halves(flat, module, lora, scale)
      before, after = start, sum(widths) - start - width
      parts_a.append(a)
      parts_b.append(np.pad(b, ((0, 0), (0, 0), (before, after))))
    start += width
  a, b = np.concatenate(parts_a, axis=-1), np.concatenate(parts_b, axis=-2)
  m = None
  if lora.dora:
    m = np.concatenate([flat[f"{module}/lora_m"] for module in ours], axis=-1)
  rank, own = a.shape[-1], lora.rank_of(short(present[0]))
  alpha = _grown(lora, lora.alpha_of(short(present[0])), rank / own)
  return _Adapter(a, b, m, rank, alpha)


def _halves(
  flat: dict[str, Any], module: str, lora: LoraConfig, scale: float
) -> tuple[np.ndarray, np.ndarray]:
  """A [..., in, R] and B [..., R, out] of a module that is adapted, so that
  `scale` A B is the update of the unchanged base."""
  leaf = lambda name: np.asarray(flat[f"{module}/lora_{name}"])
  a, b = leaf("a"), leaf("b")
  if lora.init == "pissa":
    a = np.concatenate((a, leaf("a0")), axis=-1)
    b = np.concatenate((b, -leaf("b0")), axis=-2)
  ratio = lora.scale(module.removeprefix("layers/")) / scale
  return a, b if ratio == 1 else b * ratio


def _refuse_whole(
  lora: LoraConfig, flat: dict[str, Any], ours: list[str]
) -> None:
  """PEFT saves modules whole, and one expert is none."""
  if whole := [module for module in ours if _trains_whole(lora, flat, module)]:
    raise ValueError(
      f"save_adapter: {whole[0]} holds experts that were trained whole, which "
      "no PEFT folder holds; expected adapters on them. Export the merged "
      "model, or narrow lora.also_train."
    )


def _width(flat: dict[str, Any], module: str) -> int:
  """Output features of a module, whether it is quantised or not."""
  kernel = flat.get(f"{module}/kernel", flat.get(f"{module}/kernel_codes"))
  assert kernel is not None, module
  return kernel.shape[-1]


def _trains_whole(lora: LoraConfig, flat: dict[str, Any], module: str) -> bool:
  return any(
    lora.trains(leaf) and not lora_lib.is_adapter(leaf)
    for leaf in flat
    if leaf.rpartition("/")[0] == module
  )


def _whole(
  flat: dict[str, Any], ours: list[str], config: ModelConfig
) -> dict[str, np.ndarray]:
  """All tensors of one module in PEFT's sense."""
  tensors: dict[str, np.ndarray] = {}
  for leaf, x in flat.items():
    if leaf.rpartition("/")[0] in ours:
      for place in parameter_map.tensor_slices(leaf, x.shape, config):
        name, part = f"{PREFIX}{place.name}", np.asarray(x[place.index])
        if name not in tensors:
          tensors[name] = np.zeros(place.shape, part.dtype)
        tensors[name][place.cut] = part.T if place.transpose else part
  return tensors


# -- Reading ------------------------------------------------------------------


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
  leaves, token_rows = _token_rows(folder, tensors, theirs, config)
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
    places = parameter_map.tensor_slices(leaf, shape.shape, config)
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
    for place in parameter_map.tensor_slices(leaf, shape.shape, config)
  }
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


def _check_tied(
  folder: Path,
  tensors: dict[str, np.ndarray],
  theirs: dict[str, Any],
  config: ModelConfig,
) -> None:
  """Refuses an embedding that was trained apart from the head it is tied to.

  peft trains a copy of the embedding; unless it is told to tie the two again,
  the head stays the base's.
  """
  shape = (config.vocab_size, config.d_model)
  (place,) = parameter_map.tensor_slices("embed/embedding", shape, config)
  embedding = tensors[f"{PREFIX}{place.name}"]
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
  folder: Path,
  tensors: dict[str, np.ndarray],
  theirs: dict[str, Any],
  config: ModelConfig,
) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
  """Takes out the rows of tokens that were trained alone, and their ids."""
  declared = theirs.get("trainable_token_indices") or {}
  leaves: dict[str, np.ndarray] = {}
  lists = set()
  for at in ("embed",) if config.tie_embeddings else ("embed", "head"):
    shape = (config.vocab_size, config.d_model)
    (place,) = parameter_map.tensor_slices(f"{at}/embedding", shape, config)
    module = place.name.removesuffix(".weight")
    last = module.rpartition(".")[2]
    if isinstance(declared, list):
      declared = {last: declared}  # The embedding's, which comes first.
    rows = tensors.pop(f"{PREFIX}{module}{_ROWS}", None)
    ids = declared.get(last, declared.get(module))
    if rows is None and ids is None:
      continue
    if rows is None or ids is None or rows.shape != (len(ids), shape[1]):
      raise ValueError(
        f"{folder}: trainable_token_indices has {ids and len(ids)} ids of "
        f"{module} and the tensor {None if rows is None else rows.shape}; "
        f"expected as many rows of {shape[1]}. Save the adapter again."
      )
    leaves[f"{at}/lora_rows"] = rows[np.argsort(ids)]
    lists.add(tuple(sorted(ids)))
  if len(lists) > 1 or (declared and not lists):
    raise ValueError(
      f"{folder / CONFIG}: trainable_token_indices={declared}; expected the "
      "same ids for the embedding and the head. Merge the adapter with peft "
      "and load the merged model."
    )
  return leaves, next(iter(lists), ())


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


def _check_config(folder: Path, theirs: dict[str, Any]) -> None:
  """Refuses, by name, what would be computed otherwise than here."""
  odd = {
    key: value
    for key, value in theirs.items()
    if key not in _UNDERSTOOD and value
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


def place_adapter(params: Tree, leaves: dict[str, np.ndarray]) -> Tree:
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
