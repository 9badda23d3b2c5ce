"""What fields of config.json mean, as the table of families refers to them.

Functions take the file, with defaults where it has no value. Values that make
no sense are refused by name.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

Json = dict[str, Any]
# What each of n layers is, from (file, n).
Types = Callable[[Json, int], list[str]]

FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR = "linear_attention"


def words(text: str) -> frozenset[str]:
  return frozenset(text.split())


class Read(NamedTuple):
  """What becomes of a field of config.json."""

  into: tuple[str, ...]  # Fields of ModelConfig.
  # The value's meaning, as a function or a table of accepted values; None: a
  # switch, or a positive number; int: a whole one.
  via: Callable[[Any], Any] | Mapping[Any, Any] | None = None


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def refuse(where: Any, name: str, got: Any, expected: Any) -> ValueError:
  """The error for a field that is not understood."""
  return ValueError(
    f"{where}: {name}={_SHORT.repr(got)} is not supported; expected "
    f"{expected}. Use a model of a supported kind, or add it in "
    "sft_jax/models/."
  )


def positive(where: Any, field: str, value: Any) -> float:
  """A finite number above 0. Raises ValueError: anything else."""
  right = isinstance(value, int | float) and not isinstance(value, bool)
  if not right or not 0 < value < 1e38:  # Also false of NaN.
    raise refuse(where, field, value, "a positive number")
  return float(value)


def whole_number(where: Any, field: str, value: Any, least: int = 1) -> int:
  """A whole number. Raises ValueError: anything else, or one below `least`."""
  if type(value) is not int or value < least:
    raise refuse(where, field, value, f"a whole number from {least} on")
  return value


# -- The types of n layers, from the file ------------------------------------


# Every layer has a window, where the file gives one (Mistral).
everywhere = lambda raw, n: [SLIDING] * n


def _if_used(types: Types) -> Types:
  """Those, where the file says that it uses windows; else none."""
  return lambda raw, n: (
    types(raw, n) if raw.get("use_sliding_window") else [FULL] * n
  )


if_used = _if_used(everywhere)  # Qwen3 MoE.


@_if_used
def from_layer(raw: Json, n: int) -> list[str]:
  """The layers from `max_window_layers` on (Qwen)."""
  return [SLIDING if i >= raw["max_window_layers"] else FULL for i in range(n)]


@_if_used
def without_rope(raw: Json, n: int) -> list[str]:
  """The layers without RoPE (SmolLM3)."""
  used = rope_layers(raw, [FULL] * n, "config")
  return [FULL if use else SLIDING for use in used]


def full_each(field: str, period: int) -> Types:
  """Every period-th layer is full; the file's field may say another."""

  def layer_types(raw: Json, n: int) -> list[str]:
    k = raw.get(field) or period
    return [FULL if (i + 1) % k == 0 else SLIDING for i in range(n)]

  return layer_types


def full_at_the_end(raw: Json, n: int) -> list[str]:
  """Every sixth layer, and the last (Gemma 4)."""
  return [*full_each("", 6)(raw, n)[: n - 1], FULL]


def linear_but_each(raw: Json, n: int) -> list[str]:
  """Every `full_attention_interval`-th layer is full (Qwen3-Next)."""
  field = "full_attention_interval"
  k = whole_number("config.json", field, raw.get(field, 4))
  return [FULL if (i + 1) % k == 0 else LINEAR for i in range(n)]


def olmo_hybrid_types(raw: Json, n: int) -> list[str]:
  """Every fourth layer is full; of fewer the last."""
  return [FULL if i % 4 == 3 or i == n - 1 < 3 else LINEAR for i in range(n)]


def _layer_numbers(raw: Json, field: str) -> list[int]:
  named = [] if raw[field] is None else raw[field]
  if not isinstance(named, list) or any(type(i) is not int for i in named):
    raise refuse("config.json", field, named, "numbers of layers")
  return named


def full_where(field: str, other: str) -> Types:
  """Attention in the layers that the file numbers (LFM2, Bamba)."""

  def layer_types(raw: Json, n: int) -> list[str]:
    if raw.get(field) is None and other == "conv":
      return [FULL] * n
    full = _layer_numbers(raw, field)
    return [FULL if i in full else other for i in range(n)]

  return layer_types


_PATTERN = {"M": LINEAR, "*": FULL, "-": "mlp", "E": "moe"}


def nemotron_types(raw: Json, n: int) -> list[str]:
  """Layers by name, or in older files by a letter each (Nemotron-H)."""
  named = raw.get("layer_types") or raw["layers_block_type"]
  if named is None:
    named = raw.get("hybrid_override_pattern", "ME*-")
    if isinstance(named, str):
      named = [_PATTERN.get(x, x) for x in named]
  if not isinstance(named, list):
    raise refuse("config.json", "layers_block_type", named, "a list of layers")
  return named


# -- Which layers have RoPE --------------------------------------------------


def windowed(raw: Json, types: list[str], where: str) -> list[bool]:
  """Layers with a window have RoPE (Cohere 2)."""
  if SLIDING in types and raw.get("sliding_window") is None:
    raise refuse(where, "sliding_window", None, "a number, for layer_types")
  return [kind == SLIDING for kind in types]


def windowed_if_any(raw: Json, types: list[str], where: str) -> list[bool]:
  """The same, where the file gives a window (EXAONE 4)."""
  if raw.get("sliding_window") is None:
    return [True] * len(types)
  return windowed(raw, types, where)


def all_if_based(raw: Json, types: list[str], where: str) -> list[bool]:
  """All, unless the file says that theta is null (OLMo Hybrid)."""
  rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  return [(raw | rope).get("rope_theta", 0) is not None] * len(types)


def rope_layers(raw: Json, types: list[str], where: str) -> list[bool]:
  """The layers that the file names, or all but every k-th (SmolLM3)."""
  n = len(types)
  given, period = raw.get("no_rope_layers"), raw.get("no_rope_layer_interval")
  if given is None:
    if period is not None and (type(period) is not int or period < 1):
      raise refuse(where, "no_rope_layer_interval", period, "1 or more")
    return [not period or (i + 1) % period != 0 for i in range(n)]
  if not isinstance(given, list) or len(given) != n:
    raise refuse(where, "no_rope_layers", given, f"{n} values")
  if any(x not in (0, 1) for x in given):
    raise refuse(where, "no_rope_layers", given, "0 or 1 for each layer")
  return [bool(x) for x in given]


# -- Which layers have an MLP in place of experts ----------------------------


def layers_without_experts(raw: Json, n: int, where: str) -> list[bool]:
  """The layers named, and those between every `decoder_sparse_step`-th."""
  named = _layer_numbers(raw, "mlp_only_layers")
  step = raw["decoder_sparse_step"]
  if type(step) is not int or step < 1:
    raise refuse(where, "decoder_sparse_step", step, "1 or more")
  return [i in named or (i + 1) % step != 0 for i in range(n)]


def first(field: str) -> Callable[[Json, int, str], list[bool]]:
  """So many layers as the field says (DeepSeek, GLM, LFM2)."""

  def dense(raw: Json, n: int, where: str) -> list[bool]:
    count = _number(raw, where, field, 0)
    return [i < count for i in range(n)]

  return dense


def dense_types(raw: Json, n: int, where: str) -> list[bool]:
  """The layers that the file says, or the first (GLM 4.7 Flash)."""
  types = raw["mlp_layer_types"] or ["dense"] + ["sparse"] * (n - 1)
  known = isinstance(types, list) and len(types) == n
  if not known or any(kind not in ("dense", "sparse") for kind in types):
    raise refuse(where, "mlp_layer_types", types, f"{n} of dense, sparse")
  return [kind == "dense" for kind in types]


def outside_interval(raw: Json, n: int, where: str) -> list[bool]:
  """All but every so-many-th between two layers (ERNIE 4.5)."""
  start = _number(raw, where, "moe_layer_start_index", 0)
  end = _number(raw, where, "moe_layer_end_index", -1)
  step = _number(raw, where, "moe_layer_interval")
  end = n - 1 if end == -1 else end
  return [not start <= i <= end or (i + 1) % step != 0 for i in range(n)]


# -- Fields of ModelConfig that follow from several --------------------------


def _number(raw: Json, where: str, field: str, least: int = 1) -> int:
  return whole_number(where, field, raw[field], least)


def experts(raw: Json, where: str, total: str, each: str) -> Json:
  """How many experts there are, and a token's; fields `total` and `each`."""
  E, k = _number(raw, where, total), _number(raw, where, each)
  if k > E:
    raise refuse(where, each, k, f"at most {E}")
  return {"num_experts": E, "experts_per_token": k}


def tied(raw: Json, where: str) -> Json:
  """An old name."""
  tied = raw.get("tie_embedding", raw["tie_word_embeddings"])
  return {"tie_embeddings": tied}


def lfm2(raw: Json, where: str) -> Json:
  """Old names, and the width of the MLP, which files give in parts."""
  old = raw.get("block_ff_dim") is not None
  name = "block_ff_dim" if old else "intermediate_size"
  width, adjust = _number(raw, where, name), "block_auto_adjust_ff_dim"
  if not isinstance(raw[adjust], bool):
    raise refuse(where, adjust, raw[adjust], "true or false")
  positive(where, name, width)
  if raw[adjust]:
    width, factor = int(2 * width / 3), raw["block_ffn_dim_multiplier"]
    if factor is not None:
      factor = positive(where, "block_ffn_dim_multiplier", factor)
      step = _number(raw, where, "block_multiple_of")
      width = step * -(-int(factor * width) // step)
  return tied(raw, where) | {"d_ff": width}


def shared_expert(raw: Json, where: str) -> Json:
  """An expert for every token, of a width of its own (Qwen)."""
  field = "shared_expert_intermediate_size"
  return {"d_ff_shared": _number(raw, where, field)}


def olmo_hybrid(raw: Json, where: str) -> Json:
  """Heads and their widths, which follow from others where files lack them."""

  def read(name: str, usual: int) -> int:
    field = f"linear_{name}"
    value = usual if raw[field] is None else raw[field]
    return whole_number(where, field, value)

  heads = raw["num_attention_heads"]
  groups, N = read("num_key_heads", heads), read("num_value_heads", heads)
  state = read("key_head_dim", 3 * raw["hidden_size"] // (4 * groups))
  width = read("value_head_dim", 2 * state)
  return {
    **{"mixer_groups": groups, "mixer_heads": N},
    **{"mixer_state": state, "mixer_width": width},
  }


def _check_unlimited(raw: Json, where: str) -> None:
  """Files write infinity as other programs do, or as transformers 5."""
  limit = raw["time_step_limit"]
  if limit not in (None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}]):
    raise refuse(where, "time_step_limit", limit, [0.0, math.inf])


def mamba(raw: Json, where: str) -> Json:
  """The width of a head, which follows from others."""
  expand = _number(raw, where, "mamba_expand")
  width = expand * raw["hidden_size"] // _number(raw, where, "mamba_n_heads")
  if raw["mamba_d_head"] not in ("auto", width):
    raise refuse(where, "mamba_d_head", raw["mamba_d_head"], width)
  _check_unlimited(raw, where)
  return {"mixer_width": width}


def nemotron(raw: Json, where: str) -> Json:
  """The sizes of experts, where a layer has them, and of an MLP beside."""
  _check_unlimited(raw, where)
  for old, new in _NEMOTRON_OLD.items():
    if raw.get(old) not in (None, raw[new]):
      raise refuse(where, old, raw[old], f"the value of {new}")
  fields: Json = {"tie_embeddings": False}  # The reference ties none.
  if "moe" not in nemotron_types(raw, 0):
    return fields
  if raw["mlp_bias"]:
    raise refuse(where, "mlp_bias", raw["mlp_bias"], "false, beside experts")
  grouped(raw, where)
  widths = {
    **{"d_ff_dense": "intermediate_size", "d_ff": "moe_intermediate_size"},
    "d_ff_shared": "moe_shared_expert_intermediate_size",
  }
  fields |= {k: _number(raw, where, f) for k, f in widths.items()}
  fields["experts_per_token"] = raw["num_experts_per_tok"]
  return fields | {"num_experts": raw["n_routed_experts"]}


def granite_hybrid(raw: Json, where: str) -> Json:
  """A shared MLP, alone or beside experts."""
  width = _number(raw, where, "shared_intermediate_size")
  if not raw["num_local_experts"]:
    return mamba(raw, where) | {"d_ff": width}
  found = experts(raw, where, "num_local_experts", "num_experts_per_tok")
  return mamba(raw, where) | found | {"d_ff_shared": width}


def gemma4(raw: Json, where: str) -> Json:
  """Heads of full layers, as published or as transformers 5 writes them; what
  layers share, read beside the residual, and have beside their MLP."""

  number = partial(_number, raw, where)
  n, field = number("num_hidden_layers"), "num_kv_shared_layers"
  types = raw["layer_types"] or full_at_the_end(raw, min(n, 10_000))
  if not isinstance(types, list) or types[-1] != FULL:
    raise refuse(where, "layer_types", types, f"{FULL} of the last")
  own = n - number(field, 0)
  if own < 1 or any(kind not in types[:own] for kind in types):
    expected = "layers that come after one of each type"
    raise refuse(where, field, raw[field], expected)
  for field, right, expected in (
    ("rope_theta", (None,), "rope_parameters of each type"),
    ("rope_scaling", (None,), "rope_parameters of each type"),
    ("use_bidirectional_attention", (None, "vision"), "null or 'vision'"),
  ):
    if raw.get(field) not in right:
      raise refuse(where, field, raw[field], expected)
  heads = raw["num_key_value_heads"]
  global_heads = raw.get("num_global_key_value_heads")
  if not raw["attention_k_eq_v"] or global_heads is None:
    global_heads = heads
  wide = {"head_dim": raw.get("global_head_dim", 512)}
  wide["num_key_value_heads"] = global_heads
  if (by_layer := raw.get("per_layer_config")) is not None:
    full = {str(i) for i, kind in enumerate(types) if kind == FULL}
    # Empty where heads are alike.
    known = isinstance(by_layer, Mapping) and by_layer.keys() in (full, set())
    first = by_layer.get(min(full), {}) if known else None
    same = known and all(x == first for x in by_layer.values())
    if not same or not isinstance(first, Mapping) or first.keys() - wide.keys():
      expected = f"one {' and '.join(wide)} of all full layers"
      raise refuse(where, "per_layer_config", by_layer, expected)
    wide = {field: raw[field] for field in wide} | dict(first)
  H = whole_number(where, "global_head_dim", wide["head_dim"])
  K = wide["num_key_value_heads"]
  whole_number(where, "num_global_key_value_heads", K)
  if H % 2:
    raise refuse(where, "global_head_dim", H, "an even number, for RoPE")
  if raw["num_attention_heads"] % K:
    expected = f"a divisor of num_attention_heads={raw['num_attention_heads']}"
    raise refuse(where, "num_global_key_value_heads", K, expected)
  fields = {"global_head_dim": H, "global_kv_heads": K}
  if beside := number("hidden_size_per_layer_input", 0):
    rows = number("vocab_size_per_layer_input", number("vocab_size"))
    fields |= {"per_layer_dim": beside, "per_layer_vocab": rows}
  if raw["enable_moe_block"]:
    fields |= experts(raw, where, "num_experts", "top_k_experts")
    fields |= {"d_ff_dense": number("intermediate_size")}
    fields |= {"d_ff": number("moe_intermediate_size")}
  return fields


def shared(raw: Json, where: str, field: str = "n_shared_experts") -> Json:
  """The experts that every token passes, as one MLP."""
  one = _number(raw, where, "moe_intermediate_size")
  count = _number(raw, where, field, 0)
  if not count and field == "n_shared_experts":
    raise refuse(where, field, count, "1 or more")
  return {"d_ff_shared": one * count}


def grouped(raw: Json, where: str) -> Json:
  """Experts of few groups: whether there are as many as a token needs."""
  fields = ("n_group", "topk_group", "n_routed_experts", "num_experts_per_tok")
  groups, top, experts, k = (_number(raw, where, f) for f in fields)
  each = experts // groups
  fits = experts % groups == 0 and top <= groups and k <= each * top
  if not fits or (groups > 1 and each < 2):
    expected = "groups that hold as many experts as a token has"
    raise refuse(where, "n_group, topk_group", (groups, top), expected)
  return shared(raw, where)


def latent(raw: Json, where: str) -> Json:
  """The widths of latent attention."""
  fields = ("qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank")
  plain, turned, rank = (_number(raw, where, field) for field in fields)
  v = _number(raw, where, "v_head_dim")
  q_rank = raw["q_lora_rank"]
  if q_rank is not None:
    _number(raw, where, "q_lora_rank")
  return {
    **{"head_dim": plain + turned, "rope_dim": turned, "v_dim": v},
    **{"kv_rank": rank, "q_rank": q_rank or 0},
  }


def deepseek_v2(raw: Json, where: str) -> Json:
  """Groups count where the method looks at them."""
  method = raw["topk_method"]
  if method == "greedy":
    return latent(raw, where) | shared(raw, where)
  if method != "group_limited_greedy":
    expected = "greedy or group_limited_greedy"
    raise refuse(where, "topk_method", method, expected)
  fields = latent(raw, where) | grouped(raw, where) | {"router_best": 1}
  groups = {"router_groups": raw["n_group"]}
  return fields | groups | {"router_top_groups": raw["topk_group"]}


# -- What fields of config.json become ---------------------------------------

ACTIVATIONS = {
  "silu": "silu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "xielu": "xielu",
  "relu2": "relu2",
}
# Of every family whose configuration class has the field.
READS: dict[str, Read] = {
  "hidden_act": Read(("activation",), ACTIVATIONS),
  "hidden_activation": Read(("activation",), ACTIVATIONS),
  "activation_function": Read(("activation",), ACTIVATIONS),
  "attention_bias": Read(("qkv_bias", "o_bias")),
  "mlp_bias": Read(("mlp_bias",)),
  "query_pre_attn_scalar": Read(("attn_scale",), lambda x: x**-0.5),
  "attn_logit_softcapping": Read(("attn_softcap",)),
  "final_logit_softcapping": Read(("logit_softcap",)),
  "embedding_multiplier": Read(("embed_scale",)),
  "attention_multiplier": Read(("attn_scale",)),
  "residual_multiplier": Read(("residual_scale",)),
  "logits_scaling": Read(("logit_divisor",)),
  "norm_topk_prob": Read(("norm_topk",)),
  "conv_bias": Read(("conv_bias", "mixer_bias")),
  "conv_L_cache": Read(("conv_width",), int),
  "linear_conv_kernel_dim": Read(("conv_width",), int),
  "linear_num_key_heads": Read(("mixer_groups",), int),
  "linear_num_value_heads": Read(("mixer_heads",), int),
  "linear_key_head_dim": Read(("mixer_state",), int),
  "linear_value_head_dim": Read(("mixer_width",), int),
  "mamba_d_conv": Read(("conv_width",), int),
  "mamba_n_groups": Read(("mixer_groups",), int),
  "mamba_n_heads": Read(("mixer_heads",), int),
  "mamba_d_state": Read(("mixer_state",), int),
  "mamba_conv_bias": Read(("conv_bias",)),
  "mamba_proj_bias": Read(("mixer_bias",)),
  "swiglu_alpha": Read(("glu_alpha",)),
  "swiglu_limit": Read(("glu_limit",)),
  "routed_scaling_factor": Read(("router_scale",)),
}
GROUPS = {
  "n_group": Read(("router_groups",), int),
  "topk_group": Read(("router_top_groups",), int),
}
ROUTED = {
  "num_local_experts": "n_routed_experts",
  "intermediate_size": "moe_intermediate_size",
}
CORRECTED: Json = {"router_sigmoid": True, "router_correction": 1}
# What `derived` and `dense` read, and layers that predict further tokens, which
# a checkpoint may hold and no one here runs.
DERIVED = words("""intermediate_size n_shared_experts num_experts topk_method
  n_group topk_group num_mtp_layers num_nextn_predict_layers""")
LATENT_FIELDS = words("""qk_nope_head_dim qk_rope_head_dim qk_head_dim head_dim
  kv_lora_rank q_lora_rank v_head_dim""")
QWEN_HYBRID: Json = {
  **{"qk_norm": "head", "norm_offset": 1.0, "attn_gate": True}
}
# Read where the file does not name its layers.
INTERVAL = words("full_attention_interval")
# Those that `mamba` reads, and of a kernel.
MAMBA = words("mamba_d_head mamba_expand time_step_limit mamba_chunk_size")
GEMMA4 = words("""global_head_dim num_global_key_value_heads per_layer_config
  hidden_size_per_layer_input vocab_size_per_layer_input num_kv_shared_layers
  use_bidirectional_attention num_experts top_k_experts
  moe_intermediate_size""")
# Older names, by which the reference still reads them.
_NEMOTRON_OLD = {
  **{"mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel"},
  **{"mamba_conv_bias": "use_conv_bias", "mamba_dt_min": "time_step_min"},
}
# What `nemotron` and `nemotron_types` read; of a kernel, of fresh weights, of
# generation, of layers that predict further tokens; what the reference does not
# read.
NEMOTRON = frozenset(_NEMOTRON_OLD) | words("""layers_block_type
  hybrid_override_pattern time_step_limit n_routed_experts num_experts_per_tok
  moe_intermediate_size moe_shared_expert_intermediate_size n_shared_experts
  expand chunk_size use_mamba_kernels mamba_ssm_cache_dtype time_step_max
  time_step_floor rescale_prenorm_residual num_logits_to_keep
  moe_shared_expert_overlap num_nextn_predict_layers mtp_layers_block_type
  mtp_hybrid_override_pattern""")
MHA = {"num_key_value_heads": lambda raw: raw["num_attention_heads"]}
GEMMA: Json = {"norm_offset": 1.0, "scale_embeddings": True}
