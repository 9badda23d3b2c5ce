"""The table of families: what each fixes, reads and calls its tensors.

`config` turns a `config.json` into a ModelConfig by it, and `hf.parameter_map`
maps parameters to tensors. How to add one: docs/models.md.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sft_jax.models.hf import family_fields as fields
from sft_jax.models.hf import tensor_names as tensors
from sft_jax.models.hf.family_fields import (
  FULL,
  LINEAR,
  SLIDING,
  Json,
  Read,
  words,
)


@dataclasses.dataclass(frozen=True)
class Family:
  """One `model_type`, as data."""

  architecture: str  # The class that `architectures` must name.
  # {module of ours: module of theirs}, `{}` standing for the layer. Ours that
  # share one of theirs are side by side in it, in this order. A leaf that is
  # elsewhere than its module is named itself.
  names: Mapping[str, str]
  # Fields of ModelConfig that every model of the family has.
  traits: Json = dataclasses.field(default_factory=dict)
  # Fields read otherwise than by `READS`; None: their default alone is fine.
  reads: Mapping[str, Read | None] = dataclasses.field(default_factory=dict)
  # Common fields that transformers computes where they are missing, as
  # functions of the file; and thetas of RoPE.
  defaults: Json = dataclasses.field(default_factory=dict)
  # Common fields that the family spells in its own way.
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  harmless: frozenset[str] = frozenset()  # Fields that change nothing here.
  # SLIDING or FULL for each of n layers, from (file, n), or a name of `mixers`.
  layer_types: Callable[[Json, int], list[str]] | None = None
  # Which layers have RoPE, from (file, their types, where).
  rotated: Callable[[Json, list[str], str], list[bool]] | None = None
  # The mixer of other types of layer, see `LayerKind`.
  mixers: Mapping[str, str] = dataclasses.field(default_factory=dict)
  # Which of n layers have an MLP in place of experts, from (file, n, where).
  dense: Callable[[Json, int, str], list[bool]] | None = None
  # Fields of ModelConfig that follow from several, from (file, where).
  derived: Callable[[Json, str], Json] | None = None
  rope_fields: frozenset[str] = frozenset()  # Beyond those of the type.
  # The rotary fields of a file that has none.
  rope: Json = dataclasses.field(default_factory=dict)
  local_rope: str | None = None  # Older files' theta of sliding layers.
  conv1d: bool = False  # Kernels are [in, out] in the file.
  experts: bool = False  # Layers have a router and experts in place of an MLP.
  experts_in_turns: bool = False  # Columns of gate and up take turns.
  # (in files, in `names`): parts of names that files spell in another way. What
  # comes to one name is side by side along the first axis.
  stored: tuple[tuple[str, str], ...] = ()
  # Endings of tensors that old files hold and that follow from the config; they
  # are not read.
  buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)

  @property
  def latent(self) -> bool:
    """Attention reads keys and values from a latent vector."""
    return "layers/attn/kv_up" in self.names

  @property
  def experts_bare(self) -> bool:
    """Experts are parameters in the file as in memory, not modules."""
    return self.names.get("layers/moe/gate", "").endswith(".gate_up_proj")

  @property
  def experts_apart(self) -> bool:
    """Each expert has tensors of its own; else a layer's are one tensor."""
    return self.names.get("layers/moe/down", "").count("{}") == 2


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
  "gemma4": {"gemma4_text": "gemma4_text"},
  "mistral3": {"mistral": "mistral", "ministral3": "ministral3"},
  "qwen3_5": {"qwen3_5_text": "qwen3_5_text"},
  "qwen3_5_moe": {"qwen3_5_moe_text": "qwen3_5_moe_text"},
  "qwen2_vl": {"qwen2_vl_text": "qwen2"},
  "qwen2_5_vl": {"qwen2_5_vl_text": "qwen2"},
  "qwen3_vl": {"qwen3_vl_text": "qwen3"},
}

FAMILIES: dict[str, Family] = {
  "llama": Family("LlamaForCausalLM", tensors.LLAMA, defaults=fields.MHA),
  "mistral": Family(
    "MistralForCausalLM", tensors.LLAMA, layer_types=fields.everywhere
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM",
    tensors.LLAMA,
    traits={"qkv_bias": True},
    layer_types=fields.from_layer,
  ),
  "gemma": Family(
    "GemmaForCausalLM",
    tensors.LLAMA,
    traits=fields.GEMMA,
    # Files say "gelu" and mean its approximation by tanh.
    reads={
      "hidden_act": Read(
        ("activation",), fields.ACTIVATIONS | {"gelu": "gelu_tanh"}
      )
    },
  ),
  "gemma2": Family(
    "Gemma2ForCausalLM",
    tensors.POST_NORM,
    traits=fields.GEMMA | {"post_norm": True},
    layer_types=fields.full_each("", 2),
  ),
  "gemma3_text": Family(
    "Gemma3ForCausalLM",
    tensors.POST_NORM,
    traits=fields.GEMMA | {"post_norm": True, "qk_norm": "head"},
    defaults={"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
    # The reference reads this cap and does not apply it to attention.
    reads={"attn_logit_softcapping": None},
    layer_types=fields.full_each("sliding_window_pattern", 6),
    harmless=words("sliding_window_pattern _sliding_window_pattern"),
    local_rope="rope_local_base_freq",
  ),
  "gemma4_text": Family(
    "Gemma4ForCausalLM",
    tensors.GEMMA4,
    traits={
      **{"scale_embeddings": True, "post_norm": True, "qk_norm": "head"},
      **{"v_norm": True, "attn_scale": 1.0, "layer_scalar": True},
    },
    reads={
      "attention_k_eq_v": Read(("global_k_is_v",)),
      "enable_moe_block": Read(("mlp_beside",)),
      "use_double_wide_mlp": Read(("wide_mlp",)),
    },
    defaults={
      "rope_theta": 1_000_000.0,
      f"rope_parameters.{SLIDING}": 10_000.0,
    },
    rope={"rope_type": "proportional", "partial_rotary_factor": 0.25},
    layer_types=fields.full_at_the_end,
    mixers={FULL: "global_attn", SLIDING: "attn"},
    derived=fields.gemma4,
    # Those that `derived` reads, and what is of no use without a switch.
    harmless=fields.GEMMA4,
    local_rope=f"rope_parameters.{SLIDING}",
  ),
  "olmo2": Family(
    "Olmo2ForCausalLM",
    tensors.POST_NORM,
    traits={"pre_norm": False, "post_norm": True, "qk_norm": "all"},
    defaults=fields.MHA,
  ),
  "smollm3": Family(
    "SmolLM3ForCausalLM",
    tensors.LLAMA,
    defaults={"rope_theta": 2_000_000.0},
    layer_types=fields.without_rope,
    rotated=fields.rope_layers,
  ),
  "phi3": Family(
    "Phi3ForCausalLM",
    tensors.FUSED,
    defaults=fields.MHA,
    layer_types=fields.everywhere,
    rope_fields=words("partial_rotary_factor original_max_position_embeddings"),
  ),
  "glm4": Family(
    "Glm4ForCausalLM",
    tensors.GLM4,
    traits={"post_norm": True, "rope_pairs": True},
    reads={"attention_bias": Read(("qkv_bias",))},
    defaults={"partial_rotary_factor": 0.5},
    rope_fields=words("partial_rotary_factor"),
  ),
  "seed_oss": Family(
    "SeedOssForCausalLM",
    tensors.LLAMA,
    reads={
      "attention_bias": Read(("qkv_bias",)),
      "attention_out_bias": Read(("o_bias",)),
    },
    defaults=fields.MHA,
    harmless=words("attention_dropout residual_dropout"),
  ),
  "ernie4_5": Family(
    "Ernie4_5ForCausalLM",
    tensors.LLAMA,
    traits={"rope_pairs": True},
    defaults=fields.MHA | {"rope_theta": 500_000.0},
  ),
  "hunyuan_v1_dense": Family(
    "HunYuanDenseV1ForCausalLM",
    tensors.HUNYUAN,
    traits={"qk_norm": "rotated"},
    defaults=fields.MHA,
    rope_fields=words("alpha"),
    harmless=words("eod_token_id"),
  ),
  "cohere2": Family(
    "Cohere2ForCausalLM",
    tensors.LLAMA,
    traits={
      **{"norm": "layer", "norm_bias": False, "parallel": True},
      "rope_pairs": True,
    },
    reads={"logit_scale": Read(("logit_divisor",), lambda x: 1 / x)},
    defaults=fields.MHA,
    aliases={"rms_norm_eps": "layer_norm_eps"},
    layer_types=fields.full_each("sliding_window_pattern", 4),
    rotated=fields.windowed,
    harmless=words("sliding_window_pattern"),
  ),
  "apertus": Family(
    "ApertusForCausalLM",
    tensors.APERTUS,
    traits={"qk_norm": "head", "gated_mlp": False},
    defaults=fields.MHA | {"rope_theta": 12_000_000.0},
    rope=_LLAMA3_8,
  ),
  "olmoe": Family(
    "OlmoeForCausalLM",
    tensors.QWEN_MOE,
    traits={"qk_norm": "all"},
    defaults=fields.MHA,
    aliases={"num_local_experts": "num_experts"},
    experts=True,
  ),
  "lfm2": Family(
    "Lfm2ForCausalLM",
    tensors.LFM2,
    traits={"qk_norm": "head"},
    defaults={"rope_theta": 1_000_000.0},
    aliases={"rms_norm_eps": "norm_eps"},
    layer_types=fields.full_where("full_attn_idxs", "conv"),
    mixers={"conv": "conv"},
    derived=fields.lfm2,
    # Those that `derived` and `layer_types` read.
    harmless=words("""block_multiple_of block_ffn_dim_multiplier
      block_ff_dim block_auto_adjust_ff_dim full_attn_idxs tie_embedding"""),
  ),
  "qwen3_5_text": Family(
    "Qwen3_5ForCausalLM",
    tensors.QWEN3_5,
    traits=fields.QWEN_HYBRID,
    defaults={"partial_rotary_factor": 0.25},
    layer_types=fields.linear_but_each,
    mixers={LINEAR: "delta"},
    harmless=fields.INTERVAL,
    rope_fields=words("partial_rotary_factor"),
  ),
  "qwen3_next": Family(
    "Qwen3NextForCausalLM",
    tensors.QWEN_HYBRID_MOE,
    traits=fields.QWEN_HYBRID | {"mixer_by_head": True, "shared_gate": True},
    defaults={"partial_rotary_factor": 0.25},
    aliases={
      "num_local_experts": "num_experts",
      "intermediate_size": "moe_intermediate_size",
    },
    layer_types=fields.linear_but_each,
    mixers={LINEAR: "delta"},
    dense=fields.layers_without_experts,
    derived=fields.shared_expert,
    harmless=fields.INTERVAL | {"shared_expert_intermediate_size"},
    rope_fields=words("partial_rotary_factor"),
    experts=True,
  ),
  "bamba": Family(
    "BambaForCausalLM",
    tensors.BAMBA,
    defaults=fields.MHA | {"partial_rotary_factor": 0.5},
    layer_types=fields.full_where("attn_layer_indices", LINEAR),
    mixers={LINEAR: "mamba"},
    derived=fields.mamba,
    # Those that `layer_types` reads, and of pretraining and generation.
    harmless=fields.MAMBA
    | words("attn_layer_indices z_loss_coefficient num_logits_to_keep"),
    rope_fields=words("partial_rotary_factor"),
  ),
  "nemotron_h": Family(
    "NemotronHForCausalLM",
    tensors.NEMOTRON_H,
    traits=fields.CORRECTED | {"one_part": True, "gated_mlp": False},
    reads=fields.GROUPS
    | {
      "attention_bias": None,
      "mamba_proj_bias": None,
      "mlp_hidden_act": Read(("activation",), fields.ACTIVATIONS),
      "ssm_state_size": Read(("mixer_state",), int),
      "mamba_num_heads": Read(("mixer_heads",), int),
      "mamba_head_dim": Read(("mixer_width",), int),
      "n_groups": Read(("mixer_groups",), int),
      "conv_kernel": Read(("conv_width",), int),
      "use_conv_bias": Read(("conv_bias",)),
      "use_bias": Read(("mixer_bias",)),
      "time_step_min": Read(("mixer_least_step",)),
    },
    defaults=fields.MHA
    | {"num_hidden_layers": lambda raw: len(fields.nemotron_types(raw, 0))},
    aliases={"rms_norm_eps": "layer_norm_epsilon"},
    layer_types=fields.nemotron_types,
    rotated=lambda raw, types, where: [False] * len(types),
    mixers={LINEAR: "mamba", "mlp": "mlp", "moe": "moe"},
    derived=fields.nemotron,
    harmless=fields.NEMOTRON,
    stored=(("backbone.", "model."),),
  ),
  "mixtral": Family(
    "MixtralForCausalLM",
    tensors.MIXTRAL,
    defaults={"rope_theta": 1_000_000.0},
    layer_types=fields.everywhere,
    experts=True,
  ),
  "glm4_moe": Family(
    "Glm4MoeForCausalLM",
    tensors.DEEPSEEK,
    traits=fields.CORRECTED,
    reads=fields.GROUPS
    | {
      "attention_bias": Read(("qkv_bias",)),
      "use_qk_norm": Read(("qk_norm",), lambda on: "head" if on else "none"),
    },
    defaults={"partial_rotary_factor": 0.5},
    aliases=fields.ROUTED,
    rope_fields=words("partial_rotary_factor"),
    dense=fields.first("first_k_dense_replace"),
    derived=fields.grouped,
    harmless=fields.DERIVED | {"first_k_dense_replace"},
    experts=True,
  ),
  "minimax_m2": Family(
    "MiniMaxM2ForCausalLM",
    tensors.MINIMAX,
    traits=fields.CORRECTED | {"qk_norm": "all"},
    defaults={"rope_theta": 5_000_000.0},
    rope_fields=words("partial_rotary_factor rotary_dim"),
    experts=True,
  ),
  "ernie4_5_moe": Family(
    "Ernie4_5_MoeForCausalLM",
    tensors.ERNIE_MOE,
    traits={"rope_pairs": True, "router_correction": 2},
    defaults=fields.MHA | {"rope_theta": 500_000.0},
    aliases={
      **{
        "num_local_experts": "moe_num_experts",
        "num_experts_per_tok": "moe_k",
      },
      "intermediate_size": "moe_intermediate_size",
    },
    dense=fields.outside_interval,
    derived=lambda raw, where: fields.shared(
      raw, where, "moe_num_shared_experts"
    ),
    harmless=words("""intermediate_size moe_num_shared_experts num_experts
      moe_layer_start_index moe_layer_end_index moe_layer_interval"""),
    experts=True,
  ),
  "deepseek_v2": Family(
    "DeepseekV2ForCausalLM",
    tensors.LATENT,
    traits={"rope_pairs": True, "norm_topk": False},
    # The reference reads neither.
    reads={"norm_topk_prob": None, "mlp_bias": None},
    defaults=fields.MHA,
    aliases=fields.ROUTED,
    dense=fields.first("first_k_dense_replace"),
    derived=fields.deepseek_v2,
    harmless=fields.DERIVED | fields.LATENT_FIELDS | {"first_k_dense_replace"},
    experts=True,
  ),
  "deepseek_v3": Family(
    "DeepseekV3ForCausalLM",
    tensors.LATENT,
    traits=fields.CORRECTED,
    reads=fields.GROUPS | {"rope_interleave": Read(("rope_pairs",))},
    defaults=fields.MHA,
    aliases=fields.ROUTED,
    dense=fields.first("first_k_dense_replace"),
    derived=lambda raw, where: (
      fields.latent(raw, where) | fields.grouped(raw, where)
    ),
    harmless=fields.DERIVED | fields.LATENT_FIELDS | {"first_k_dense_replace"},
    experts=True,
  ),
  "gpt_oss": Family(
    "GptOssForCausalLM",
    tensors.GPT_OSS,
    traits={"mlp_bias": True, "attn_sinks": True},
    reads={"hidden_act": None},
    defaults={"rope_theta": 150_000.0},
    rope=_YARN_32,
    layer_types=fields.full_each("", 2),
    experts=True,
    experts_in_turns=True,
  ),
  "gpt2": Family(
    "GPT2LMHeadModel",
    tensors.GPT2,
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
    harmless=words("""attn_pdrop resid_pdrop embd_pdrop
      reorder_and_upcast_attn summary_type summary_use_proj
      summary_activation summary_proj_to_labels summary_first_dropout"""),
    conv1d=True,
    # The causal mask.
    buffers=(".attn.bias", ".attn.masked_bias"),
  ),
}


def _like(name: str, architecture: str, **changes: Any) -> Family:
  """A family that differs from another in a few fields."""
  return dataclasses.replace(
    FAMILIES[name], architecture=architecture, **changes
  )


FAMILIES |= {
  "granite": _like("llama", "GraniteForCausalLM"),
  "ministral3": _like(
    "mistral",
    "Ministral3ForCausalLM",
    rope=_YARN_16,
    rope_fields=words("llama_4_scaling_beta"),
  ),
  "qwen3": _like("qwen2", "Qwen3ForCausalLM", traits={"qk_norm": "head"}),
  "qwen3_moe": _like(
    "qwen3_next",
    "Qwen3MoeForCausalLM",
    names=tensors.QWEN_MOE,
    traits={"qk_norm": "head"},
    defaults={},
    layer_types=fields.if_used,
    mixers={},
    derived=None,
    harmless=words(""),
    rope_fields=words(""),
  ),
  "qwen3_5_moe_text": _like(
    "qwen3_next",
    "Qwen3_5MoeForCausalLM",
    traits=fields.QWEN_HYBRID | {"shared_gate": True},
    dense=None,
  ),
  "olmo3": _like(
    "olmo2",
    "Olmo3ForCausalLM",
    defaults=fields.MHA
    | {"rope_theta": 500_000.0, "rope_local_base_freq": 500_000.0},
    layer_types=fields.full_each("", 4),
    local_rope="rope_local_base_freq",
  ),
  "olmo_hybrid": _like(
    "olmo2",
    "OlmoHybridForCausalLM",
    names=tensors.OLMO_HYBRID,
    traits={
      **FAMILIES["olmo2"].traits,
      **{"pre_norm_mixer": "delta", "mixer_apart": True},
      "mixer_norm_eps": 1e-5,
    },
    reads={
      # The activation of its convolutions too.
      "hidden_act": Read(("activation",), {"silu": "silu"}),
      "linear_allow_neg_eigval": Read(
        ("mixer_beta",), lambda on: 2.0 if on else 1.0
      ),
    },
    layer_types=fields.olmo_hybrid_types,
    rotated=fields.all_if_based,
    mixers={LINEAR: "delta"},
    derived=fields.olmo_hybrid,
    # Of fresh weights.
    harmless=words("""linear_a_log_min linear_a_log_max linear_dt_min
      linear_dt_max linear_dt_init_floor"""),
    stored=(
      *(("q_conv1d", "conv1d"), ("k_conv1d", "conv1d")),
      *(("v_conv1d", "conv1d"), ("attention_layer_norm", "input_layernorm")),
      ("feedforward_layer_norm", "post_attention_layernorm"),
    ),
  ),
  "exaone4": _like(
    "olmo2",
    "Exaone4ForCausalLM",
    traits=FAMILIES["olmo2"].traits | {"qk_norm": "head"},
    defaults={},
    layer_types=fields.full_each("sliding_window_pattern", 4),
    rotated=fields.windowed_if_any,
    harmless=words("sliding_window_pattern"),
  ),
  "lfm2_moe": _like(
    "lfm2",
    "Lfm2MoeForCausalLM",
    names=tensors.LFM2_MOE,
    traits=fields.CORRECTED | {"qk_norm": "head"},
    aliases={**FAMILIES["qwen3_next"].aliases, **FAMILIES["lfm2"].aliases},
    dense=fields.first("num_dense_layers"),
    derived=fields.tied,
    harmless=words("tie_embedding num_dense_layers"),
    experts=True,
  ),
  "granitemoehybrid": _like(
    "bamba",
    "GraniteMoeHybridForCausalLM",
    names=tensors.GRANITE_HYBRID,
    defaults=fields.MHA,
    layer_types=lambda raw, n: [LINEAR] * n,
    rotated=lambda raw, types, where: (
      [raw["position_embedding_type"] == "rope"] * len(types)
    ),
    derived=fields.granite_hybrid,
    # Those that `derived` and `rotated` read, and mixers in an older file.
    harmless=fields.MAMBA
    | words("""shared_intermediate_size position_embedding_type
      layers_block_type"""),
    rope_fields=words(""),
  ),
  "glm4_moe_lite": _like(
    "deepseek_v3",
    "Glm4MoeLiteForCausalLM",
    dense=fields.dense_types,
    harmless=fields.DERIVED | fields.LATENT_FIELDS | {"mlp_layer_types"},
  ),
}
