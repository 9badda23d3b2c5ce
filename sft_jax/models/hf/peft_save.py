"""Adapters written as PEFT folders, for other tools; `peft_load` reads them.

    layers/attn/q/lora_a [L, in, R]
      <-> base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight [R, in]

Where several of our kernels share one of their modules (the fused q, k and v
of Phi-3), so do their adapters: A's side by side, B's along the diagonal.
"""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sft_jax.common import trees
from sft_jax.common.trees import Tree
from sft_jax.common.workdir import replace_folder
from sft_jax.models.config import ModelConfig
from sft_jax.models.families import FAMILIES
from sft_jax.models.hf import parameter_map, peft_moe
from sft_jax.models.hf.safetensors_files import save_tensors, write_json
from sft_jax.models.lora import lora as lora_lib
from sft_jax.models.lora.lora import LoraConfig
from sft_jax.models.transformer import Model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"
# Of A, B and the magnitudes of DoRA.
ENDS = {
  "a": ".lora_A.weight",
  "b": ".lora_B.weight",
  "m": ".lora_magnitude_vector",
}


def save_adapter(
  path: str | Path, model: Model, params: Tree, *, base: str
) -> None:
  """Writes the adapters alone, as a PEFT folder for the unchanged base model.

  Parameters that were trained whole are written as `modules_to_save`. A PiSSA
  adapter is written as a plain one of twice the rank, s (A B - A0 B0): what
  peft adds to the *unchanged* base. With a quantized base the adapter learned
  the rounding too, so the merged folder of `load_save.save_pretrained` is the
  exact one. `base` is the base model's name or path, as PEFT will look for it.

  Raises ValueError: no adapters, experts that were trained whole, or DoRA on a
  part of what is one module to PEFT, or on what is a parameter to it.
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
  present = {m for m in peft_moe.MODULES if f"{m}/lora_a" in flat}
  pairs = {module: _halves(flat, module, lora, scale) for module in present}
  targets = []
  for target, rank, held in peft_moe.to_peft(pairs, config):
    tensors |= {f"{PREFIX}{name}": x for name, x in held.items()}
    rank_pattern[target] = rank
    alpha_pattern[target] = _grown(lora, lora.alpha, rank / lora.rank)
    targets.append(target)
  _check_layers(flat, lora, config)
  plain = [leaf for leaf in flat if not lora_lib.is_adapter(leaf)]
  whole = {leaf.rpartition("/")[0] for leaf in plain if lora.trains(leaf)}
  for theirs, ours in parameter_map.fused_modules(config):
    trained = [m for m in ours if m in whole]
    if trained and peft_moe.MODULES.intersection(ours):
      raise ValueError(
        f"save_adapter: {trained[0]} holds experts that were trained whole, "
        "which no PEFT folder holds; expected adapters on them. Export the "
        "merged model, or narrow lora.also_train."
      )
    if present.intersection(ours):
      continue
    if any(f"{module}/lora_a" in flat for module in ours):
      halves, alpha = _adapter(flat, ours, lora)
      rank, stack = halves["a"].shape[-1], halves["a"].shape
      for i, name in parameter_map.modules(ours[0], config, stack).items():
        for half, x in halves.items():
          tensors[f"{PREFIX}{name}{ENDS[half]}"] = x[i].T
      target = _within_layer(theirs)
      if peft_moe.named_like_an_expert(theirs, config):
        if lora.dora or lora.dropout:
          raise ValueError(
            f"save_adapter: PEFT adapts {target} of a {config.family} as a "
            "parameter, which has neither DoRA nor dropout; expected "
            "lora.targets without it. Export the merged model."
          )
        targets.append(target := f"{target}.weight")
      else:
        adapted.append(theirs)
      rank_pattern |= {target: rank} if rank != top[0] else {}
      alpha_pattern |= {target: alpha} if alpha != top[1] else {}
    elif trained:
      tensors |= _whole(flat, ours, config)
      saved.append(_within_layer(theirs))
  token_rows = {}
  for at in ("embed", "head"):
    if (x := flat.get(f"{at}/lora_rows")) is not None:
      module = parameter_map.table_name(at, config).removesuffix(".weight")
      tensors[f"{PREFIX}{module}{ROWS}"] = np.asarray(x)
      token_rows[module.rpartition(".")[2]] = list(lora.token_rows)
  tied = config.tie_embeddings and lora.trains("embed/embedding")
  if tied:  # peft ties the two again, but looks for both.
    name = parameter_map.table_name("embed", config)
    tensors[f"{PREFIX}lm_head.weight"] = tensors[f"{PREFIX}{name}"]
  settings = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": top[0],
    "lora_alpha": top[1],
    "lora_dropout": lora.dropout,
    "target_parameters": targets or None,
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
    if jax.process_index():  # The first one writes, for all.
      return
    write_json(folder / CONFIG, settings)
    save_tensors(folder / WEIGHTS, tensors)

  replace_folder(Path(path), CONFIG, write)


def _check_layers(
  flat: dict[str, Any], lora: LoraConfig, config: ModelConfig
) -> None:
  """Refuses adapters of one name that are not alike in layers of all kinds."""
  there, seen = {path.rpartition("/")[0] for path in flat}, {}
  for theirs, ours in parameter_map.fused_modules(config):
    shorts = [m.removeprefix("layers/") for m in ours if m in there]
    own = [
      (lora.rank_of(m), lora.alpha_of(m))
      if f"layers/{m}/lora_a" in flat
      else None
      for m in shorts
    ]
    if shorts and seen.setdefault(theirs, own) != own:
      raise ValueError(
        f"save_adapter: {shorts} has (rank, alpha) {own} and the like of it in "
        f"other layers {seen[theirs]}; expected the same, as PEFT has one name "
        "for both. Change lora.targets, or export the merged model."
      )


def _within_layer(theirs: str) -> str:
  """'model.layers.{}.self_attn.q_proj' -> 'self_attn.q_proj'."""
  return theirs.rpartition("{}.")[2]


def _shortest(adapted: list[str], config: ModelConfig) -> list[str]:
  """'q_proj', which other tools know, for 'self_attn.q_proj' where nothing else
  ends so."""
  last = lambda module: module.rpartition(".")[2]
  modules = parameter_map.fused_modules(config)
  others = {last(t) for t, _ in modules if t not in adapted}
  short = lambda t: _within_layer(t) if last(t) in others else last(t)
  return sorted(set(map(short, adapted)))


def _grown(lora: LoraConfig, alpha: float, growth: float) -> float:
  """The alpha that keeps the scale when the rank grows."""
  return alpha * (math.sqrt(growth) if lora.rslora else growth)


def _adapter(
  flat: dict[str, Any], ours: list[str], lora: LoraConfig
) -> tuple[dict[str, np.ndarray], float]:
  """The adapters of our modules as one that gives all their outputs: {'a': [L,
  in, R], 'b': [L, R, out], 'm': [L, out] with DoRA}, and alpha."""
  present = [module for module in ours if f"{module}/lora_a" in flat]
  if lora.dora and present != ours:
    raise ValueError(
      f"save_adapter: DoRA on {present}, which share a module with the rest of "
      f"{ours}; expected all of them. Widen lora.targets, or export the merged "
      "model."
    )
  first = present[0].removeprefix("layers/")
  scale = lora.scale(first)
  parts_a, parts_b, start = [], [], 0
  widths = [_width(flat, module) for module in ours]
  for module, width in zip(ours, widths, strict=True):
    if module in present:
      a, b = _halves(flat, module, lora, scale)
      after = sum(widths) - start - width
      parts_a.append(a)
      parts_b.append(np.pad(b, ((0, 0), (0, 0), (start, after))))
    start += width
  a, b = np.concatenate(parts_a, axis=-1), np.concatenate(parts_b, axis=-2)
  halves = {"a": a, "b": b}
  if lora.dora:
    leaves = [flat[f"{module}/lora_m"] for module in ours]
    halves["m"] = np.concatenate(leaves, axis=-1)
  growth = a.shape[-1] / lora.rank_of(first)
  return halves, _grown(lora, lora.alpha_of(first), growth)


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


def _width(flat: dict[str, Any], module: str) -> int:
  """Output features of a module, whether it is quantized or not."""
  kernel = flat.get(f"{module}/kernel", flat.get(f"{module}/kernel_codes"))
  assert kernel is not None, module
  return kernel.shape[-1]


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
