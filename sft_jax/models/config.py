"""ModelConfig: a model's sizes and switches, read from its `config.json`.

A family is a set of fields, not a folder of code. Whatever this file does
not understand is refused by name: a field that is ignored is a model that is
silently another model.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary embedding: its base and how it is stretched to longer contexts.

  Attributes:
    theta: the base of the frequencies.
    type: 'default', 'linear' or 'llama3'.
    factor: how much longer than the original context (linear, llama3).
    low_freq_factor: llama3 only.
    high_freq_factor: llama3 only.
    original_max_positions: llama3 only; the context before stretching.
  """

  theta: float
  type: str = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 1.0
  original_max_positions: int = 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One decoder-only transformer.

  Attributes:
    family: `model_type` of the config.
    vocab_size: V, rows of the embedding.
    num_layers: L.
    d_model: D, width of the residual stream.
    d_ff: F, width of the gated MLP.
    num_heads: N query heads.
    num_kv_heads: K key/value heads; N is a multiple of K.
    head_dim: H; N * H need not be D.
    max_positions: the context the model was made for, in tokens.
    norm_eps: added to the mean square in RMSNorm.
    rope: rotary embedding.
    tie_embeddings: the unembedding is the embedding.
    qkv_bias: q, k and v projections have a bias.
    o_bias: the attention's output projection has a bias.
    qk_norm: RMSNorm over H of q and k before the rotary embedding.
    init_std: standard deviation of fresh weights.
    raw: the config.json it came from, for a faithful export.
  """

  family: str
  vocab_size: int
  num_layers: int
  d_model: int
  d_ff: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_positions: int
  norm_eps: float
  rope: Rope
  tie_embeddings: bool
  qkv_bias: bool
  o_bias: bool
  qk_norm: bool
  init_std: float
  raw: Json = dataclasses.field(compare=False, repr=False)


def read_config(folder: str | Path) -> ModelConfig:
  """Reads `config.json` of a model folder. Raises ValueError; see parse."""
  path = Path(folder) / "config.json"
  if not path.is_file():
    raise ValueError(
      f"{folder}: no config.json; expected a Hugging Face model folder. "
      "Check the path."
    )
  try:
    raw = json.loads(path.read_text(encoding="utf-8"))
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{path}: not JSON ({error}); expected a model's config. "
      "Download the file again."
    ) from error
  if not isinstance(raw, dict):
    raise _refuse(path, "top level", type(raw).__name__, "a JSON object")
  return parse_config(raw, where=str(path))


def parse_config(raw: Json, *, where: str = "config.json") -> ModelConfig:
  """Turns the dict of a `config.json` into a ModelConfig.

  Reads the form of transformers 5 (`rope_parameters`, `dtype`) and the older
  one (`rope_theta`, `rope_scaling`, `torch_dtype`).

  Raises:
    ValueError: a missing field, an architecture or a value that is not
      implemented, or a field that is unknown; the message names it.
  """
  family = raw.get("model_type")
  if family not in _FAMILIES:
    raise _refuse(where, "model_type", family, f"one of {sorted(_FAMILIES)}")
  traits = _FAMILIES[family]
  _check_supported(raw, traits, where)

  def need(name: str) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise _refuse(where, name, value, "a positive integer")
    return value

  d_model, num_heads = need("hidden_size"), need("num_attention_heads")
  if raw.get("head_dim") is not None:
    head_dim = need("head_dim")
  elif family == "qwen3" or d_model % num_heads:
    raise _refuse(where, "head_dim", None, "a positive integer")
  else:
    head_dim = d_model // num_heads
  if head_dim % 2:
    raise _refuse(where, "head_dim", head_dim, "an even number, for RoPE")
  if family == "llama" and raw.get("num_key_value_heads") is None:
    num_kv_heads = num_heads
  else:
    num_kv_heads = need("num_key_value_heads")
  if num_heads % num_kv_heads:
    raise _refuse(
      where,
      "num_key_value_heads",
      num_kv_heads,
      f"a divisor of num_attention_heads={num_heads}",
    )
  attention_bias = bool(raw.get("attention_bias", False))
  return ModelConfig(
    family=family,
    vocab_size=need("vocab_size"),
    num_layers=need("num_hidden_layers"),
    d_model=d_model,
    d_ff=need("intermediate_size"),
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    max_positions=need("max_position_embeddings"),
    norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
    rope=_parse_rope(raw, where),
    tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
    qkv_bias=family == "qwen2" or attention_bias,
    o_bias=attention_bias,
    qk_norm=family == "qwen3",
    init_std=float(raw.get("initializer_range", 0.02)),
    raw=dict(raw),
  )


def config_from_fields(
  family: str,
  *,
  vocab_size: int,
  num_layers: int,
  d_model: int,
  d_ff: int,
  num_heads: int,
  num_kv_heads: int,
  head_dim: int,
  max_positions: int,
  rope_theta: float = 10_000.0,
  tie_embeddings: bool = True,
  init_std: float | None = None,
  bos_token_id: int | None = None,
  eos_token_id: int | list[int] | None = None,
) -> ModelConfig:
  """A config for a model that starts from random weights.

  `init_std` defaults to sqrt(2 / 5D), the "small init" of Nguyen and Salazar
  (2019, "Transformers without Tears"): 0.02 at D = 1024, more when narrower.
  """
  if family not in _FAMILIES:
    raise _refuse("config", "family", family, f"one of {sorted(_FAMILIES)}")
  raw: Json = {
    "architectures": [_FAMILIES[family]["architecture"]],
    "model_type": family,
    "vocab_size": vocab_size,
    "num_hidden_layers": num_layers,
    "hidden_size": d_model,
    "intermediate_size": d_ff,
    "num_attention_heads": num_heads,
    "num_key_value_heads": num_kv_heads,
    "head_dim": head_dim,
    "hidden_act": "silu",
    "max_position_embeddings": max_positions,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
    "tie_word_embeddings": tie_embeddings,
    "initializer_range": init_std or math.sqrt(2 / (5 * d_model)),
    "bos_token_id": bos_token_id,
    "eos_token_id": eos_token_id,
    "dtype": "float32",
  }
  return parse_config(raw)


_FAMILIES: dict[str, Json] = {
  "llama": {"architecture": "LlamaForCausalLM", "fields": {"attention_bias"}},
  "qwen2": {"architecture": "Qwen2ForCausalLM", "fields": set()},
  "qwen3": {"architecture": "Qwen3ForCausalLM", "fields": {"attention_bias"}},
}

_USED = {
  *("model_type", "architectures", "vocab_size", "num_hidden_layers"),
  *("hidden_size", "intermediate_size", "num_attention_heads", "head_dim"),
  *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
  *("rope_parameters", "rope_theta", "rope_scaling", "tie_word_embeddings"),
  "initializer_range",
}

# Fields that are accepted at these values only; others change the model.
_ONLY: dict[str, tuple[Any, ...]] = {
  "hidden_act": ("silu",),
  "attention_dropout": (0, None),
  "mlp_bias": (False, None),
  "use_sliding_window": (False, None),
  "partial_rotary_factor": (1, None),
  "is_decoder": (True, False, None),
  "is_encoder_decoder": (False, None),
  "add_cross_attention": (False, None),
  "quantization_config": (None,),
  "auto_map": (None,),
  "pruned_heads": ({}, None),
}

# Bookkeeping of transformers and of other tools: nothing here changes what
# the network computes. (`sliding_window` is dead unless `use_sliding_window`;
# where that switch does not exist it is checked by `_check_supported`.)
_HARMLESS = {
  *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"),
  *("decoder_start_token_id", "dtype", "torch_dtype", "use_cache"),
  *("transformers_version", "_name_or_path", "name_or_path", "id2label"),
  *("label2id", "num_labels", "problem_type", "finetuning_task"),
  *("task_specific_params", "tokenizer_class", "prefix", "return_dict"),
  *("output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
  *("_attn_implementation", "_attn_implementation_autoset", "torchscript"),
  *("pretraining_tp", "max_window_layers", "sliding_window", "layer_types"),
  *("tf_legacy_loss", "use_bfloat16", "_commit_hash", "license"),
  *("unsloth_fixed", "unsloth_version", "_from_model_config"),
  *("cross_attention_hidden_size", "tie_encoder_decoder"),
}


def _check_supported(raw: Json, traits: Json, where: str) -> None:
  """Refuses what would change the computation and is not implemented."""
  wanted = traits["architecture"]
  if raw.get("architectures") not in (None, [], [wanted]):
    raise _refuse(where, "architectures", raw["architectures"], [wanted])
  for name, allowed in _ONLY.items():
    if name in raw and raw[name] not in allowed:
      raise _refuse(where, name, raw[name], f"one of {list(allowed)}")
  if "use_sliding_window" not in raw and raw.get("sliding_window") is not None:
    raise _refuse(where, "sliding_window", raw["sliding_window"], None)
  for kind in raw.get("layer_types") or []:
    if kind != "full_attention":
      raise _refuse(where, "layer_types", kind, "'full_attention' throughout")
  known = _USED | _HARMLESS | _ONLY.keys() | traits["fields"]
  unknown = {k: v for k, v in raw.items() if k not in known and v is not None}
  if unknown:
    name, value = next(iter(unknown.items()))
    raise ValueError(
      f"{where}: unknown field {name}={value!r}; expected fields known not to "
      "change the model, or implemented here. If it changes nothing, delete "
      "it from the file."
    )


def _parse_rope(raw: Json, where: str) -> Rope:
  """Reads either form of the rotary fields; both must agree if both exist."""
  new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
  theta = raw.get("rope_theta")
  found = []
  if new is not None:
    found.append(_one_rope(new, "rope_parameters", theta, where))
  if old is not None:
    found.append(_one_rope(old, "rope_scaling", theta, where))
  if not found:
    found.append(Rope(theta=float(10_000.0 if theta is None else theta)))
  if theta is not None and found[0].theta != theta:
    raise _refuse(where, "rope_theta", theta, f"{found[0].theta}, as in rope_*")
  if found[0] != found[-1]:
    raise _refuse(where, "rope_scaling", old, "the same as rope_parameters")
  return found[0]


def _one_rope(rope: Any, name: str, theta: Any, where: str) -> Rope:
  if not isinstance(rope, Mapping):
    raise _refuse(where, name, rope, "an object")
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in _ROPE_FIELDS:
    raise _refuse(
      where, f"{name}.rope_type", kind, f"one of {sorted(_ROPE_FIELDS)}"
    )
  if rope.get("partial_rotary_factor", 1) != 1:
    value = rope["partial_rotary_factor"]
    raise _refuse(where, f"{name}.partial_rotary_factor", value, 1)
  ours = {}
  for field, theirs in _ROPE_FIELDS[kind].items():
    value = rope.get(theirs)
    if not isinstance(value, int | float) or value <= 0:
      raise _refuse(where, f"{name}.{theirs}", value, "a positive number")
    ours[field] = value
  base = rope.get("rope_theta", 10_000.0 if theta is None else theta)
  return Rope(theta=float(base), type=kind, **ours)


_ROPE_FIELDS: dict[str, dict[str, str]] = {
  "default": {},
  "linear": {"factor": "factor"},
  "llama3": {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
  },
}


def _refuse(where: Any, name: str, got: Any, expected: Any) -> ValueError:
  return ValueError(
    f"{where}: {name}={got!r} is not supported; expected {expected}. "
    "Use a model of a supported kind, or add it in sft_jax/models/."
  )
