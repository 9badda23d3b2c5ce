"""Fields of a config.json that are known; every other is refused by name."""

from typing import Any

from sft_jax.models.family import Family, Json, refuse

# Fields that are read for every family.
_USED = {
  *("model_type", "architectures", "vocab_size", "num_hidden_layers"),
  *("hidden_size", "intermediate_size", "num_attention_heads", "head_dim"),
  *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
  *("rope_parameters", "rope_theta", "rope_scaling", "tie_word_embeddings"),
  *("initializer_range", "sliding_window", "layer_types"),
}

# Fields that are read for every family of experts.
_EXPERTS = ("num_local_experts", "num_experts_per_tok")

# Fields that are accepted at these values only; others change the model.
_ONLY: dict[str, tuple[Any, ...]] = {
  "attention_dropout": (0, None),
  "mlp_bias": (False, None),
  "use_sliding_window": (False, None),
  "partial_rotary_factor": (1, None),
  "is_decoder": (True, False, None),
  "is_encoder_decoder": (False, None),
  "add_cross_attention": (False, None),
  "auto_map": (None,),
  "pruned_heads": ({}, None),
}

# Bookkeeping of transformers and of other tools: nothing here changes what
# the network computes.
_HARMLESS = {
  *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"),
  *("decoder_start_token_id", "dtype", "torch_dtype", "use_cache"),
  *("transformers_version", "_name_or_path", "name_or_path", "id2label"),
  *("label2id", "num_labels", "problem_type", "finetuning_task"),
  *("task_specific_params", "tokenizer_class", "prefix", "return_dict"),
  *("output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
  *("_attn_implementation", "_attn_implementation_autoset", "torchscript"),
  *("pretraining_tp", "max_window_layers", "cache_implementation"),
  *("tf_legacy_loss", "use_bfloat16", "_commit_hash", "license"),
  *("unsloth_fixed", "unsloth_version", "_from_model_config"),
  *("cross_attention_hidden_size", "tie_encoder_decoder"),
}


def check_supported(raw: Json, family: Family, where: str) -> None:
  """Refuses what would change the computation and is not implemented."""
  wanted = family.architecture
  if raw.get("architectures") not in (None, [], [wanted]):
    raise refuse(where, "architectures", raw["architectures"], [wanted])
  if raw.get("quantization_config") is not None:
    raise ValueError(
      f"{where}: quantization_config={raw['quantization_config']!r} is not "
      "supported; expected float32, bfloat16 or float16 weights. Load it in "
      "transformers dequantised (gpt_oss: Mxfp4Config(dequantize=True)), save "
      "it, and use that folder without this field."
    )
  read = {
    *family.reads,
    *family.layer_fields,
    *family.rope_fields,
    *family.aliases.values(),
    *([family.local_rope] if family.local_rope else ()),
    *(_EXPERTS if family.experts else ()),
  }
  only = {k: v for k, v in _ONLY.items() if k not in read} | dict(family.only)
  for name, allowed in only.items():
    if name in raw and raw[name] not in allowed:
      raise refuse(where, name, raw[name], f"one of {list(allowed)}")
  # Without windows the field is dead where the switch says so.
  window = None if "use_sliding_window" in raw else raw.get("sliding_window")
  if family.layer_types is None and window is not None:
    raise refuse(where, "sliding_window", window, None)
  known = _USED | _HARMLESS | only.keys() | read | family.harmless
  unknown = {k: v for k, v in raw.items() if k not in known and v is not None}
  if unknown:
    name, value = next(iter(unknown.items()))
    raise ValueError(
      f"{where}: unknown field {name}={value!r}; expected fields known not to "
      "change the model, or implemented here. If it changes nothing, delete "
      "it from the file."
    )
