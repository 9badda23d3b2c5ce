"""The table of families: what each fixes, reads and calls its tensors.

A family is data. `config` turns a `config.json` into a ModelConfig by it, and
`hf.parameter_map` maps parameters to tensors by it; neither knows a family by
name. How to add one: docs/models.md.
"""

import dataclasses
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Json = dict[str, Any]

FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR = "linear_attention"


class Read(NamedTuple):
  """What becomes of a field of config.json.

  Attributes:
    into: fields of ModelConfig.
    via: the value's meaning, as a function or a table of accepted values;
      None: a switch, or a positive number; int: a whole one.
  """

  into: tuple[str, ...]
  via: Callable[[Any], Any] | Mapping[Any, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Family:
  """One `model_type`.

  Attributes:
    architecture: the class that `architectures` must name.
    names: module of ours: module of theirs, `{}` standing for the layer. Ours
      that share one of theirs are in it side by side, in this order. A leaf
      that is elsewhere than its module is named itself.
    traits: fields of ModelConfig that every model of the family has.
    reads: fields read otherwise than by `READS`; None: accepted at their
      default alone.
    defaults: common fields that transformers computes where they are missing,
      as functions of the file; and thetas of RoPE.
    aliases: common fields that the family spells in its own way.
    harmless: fields that change nothing here.
    layer_types: SLIDING or FULL for each of n layers, from (file, n), or a
      name of `mixers`.
    rotated: which layers have RoPE, from (file, their types, where).
    mixers: the mixer of other types of layer, see `LayerKind`.
    dense: which of n layers have an MLP in place of experts, from (file, n,
      where).
    derived: fields of ModelConfig that follow from several of the file, from
      (file, where).
    rope_fields: rotary fields beyond those of the rope's type.
    rope: the rotary fields of a file that has none.
    local_rope: sliding layers have a rotary embedding of their own, whose
      theta is this field in older files.
    conv1d: kernels are [in, out] in the file.
    experts: layers have a router and experts in place of an MLP.
    stacked_experts: all experts of a layer are in one tensor [E, in, out],
      and columns of gate and up take turns.
    buffers: endings of tensors that old files hold and that follow from the
      config; they are not read.
  """

  architecture: str
  names: Mapping[str, str]
  traits: Json = dataclasses.field(default_factory=dict)
  reads: Mapping[str, Read | None] = dataclasses.field(default_factory=dict)
  defaults: Json = dataclasses.field(default_factory=dict)
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  harmless: frozenset[str] = frozenset()
  layer_types: Callable[[Json, int], list[str]] | None = None
  rotated: Callable[[Json, list[str], str], list[bool]] | None = None
  mixers: Mapping[str, str] = dataclasses.field(default_factory=dict)
  dense: Callable[[Json, int, str], list[bool]] | None = None
  derived: Callable[[Json, str], Json] | None = None
  rope_fields: frozenset[str] = frozenset()
  rope: Json = dataclasses.field(default_factory=dict)
  local_rope: str | None = None
  conv1d: bool = False
  experts: bool = False
  stacked_experts: bool = False
  buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)

  @property
  def latent(self) -> bool:
    """Attention reads keys and values from a latent vector."""
    return "layers/attn/kv_up" in self.names


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


# -- Windows: SLIDING or FULL for each of n layers, from the file --------


def _everywhere(raw: Json, n: int) -> list[str]:
  """Every layer, where the file gives a window (Mistral)."""
  return [SLIDING] * n


def _if_used(raw: Json, n: int) -> list[str]:
  """Every layer, where the file says so (Qwen3 MoE)."""
  return [SLIDING if raw.get("use_sliding_window") else FULL] * n


def _full_each(field: str, period: int) -> Callable[[Json, int], list[str]]:
  """Every period-th layer is full; the file's field may say another."""

  def layer_types(raw: Json, n: int) -> list[str]:
    k = raw.get(field) or period
    return [FULL if (i + 1) % k == 0 else SLIDING for i in range(n)]

  return layer_types


def _from_layer(raw: Json, n: int) -> list[str]:
  """The layers from `max_window_layers` on (Qwen)."""
  if not raw.get("use_sliding_window"):
    return [FULL] * n
  first = raw["max_window_layers"]
  return [SLIDING if i >= first else FULL for i in range(n)]


def _without_rope(raw: Json, n: int) -> list[str]:
  """The layers without RoPE, if the file says so (SmolLM3)."""
  if not raw.get("use_sliding_window"):
    return [FULL] * n
  used = _rope_layers(raw, [FULL] * n, "config")
  return [FULL if use else SLIDING for use in used]


def _windowed(raw: Json, types: list[str], where: str) -> list[bool]:
  """Layers with a window have RoPE (Cohere 2)."""
  if SLIDING in types and raw.get("sliding_window") is None:
    raise refuse(where, "sliding_window", None, "a number, for layer_types")
  return [kind == SLIDING for kind in types]


def _windowed_if_any(raw: Json, types: list[str], where: str) -> list[bool]:
  """The same, where the file gives a window (EXAONE 4)."""
  if raw.get("sliding_window") is None:
    return [True] * len(types)
  return _windowed(raw, types, where)


def _all_if_named(raw: Json, types: list[str], where: str) -> list[bool]:
  """All, where the file says 'rope' (Granite 4.0)."""
  return [raw["position_embedding_type"] == "rope"] * len(types)


def _rope_layers(raw: Json, types: list[str], where: str) -> list[bool]:
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


def _lfm2_types(raw: Json, n: int) -> list[str]:
  """A convolution where the file does not name the layer."""
  full = raw.get("full_attn_idxs")
  if full is None:
    return [FULL] * n
  if not isinstance(full, list) or any(type(i) is not int for i in full):
    raise refuse("config.json", "full_attn_idxs", full, "numbers of layers")
  return [FULL if i in full else "conv" for i in range(n)]


def _lfm2(raw: Json, where: str) -> Json:
  """Old names, and the width of the MLP, which files give in parts."""
  name = (
    "intermediate_size" if raw.get("block_ff_dim") is None else "block_ff_dim"
  )
  width, adjust = (
    whole_number(where, name, raw[name]),
    "block_auto_adjust_ff_dim",
  )
  if not isinstance(raw[adjust], bool):
    raise refuse(where, adjust, raw[adjust], "true or false")
  positive(where, name, width)
  if raw[adjust]:
    width, factor = int(2 * width / 3), raw["block_ffn_dim_multiplier"]
    if factor is not None:
      factor = positive(where, "block_ffn_dim_multiplier", factor)
      step = whole_number(where, "block_multiple_of", raw["block_multiple_of"])
      width = step * -(-int(factor * width) // step)
  return _tied(raw, where) | {"d_ff": width}


def _linear_but_each(raw: Json, n: int) -> list[str]:
  """Every `full_attention_interval`-th layer is full (Qwen3-Next)."""
  field = "full_attention_interval"
  k = whole_number("config.json", field, raw.get(field, 4))
  return [FULL if (i + 1) % k == 0 else LINEAR for i in range(n)]


def _shared_expert(raw: Json, where: str) -> Json:
  """An expert for every token, of a width of its own (Qwen)."""
  field = "shared_expert_intermediate_size"
  return {"d_ff_shared": whole_number(where, field, raw[field])}


def _first_dense(raw: Json, n: int, where: str) -> list[bool]:
  """The first `num_dense_layers` (LFM2)."""
  first = whole_number(where, "num_dense_layers", raw["num_dense_layers"], 0)
  return [i < first for i in range(n)]


def _tied(raw: Json, where: str) -> Json:
  """An old name."""
  tied = raw.get("tie_embedding", raw["tie_word_embeddings"])
  return {"tie_embeddings": tied}


# As files write it: as other programs do, and as transformers 5.
_INFINITE = (math.inf, {"__float__": "Infinity"})


def _granite_hybrid(raw: Json, where: str) -> Json:
  """Widths that follow from others; what counts is the shared MLP's."""
  expand = whole_number(where, "mamba_expand", raw["mamba_expand"])
  heads = whole_number(where, "mamba_n_heads", raw["mamba_n_heads"])
  width = expand * raw["hidden_size"] // heads
  if raw["mamba_d_head"] not in ("auto", width):
    raise refuse(where, "mamba_d_head", raw["mamba_d_head"], width)
  if experts := raw["num_local_experts"]:
    expected = "0, a shared MLP alone"
    raise refuse(where, "num_local_experts", experts, expected)
  limit = raw["time_step_limit"]
  if limit not in (None, *([0.0, x] for x in _INFINITE)):
    raise refuse(where, "time_step_limit", limit, [0.0, math.inf])
  field = "shared_intermediate_size"
  d_ff = whole_number(where, field, raw[field])
  return {"mixer_width": width, "d_ff": d_ff}


def layers_without_experts(raw: Json, n: int, where: str) -> list[bool]:
  """The layers named, and those between every `decoder_sparse_step`-th."""
  named, step = raw["mlp_only_layers"] or [], raw["decoder_sparse_step"]
  if type(step) is not int or step < 1:
    raise refuse(where, "decoder_sparse_step", step, "1 or more")
  if not isinstance(named, list) or any(type(i) is not int for i in named):
    raise refuse(where, "mlp_only_layers", named, "numbers of layers")
  return [i in named or (i + 1) % step != 0 for i in range(n)]


def _first_layers(raw: Json, n: int, where: str) -> list[bool]:
  """The first `first_k_dense_replace` layers (DeepSeek, GLM)."""
  field = "first_k_dense_replace"
  first = whole_number(where, field, raw[field], least=0)
  return [i < first for i in range(n)]


def _dense_types(raw: Json, n: int, where: str) -> list[bool]:
  """The layers that the file says, or the first (GLM 4.7 Flash)."""
  types = raw["mlp_layer_types"] or ["dense"] + ["sparse"] * (n - 1)
  known = isinstance(types, list) and len(types) == n
  if not known or any(kind not in ("dense", "sparse") for kind in types):
    raise refuse(where, "mlp_layer_types", types, f"{n} of dense, sparse")
  return [kind == "dense" for kind in types]


def _outside_interval(raw: Json, n: int, where: str) -> list[bool]:
  """All but every so-many-th between two layers (ERNIE 4.5)."""
  start, end, step = (
    raw[f"moe_layer_{name}"]
    for name in ("start_index", "end_index", "interval")
  )
  whole_number(where, "moe_layer_start_index", start, least=0)
  whole_number(where, "moe_layer_end_index", end, least=-1)
  whole_number(where, "moe_layer_interval", step)
  end = n - 1 if end == -1 else end
  return [not start <= i <= end or (i + 1) % step != 0 for i in range(n)]


def _shared(raw: Json, where: str, field: str = "n_shared_experts") -> Json:
  """The experts that every token passes, as one MLP."""
  one = whole_number(
    where, "moe_intermediate_size", raw["moe_intermediate_size"]
  )
  count = whole_number(where, field, raw[field], least=0)
  if not count and field == "n_shared_experts":
    raise refuse(where, field, count, "1 or more")
  return {"d_ff_shared": one * count}


def _grouped(raw: Json, where: str) -> Json:
  """Experts of few groups: whether there are as many as a token needs."""
  fields = ("n_group", "topk_group", "n_routed_experts", "num_experts_per_tok")
  groups, top, experts, k = (whole_number(where, f, raw[f]) for f in fields)
  each = experts // groups
  fits = experts % groups == 0 and top <= groups and k <= each * top
  if not fits or (groups > 1 and each < 2):
    expected = "groups that hold as many experts as a token has"
    raise refuse(where, "n_group, topk_group", (groups, top), expected)
  return _shared(raw, where)


def _latent(raw: Json, where: str) -> Json:
  """The widths of latent attention."""
  fields = (
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "kv_lora_rank",
    "v_head_dim",
  )
  plain, turned, rank, v = (whole_number(where, f, raw[f]) for f in fields)
  q_rank = raw["q_lora_rank"]
  if q_rank is not None:
    whole_number(where, "q_lora_rank", q_rank)
  return {
    **{"head_dim": plain + turned, "rope_dim": turned, "v_dim": v},
    **{"kv_rank": rank, "q_rank": q_rank or 0},
  }


def _deepseek_v2(raw: Json, where: str) -> Json:
  """Groups count where the method looks at them."""
  method = raw["topk_method"]
  if method == "greedy":
    return _latent(raw, where) | _shared(raw, where)
  if method != "group_limited_greedy":
    expected = "greedy or group_limited_greedy"
    raise refuse(where, "topk_method", method, expected)
  fields = _latent(raw, where) | _grouped(raw, where) | {"router_best": 1}
  groups = {"router_groups": raw["n_group"]}
  return fields | groups | {"router_top_groups": raw["topk_group"]}


# -- Names of tensors; `{}` is the layer, a second one the expert --------

_LLAMA = {
  "embed": "model.embed_tokens",
  "final_norm": "model.norm",
  "head": "lm_head",
  "layers/attn_norm": "model.layers.{}.input_layernorm",
  "layers/attn/q": "model.layers.{}.self_attn.q_proj",
  "layers/attn/k": "model.layers.{}.self_attn.k_proj",
  "layers/attn/v": "model.layers.{}.self_attn.v_proj",
  "layers/attn/o": "model.layers.{}.self_attn.o_proj",
  "layers/attn/q_norm": "model.layers.{}.self_attn.q_norm",
  "layers/attn/k_norm": "model.layers.{}.self_attn.k_norm",
  "layers/mlp_norm": "model.layers.{}.post_attention_layernorm",
  "layers/mlp/gate": "model.layers.{}.mlp.gate_proj",
  "layers/mlp/up": "model.layers.{}.mlp.up_proj",
  "layers/mlp/down": "model.layers.{}.mlp.down_proj",
}
_POST_NORM = _LLAMA | {
  "layers/attn_post_norm": "model.layers.{}.post_attention_layernorm",
  "layers/mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
  "layers/mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
}
_FUSED = _LLAMA | {
  "layers/attn/q": "model.layers.{}.self_attn.qkv_proj",
  "layers/attn/k": "model.layers.{}.self_attn.qkv_proj",
  "layers/attn/v": "model.layers.{}.self_attn.qkv_proj",
  "layers/mlp/gate": "model.layers.{}.mlp.gate_up_proj",
  "layers/mlp/up": "model.layers.{}.mlp.gate_up_proj",
}
_GLM4 = _LLAMA | {
  "layers/attn_post_norm": "model.layers.{}.post_self_attn_layernorm",
  "layers/mlp_post_norm": "model.layers.{}.post_mlp_layernorm",
  "layers/mlp/gate": "model.layers.{}.mlp.gate_up_proj",
  "layers/mlp/up": "model.layers.{}.mlp.gate_up_proj",
}
_APERTUS = _LLAMA | {
  "layers/attn_norm": "model.layers.{}.attention_layernorm",
  "layers/mlp_norm": "model.layers.{}.feedforward_layernorm",
  "layers/mlp/act": "model.layers.{}.mlp.act_fn",
}

_LFM2 = {
  "embed": "model.embed_tokens",
  "final_norm": "model.embedding_norm",
  "head": "lm_head",
  "layers/attn_norm": "model.layers.{}.operator_norm",
  "layers/attn/q": "model.layers.{}.self_attn.q_proj",
  "layers/attn/k": "model.layers.{}.self_attn.k_proj",
  "layers/attn/v": "model.layers.{}.self_attn.v_proj",
  "layers/attn/o": "model.layers.{}.self_attn.out_proj",
  "layers/attn/q_norm": "model.layers.{}.self_attn.q_layernorm",
  "layers/attn/k_norm": "model.layers.{}.self_attn.k_layernorm",
  "layers/conv/in": "model.layers.{}.conv.in_proj",
  "layers/conv/conv": "model.layers.{}.conv.conv",
  "layers/conv/out": "model.layers.{}.conv.out_proj",
  "layers/mlp_norm": "model.layers.{}.ffn_norm",
  "layers/mlp/gate": "model.layers.{}.feed_forward.w1",
  "layers/mlp/up": "model.layers.{}.feed_forward.w3",
  "layers/mlp/down": "model.layers.{}.feed_forward.w2",
}

_DELTA = {
  "layers/delta": "model.layers.{}.linear_attn",
  "layers/delta/conv": "model.layers.{}.linear_attn.conv1d",
  "layers/delta/norm": "model.layers.{}.linear_attn.norm",
  "layers/delta/out": "model.layers.{}.linear_attn.out_proj",
}
_QWEN3_5 = (
  _LLAMA
  | _DELTA
  | {
    f"layers/delta/{name}": f"model.layers.{{}}.linear_attn.in_proj_{name}"
    for name in ("qkv", "z", "b", "a")
  }
)
_LFM2_MOE = _LFM2 | {
  "layers/moe/router": "model.layers.{}.feed_forward.gate",
  "layers/moe/router/correction": "model.layers.{}.feed_forward.expert_bias",
  "layers/moe/gate": "model.layers.{}.feed_forward.experts.{}.w1",
  "layers/moe/up": "model.layers.{}.feed_forward.experts.{}.w3",
  "layers/moe/down": "model.layers.{}.feed_forward.experts.{}.w2",
}
_GRANITE_HYBRID = _LLAMA | {
  "layers/mamba": "model.layers.{}.mamba",
  "layers/mamba/in": "model.layers.{}.mamba.in_proj",
  "layers/mamba/conv": "model.layers.{}.mamba.conv1d",
  "layers/mamba/norm": "model.layers.{}.mamba.norm",
  "layers/mamba/out": "model.layers.{}.mamba.out_proj",
  "layers/mlp/gate": "model.layers.{}.shared_mlp.input_linear",
  "layers/mlp/up": "model.layers.{}.shared_mlp.input_linear",
  "layers/mlp/down": "model.layers.{}.shared_mlp.output_linear",
}


def _expert_names(block: str, **names: str) -> dict[str, str]:
  """Those of Llama, with the modules of `block` in the place of the MLP."""
  return {k: v for k, v in _LLAMA.items() if "/mlp/" not in k} | {
    f"layers/moe/{ours}": f"model.layers.{{}}.{block}.{theirs}"
    for ours, theirs in names.items()
  }


_QWEN_MOE = _LLAMA | _expert_names(
  "mlp",
  router="gate",
  gate="experts.{}.gate_proj",
  up="experts.{}.up_proj",
  down="experts.{}.down_proj",
)
_DEEPSEEK = _QWEN_MOE | {
  "layers/moe/shared/gate": "model.layers.{}.mlp.shared_experts.gate_proj",
  "layers/moe/shared/up": "model.layers.{}.mlp.shared_experts.up_proj",
  "layers/moe/shared/down": "model.layers.{}.mlp.shared_experts.down_proj",
}
_LATENT = _DEEPSEEK | {
  "layers/attn/q_down": "model.layers.{}.self_attn.q_a_proj",
  "layers/attn/q_down_norm": "model.layers.{}.self_attn.q_a_layernorm",
  "layers/attn/q_up": "model.layers.{}.self_attn.q_b_proj",
  "layers/attn/kv_down": "model.layers.{}.self_attn.kv_a_proj_with_mqa",
  "layers/attn/kv_norm": "model.layers.{}.self_attn.kv_a_layernorm",
  "layers/attn/kv_up": "model.layers.{}.self_attn.kv_b_proj",
}
_MIXTRAL = _expert_names(
  "block_sparse_moe",
  router="gate",
  gate="experts.{}.w1",
  up="experts.{}.w3",
  down="experts.{}.w2",
)
_SHARED_EXPERT = _QWEN_MOE | {
  "layers/moe/shared/gate": "model.layers.{}.mlp.shared_expert.gate_proj",
  "layers/moe/shared/up": "model.layers.{}.mlp.shared_expert.up_proj",
  "layers/moe/shared/down": "model.layers.{}.mlp.shared_expert.down_proj",
  "layers/moe/shared/share": "model.layers.{}.mlp.shared_expert_gate",
}
_QWEN3_NEXT = (
  _SHARED_EXPERT
  | _DELTA
  | {
    f"layers/delta/{name}": f"model.layers.{{}}.linear_attn.in_proj_{name}"
    for name in ("qkvz", "ba")
  }
)
_GPT2 = {
  "embed": "transformer.wte",
  "positions": "transformer.wpe",
  "final_norm": "transformer.ln_f",
  "head": "lm_head",
  "layers/attn_norm": "transformer.h.{}.ln_1",
  "layers/attn/q": "transformer.h.{}.attn.c_attn",
  "layers/attn/k": "transformer.h.{}.attn.c_attn",
  "layers/attn/v": "transformer.h.{}.attn.c_attn",
  "layers/attn/o": "transformer.h.{}.attn.c_proj",
  "layers/mlp_norm": "transformer.h.{}.ln_2",
  "layers/mlp/up": "transformer.h.{}.mlp.c_fc",
  "layers/mlp/down": "transformer.h.{}.mlp.c_proj",
}


# -- What fields of config.json become ---------------------------------------

_ACTIVATIONS = {
  "silu": "silu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "xielu": "xielu",
}
# Of every family whose configuration class has the field.
READS: dict[str, Read] = {
  "hidden_act": Read(("activation",), _ACTIVATIONS),
  "hidden_activation": Read(("activation",), _ACTIVATIONS),
  "activation_function": Read(("activation",), _ACTIVATIONS),
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
_GROUPS = {
  "n_group": Read(("router_groups",), int),
  "topk_group": Read(("router_top_groups",), int),
}
_ROUTED = {
  "num_local_experts": "n_routed_experts",
  "intermediate_size": "moe_intermediate_size",
}
_CORRECTED: Json = {"router_sigmoid": True, "router_correction": 1}
# What `derived` and `dense` read, and layers that predict further tokens, which
# a checkpoint may hold and no one here runs.
_DERIVED = frozenset(
  {
    *("intermediate_size", "n_shared_experts", "num_experts", "topk_method"),
    *("n_group", "topk_group", "num_mtp_layers", "num_nextn_predict_layers"),
  }
)
_LATENT_FIELDS = frozenset(
  {
    *("qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "head_dim"),
    *("kv_lora_rank", "q_lora_rank", "v_head_dim"),
  }
)
_QWEN_HYBRID: Json = {
  **{"qk_norm": "head", "norm_offset": 1.0, "attn_gate": True}
}
# Read where the file does not name its layers.
_INTERVAL = frozenset({"full_attention_interval"})
_MHA = {"num_key_value_heads": lambda raw: raw["num_attention_heads"]}
_GEMMA: Json = {"norm_offset": 1.0, "scale_embeddings": True}


# -- The table -----------------------------------------------------------

_YARN_32: Json = {
  **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0},
  **{"truncate": False, "original_max_position_embeddings": 4096},
}
_YARN_16: Json = {
  **{"rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0},
  **{"original_max_position_embeddings": 16384, "llama_4_scaling_beta": 0.1},
  **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}

_LLAMA3_8: Json = {
  **{"rope_type": "llama3", "factor": 8.0},
  **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
  "original_max_position_embeddings": 8192,
}

# Checkpoints of text and other media: `model_type` of the whole to {that of its
# text model: the family that computes the same of text alone}. The first is
# the default. Multimodal RoPE has one angle per axis of an image; tokens of
# text have the same position on all of them.
MULTIMODAL: dict[str, dict[str, str]] = {
  "gemma3": {"gemma3_text": "gemma3_text"},
  "mistral3": {"mistral": "mistral", "ministral3": "ministral3"},
  "qwen3_5": {"qwen3_5_text": "qwen3_5_text"},
  "qwen3_5_moe": {"qwen3_5_moe_text": "qwen3_5_moe_text"},
  "qwen2_vl": {"qwen2_vl_text": "qwen2"},
  "qwen2_5_vl": {"qwen2_5_vl_text": "qwen2"},
  "qwen3_vl": {"qwen3_vl_text": "qwen3"},
}

FAMILIES: dict[str, Family] = {
  "llama": Family(
    architecture="LlamaForCausalLM",
    names=_LLAMA,
    defaults=_MHA,
  ),
  "mistral": Family(
    architecture="MistralForCausalLM",
    names=_LLAMA,
    layer_types=_everywhere,
  ),
  "ministral3": Family(
    architecture="Ministral3ForCausalLM",
    names=_LLAMA,
    layer_types=_everywhere,
    rope=_YARN_16,
    rope_fields=frozenset({"llama_4_scaling_beta"}),
  ),
  "qwen2": Family(
    architecture="Qwen2ForCausalLM",
    names=_LLAMA,
    traits={"qkv_bias": True},
    layer_types=_from_layer,
  ),
  "qwen3": Family(
    architecture="Qwen3ForCausalLM",
    names=_LLAMA,
    traits={"qk_norm": "head"},
    layer_types=_from_layer,
  ),
  "gemma": Family(
    architecture="GemmaForCausalLM",
    names=_LLAMA,
    traits=_GEMMA,
    # Files say "gelu" and mean its approximation by tanh.
    reads={
      "hidden_act": Read(("activation",), _ACTIVATIONS | {"gelu": "gelu_tanh"})
    },
  ),
  "gemma2": Family(
    architecture="Gemma2ForCausalLM",
    names=_POST_NORM,
    traits=_GEMMA | {"post_norm": True},
    layer_types=_full_each("", 2),
  ),
  "gemma3_text": Family(
    architecture="Gemma3ForCausalLM",
    names=_POST_NORM,
    traits=_GEMMA | {"post_norm": True, "qk_norm": "head"},
    defaults={"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
    # The reference reads this cap and does not apply it to attention.
    reads={"attn_logit_softcapping": None},
    layer_types=_full_each("sliding_window_pattern", 6),
    harmless=frozenset({"sliding_window_pattern", "_sliding_window_pattern"}),
    local_rope="rope_local_base_freq",
  ),
  "olmo2": Family(
    architecture="Olmo2ForCausalLM",
    names=_POST_NORM,
    traits={"pre_norm": False, "post_norm": True, "qk_norm": "all"},
    defaults=_MHA,
  ),
  "olmo3": Family(
    architecture="Olmo3ForCausalLM",
    names=_POST_NORM,
    traits={"pre_norm": False, "post_norm": True, "qk_norm": "all"},
    defaults=_MHA
    | {"rope_theta": 500_000.0, "rope_local_base_freq": 500_000.0},
    layer_types=_full_each("", 4),
    local_rope="rope_local_base_freq",
  ),
  "smollm3": Family(
    architecture="SmolLM3ForCausalLM",
    names=_LLAMA,
    defaults={"rope_theta": 2_000_000.0},
    layer_types=_without_rope,
    rotated=_rope_layers,
  ),
  "phi3": Family(
    architecture="Phi3ForCausalLM",
    names=_FUSED,
    defaults=_MHA,
    layer_types=_everywhere,
    rope_fields=frozenset(
      {"partial_rotary_factor", "original_max_position_embeddings"}
    ),
  ),
  "glm4": Family(
    architecture="Glm4ForCausalLM",
    names=_GLM4,
    traits={"post_norm": True, "rope_pairs": True},
    reads={"attention_bias": Read(("qkv_bias",))},
    defaults={"partial_rotary_factor": 0.5},
    rope_fields=frozenset({"partial_rotary_factor"}),
  ),
  "seed_oss": Family(
    architecture="SeedOssForCausalLM",
    names=_LLAMA,
    reads={
      "attention_bias": Read(("qkv_bias",)),
      "attention_out_bias": Read(("o_bias",)),
    },
    defaults=_MHA,
    harmless=frozenset({"attention_dropout", "residual_dropout"}),
  ),
  "exaone4": Family(
    architecture="Exaone4ForCausalLM",
    names=_POST_NORM,
    traits={"pre_norm": False, "post_norm": True, "qk_norm": "head"},
    layer_types=_full_each("sliding_window_pattern", 4),
    rotated=_windowed_if_any,
    harmless=frozenset({"sliding_window_pattern"}),
  ),
  "ernie4_5": Family(
    architecture="Ernie4_5ForCausalLM",
    names=_LLAMA,
    traits={"rope_pairs": True},
    defaults=_MHA | {"rope_theta": 500_000.0},
  ),
  "hunyuan_v1_dense": Family(
    architecture="HunYuanDenseV1ForCausalLM",
    names=_LLAMA
    | {
      "layers/attn/q_norm": "model.layers.{}.self_attn.query_layernorm",
      "layers/attn/k_norm": "model.layers.{}.self_attn.key_layernorm",
    },
    traits={"qk_norm": "rotated"},
    defaults=_MHA,
    rope_fields=frozenset({"alpha"}),
    harmless=frozenset({"eod_token_id"}),
  ),
  "cohere2": Family(
    architecture="Cohere2ForCausalLM",
    names=_LLAMA,
    traits={
      **{"norm": "layer", "norm_bias": False, "parallel": True},
      "rope_pairs": True,
    },
    reads={"logit_scale": Read(("logit_divisor",), lambda x: 1 / x)},
    defaults=_MHA,
    aliases={"rms_norm_eps": "layer_norm_eps"},
    layer_types=_full_each("sliding_window_pattern", 4),
    rotated=_windowed,
    harmless=frozenset({"sliding_window_pattern"}),
  ),
  "apertus": Family(
    architecture="ApertusForCausalLM",
    names=_APERTUS,
    traits={"qk_norm": "head", "gated_mlp": False},
    defaults=_MHA | {"rope_theta": 12_000_000.0},
    rope=_LLAMA3_8,
  ),
  "olmoe": Family(
    architecture="OlmoeForCausalLM",
    names=_QWEN_MOE,
    traits={"qk_norm": "all"},
    defaults=_MHA,
    aliases={"num_local_experts": "num_experts"},
    experts=True,
  ),
  "lfm2": Family(
    architecture="Lfm2ForCausalLM",
    names=_LFM2,
    traits={"qk_norm": "head"},
    defaults={"rope_theta": 1_000_000.0},
    aliases={"rms_norm_eps": "norm_eps"},
    layer_types=_lfm2_types,
    mixers={"conv": "conv"},
    derived=_lfm2,
    # Those that `derived` and `layer_types` read.
    harmless=frozenset(
      {
        *("block_multiple_of", "block_ffn_dim_multiplier", "block_ff_dim"),
        *("block_auto_adjust_ff_dim", "full_attn_idxs", "tie_embedding"),
      }
    ),
  ),
  "qwen3_5_text": Family(
    architecture="Qwen3_5ForCausalLM",
    names=_QWEN3_5,
    traits=_QWEN_HYBRID,
    defaults={"partial_rotary_factor": 0.25},
    layer_types=_linear_but_each,
    mixers={LINEAR: "delta"},
    harmless=_INTERVAL,
    rope_fields=frozenset({"partial_rotary_factor"}),
  ),
  "qwen3_next": Family(
    architecture="Qwen3NextForCausalLM",
    names=_QWEN3_NEXT,
    traits=_QWEN_HYBRID | {"mixer_by_head": True, "shared_gate": True},
    defaults={"partial_rotary_factor": 0.25},
    aliases={
      "num_local_experts": "num_experts",
      "intermediate_size": "moe_intermediate_size",
    },
    layer_types=_linear_but_each,
    mixers={LINEAR: "delta"},
    dense=layers_without_experts,
    derived=_shared_expert,
    harmless=_INTERVAL | {"shared_expert_intermediate_size"},
    rope_fields=frozenset({"partial_rotary_factor"}),
    experts=True,
  ),
  "qwen3_5_moe_text": Family(
    architecture="Qwen3_5MoeForCausalLM",
    names=_QWEN3_5 | _SHARED_EXPERT,
    traits=_QWEN_HYBRID | {"shared_gate": True},
    defaults={"partial_rotary_factor": 0.25},
    aliases={
      "num_local_experts": "num_experts",
      "intermediate_size": "moe_intermediate_size",
    },
    layer_types=_linear_but_each,
    mixers={LINEAR: "delta"},
    derived=_shared_expert,
    harmless=_INTERVAL | {"shared_expert_intermediate_size"},
    rope_fields=frozenset({"partial_rotary_factor"}),
    experts=True,
  ),
  "lfm2_moe": Family(
    architecture="Lfm2MoeForCausalLM",
    names=_LFM2_MOE,
    traits=_CORRECTED | {"qk_norm": "head"},
    defaults={"rope_theta": 1_000_000.0},
    aliases={
      "num_local_experts": "num_experts",
      "intermediate_size": "moe_intermediate_size",
      "rms_norm_eps": "norm_eps",
    },
    layer_types=_lfm2_types,
    mixers={"conv": "conv"},
    dense=_first_dense,
    derived=_tied,
    harmless=frozenset({"tie_embedding", "num_dense_layers"}),
    experts=True,
  ),
  "granitemoehybrid": Family(
    architecture="GraniteMoeHybridForCausalLM",
    names=_GRANITE_HYBRID,
    defaults=_MHA,
    layer_types=lambda raw, n: [LINEAR] * n,
    rotated=_all_if_named,
    mixers={LINEAR: "mamba"},
    derived=_granite_hybrid,
    harmless=frozenset(
      {
        # Those that `derived` and `rotated` read.
        *("mamba_d_head", "mamba_expand", "shared_intermediate_size"),
        *("position_embedding_type", "time_step_limit"),
        # Of a kernel, and the same mixers in an older file.
        *("mamba_chunk_size", "layers_block_type"),
      }
    ),
  ),
  "granite": Family(
    architecture="GraniteForCausalLM",
    names=_LLAMA,
    defaults=_MHA,
  ),
  "mixtral": Family(
    architecture="MixtralForCausalLM",
    names=_MIXTRAL,
    defaults={"rope_theta": 1_000_000.0},
    layer_types=_everywhere,
    experts=True,
  ),
  "qwen3_moe": Family(
    architecture="Qwen3MoeForCausalLM",
    names=_QWEN_MOE,
    traits={"qk_norm": "head"},
    aliases={
      "num_local_experts": "num_experts",
      "intermediate_size": "moe_intermediate_size",
    },
    layer_types=_if_used,
    dense=layers_without_experts,
    experts=True,
  ),
  "glm4_moe": Family(
    architecture="Glm4MoeForCausalLM",
    names=_DEEPSEEK,
    traits=_CORRECTED,
    reads=_GROUPS
    | {
      "attention_bias": Read(("qkv_bias",)),
      "use_qk_norm": Read(("qk_norm",), lambda on: "head" if on else "none"),
    },
    defaults={"partial_rotary_factor": 0.5},
    aliases=_ROUTED,
    rope_fields=frozenset({"partial_rotary_factor"}),
    dense=_first_layers,
    derived=_grouped,
    harmless=_DERIVED | {"first_k_dense_replace"},
    experts=True,
  ),
  "minimax_m2": Family(
    architecture="MiniMaxM2ForCausalLM",
    names=_MIXTRAL
    | {
      "layers/moe/router/correction": (
        "model.layers.{}.block_sparse_moe.e_score_correction_bias"
      )
    },
    traits=_CORRECTED | {"qk_norm": "all"},
    defaults={"rope_theta": 5_000_000.0},
    rope_fields=frozenset({"partial_rotary_factor", "rotary_dim"}),
    experts=True,
  ),
  "ernie4_5_moe": Family(
    architecture="Ernie4_5_MoeForCausalLM",
    names=_DEEPSEEK
    | {
      "layers/moe/router/correction": (
        "model.layers.{}.mlp.moe_statics.e_score_correction_bias"
      )
    },
    traits={"rope_pairs": True, "router_correction": 2},
    defaults=_MHA | {"rope_theta": 500_000.0},
    aliases={
      **{
        "num_local_experts": "moe_num_experts",
        "num_experts_per_tok": "moe_k",
      },
      "intermediate_size": "moe_intermediate_size",
    },
    dense=_outside_interval,
    derived=lambda raw, where: _shared(raw, where, "moe_num_shared_experts"),
    harmless=frozenset(
      {
        *("intermediate_size", "moe_num_shared_experts", "num_experts"),
        *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
      }
    ),
    experts=True,
  ),
  "deepseek_v2": Family(
    architecture="DeepseekV2ForCausalLM",
    names=_LATENT,
    traits={"rope_pairs": True, "norm_topk": False},
    # The reference reads neither.
    reads={"norm_topk_prob": None, "mlp_bias": None},
    defaults=_MHA,
    aliases=_ROUTED,
    dense=_first_layers,
    derived=_deepseek_v2,
    harmless=_DERIVED | _LATENT_FIELDS | {"first_k_dense_replace"},
    experts=True,
  ),
  "deepseek_v3": Family(
    architecture="DeepseekV3ForCausalLM",
    names=_LATENT,
    traits=_CORRECTED,
    reads=_GROUPS | {"rope_interleave": Read(("rope_pairs",))},
    defaults=_MHA,
    aliases=_ROUTED,
    dense=_first_layers,
    derived=lambda raw, where: _latent(raw, where) | _grouped(raw, where),
    harmless=_DERIVED | _LATENT_FIELDS | {"first_k_dense_replace"},
    experts=True,
  ),
  "glm4_moe_lite": Family(
    architecture="Glm4MoeLiteForCausalLM",
    names=_LATENT,
    traits=_CORRECTED,
    reads=_GROUPS | {"rope_interleave": Read(("rope_pairs",))},
    aliases=_ROUTED,
    dense=_dense_types,
    derived=lambda raw, where: _latent(raw, where) | _grouped(raw, where),
    harmless=_DERIVED | _LATENT_FIELDS | {"mlp_layer_types"},
    experts=True,
  ),
  "gpt_oss": Family(
    architecture="GptOssForCausalLM",
    names=_expert_names(
      "mlp",
      router="router",
      gate="experts.gate_up_proj",
      up="experts.gate_up_proj",
      down="experts.down_proj",
    )
    | {"layers/attn": "model.layers.{}.self_attn"},
    traits={"mlp_bias": True, "attn_sinks": True},
    reads={"hidden_act": None},
    defaults={"rope_theta": 150_000.0},
    rope=_YARN_32,
    layer_types=_full_each("", 2),
    experts=True,
    stacked_experts=True,
  ),
  "gpt2": Family(
    architecture="GPT2LMHeadModel",
    names=_GPT2,
    traits={
      **{"norm": "layer", "learned_positions": True, "gated_mlp": False},
      **{"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    },
    defaults={
      "num_key_value_heads": lambda raw: raw["n_head"],
      "intermediate_size": lambda raw: 4 * raw["n_embd"],
    },
    aliases={
      "hidden_size": "n_embd",
      "num_hidden_layers": "n_layer",
      "num_attention_heads": "n_head",
      "intermediate_size": "n_inner",
      "max_position_embeddings": "n_positions",
      "rms_norm_eps": "layer_norm_epsilon",
    },
    # Dropout is a matter of pretraining; nothing here drops anything.
    harmless=frozenset(
      {
        *("attn_pdrop", "resid_pdrop", "embd_pdrop"),
        *("reorder_and_upcast_attn", "summary_type", "summary_use_proj"),
        *("summary_activation", "summary_proj_to_labels"),
        "summary_first_dropout",
      }
    ),
    conv1d=True,
    # The causal mask.
    buffers=(".attn.bias", ".attn.masked_bias"),
  ),
}
