"""Adapters as PEFT folders: what other tools load beside the base model.

    layers/attn/q/lora_a [L, in, R]
      <-> base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight [R, in]

Where several of our kernels lie in one of theirs (the fused q, k and v of
Phi-3), so do their adapters: A's side by side, B's along the diagonal.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sft_jax.common import trees
from sft_jax.common.trees import Tree
from sft_jax.models.config import ModelConfig
from sft_jax.models.families import FAMILIES
from sft_jax.models.hf import parameter_map, peft_moe
from sft_jax.models.hf.weights import replace_folder, save_tensors, write_json
from sft_jax.models.lora import lora as lora_lib
from sft_jax.models.lora.lora import LoraConfig
from sft_jax.models.transformer import Model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapter(
  path: str | Path, model: Model, params: Tree, *, base: str
) -> None:
  """Writes the adapters alone, as a PEFT folder for the base model as it was.

  Parameters that were trained whole go along as `modules_to_save`. A PiSSA
  adapter is written as a plain one of twice the rank, s (A B - A0 B0): what
  peft adds to the *unchanged* base. Of a quantised base the adapter learnt the
  rounding too; beside the base in full it is a little off, so the merged
  folder of `hf.save_pretrained` is the exact one.

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
  tied = config.tie_embeddings and lora.trains("embed/embedding")
  if tied:  # peft ties the two again, but looks for both.
    x = flat["embed/embedding"]
    (place,) = parameter_map.places("embed/embedding", x.shape, config)
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
    "ensure_weight_tying": tied,
    "bias": "none",
    "fan_in_fan_out": FAMILIES[config.family].conv1d,
    "inference_mode": True,
  }

  def write(folder: Path) -> None:
    write_json(folder / CONFIG, settings)
    save_tensors(folder / WEIGHTS, tensors)

  replace_folder(Path(path), CONFIG, write)


# -- Names ------------------------------------------------------------------


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
      for place in parameter_map.places(leaf, x.shape, config):
        name, part = f"{PREFIX}{place.name}", np.asarray(x[place.index])
        if name not in tensors:
          tensors[name] = np.zeros(place.shape, part.dtype)
        tensors[name][place.cut] = part.T if place.transpose else part
  return tensors
