"""The table of families: what each fixes, reads and calls its tensors.

A family is data. `config` turns a `config.json` into a ModelConfig by it, and
`names` maps parameters to tensors by it; neither knows a family by name.
How to add one: docs/models.md.
"""

from sft_jax.models import tensor_names, windows
from sft_jax.models.family import Family, Json, Read
from sft_jax.models.shared_fields import (
  ACT,
  ACTIVATIONS,
  BALANCE_LOSS,
  BIAS,
  GEMMA_READS,
  GEMMA_TRAITS,
  HEAD_DIM,
  MHA,
  MLP_BIAS,
  NOT_BIDIRECTIONAL,
  WINDOW_SWITCH,
)

_YARN_32: Json = {
  **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0},
  **{"truncate": False, "original_max_position_embeddings": 4096},
}

FAMILIES: dict[str, Family] = {
  "llama": Family(
    architecture="LlamaForCausalLM",
    names=tensor_names.LLAMA,
    reads=ACT | BIAS | MLP_BIAS,
    defaults=MHA,
  ),
  "mistral": Family(
    architecture="MistralForCausalLM",
    names=tensor_names.LLAMA,
    reads=ACT,
    defaults={"sliding_window": 4096},
    layer_types=windows.everywhere,
  ),
  "ministral3": Family(
    architecture="Ministral3ForCausalLM",
    names=tensor_names.LLAMA,
    reads=ACT,
    requires=HEAD_DIM | {"rope_parameters"},
    layer_types=windows.everywhere,
    rope_fields=frozenset({"llama_4_scaling_beta"}),
  ),
  "qwen2": Family(
    architecture="Qwen2ForCausalLM",
    names=tensor_names.LLAMA,
    traits={"qkv_bias": True},
    reads=ACT,
    defaults={"sliding_window": 4096},
    layer_types=windows.from_layer,
    layer_fields=WINDOW_SWITCH,
  ),
  "qwen3": Family(
    architecture="Qwen3ForCausalLM",
    names=tensor_names.LLAMA,
    traits={"qk_norm": "head"},
    reads=ACT | BIAS,
    defaults={"sliding_window": 4096},
    requires=HEAD_DIM,
    layer_types=windows.from_layer,
    layer_fields=WINDOW_SWITCH,
  ),
  "gemma": Family(
    architecture="GemmaForCausalLM",
    names=tensor_names.LLAMA,
    traits=GEMMA_TRAITS,
    reads=BIAS
    | {
      # Files say "gelu" and mean its approximation by tanh.
      "hidden_act": Read(
        ("activation",),
        "gelu_pytorch_tanh",
        {"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
      )
    },
    defaults={"tie_word_embeddings": True},
    requires=HEAD_DIM,
    only=NOT_BIDIRECTIONAL | {"hidden_activation": ("gelu_pytorch_tanh", None)},
  ),
  "gemma2": Family(
    architecture="Gemma2ForCausalLM",
    names=tensor_names.POST_NORM,
    traits=GEMMA_TRAITS | {"post_norm": True},
    reads=GEMMA_READS
    | {
      "attn_logit_softcapping": Read(("attn_softcap",), 50.0),
      "final_logit_softcapping": Read(("logit_softcap",), 30.0),
    },
    defaults={"tie_word_embeddings": True, "sliding_window": 4096},
    requires=HEAD_DIM,
    only=NOT_BIDIRECTIONAL | {"hidden_act": ("gelu_pytorch_tanh", None)},
    layer_types=windows.full_each("", 2),
    layer_fields=frozenset({"layer_types"}),
  ),
  "gemma3_text": Family(
    architecture="Gemma3ForCausalLM",
    names=tensor_names.POST_NORM,
    traits=GEMMA_TRAITS | {"post_norm": True, "qk_norm": "head"},
    reads=GEMMA_READS,
    defaults={
      "tie_word_embeddings": True,
      "sliding_window": 4096,
      "rope_theta": 1_000_000.0,
      "rope_local_base_freq": 10_000.0,
    },
    requires=HEAD_DIM,
    # The reference reads this cap and does not apply it to attention.
    only=NOT_BIDIRECTIONAL | {"attn_logit_softcapping": (None,)},
    layer_types=windows.full_each("sliding_window_pattern", 6),
    layer_fields=frozenset(
      {"layer_types", "sliding_window_pattern", "_sliding_window_pattern"}
    ),
    local_rope="rope_local_base_freq",
  ),
  "olmo2": Family(
    architecture="Olmo2ForCausalLM",
    names=tensor_names.POST_NORM,
    traits={"pre_norm": False, "post_norm": True, "qk_norm": "all"},
    reads=ACT | BIAS,
    defaults=MHA | {"rms_norm_eps": 1e-5},
  ),
  "olmo3": Family(
    architecture="Olmo3ForCausalLM",
    names=tensor_names.POST_NORM,
    traits={"pre_norm": False, "post_norm": True, "qk_norm": "all"},
    reads=ACT | BIAS,
    defaults=MHA
    | {
      "rms_norm_eps": 1e-5,
      "sliding_window": 4096,
      "rope_theta": 500_000.0,
      "rope_local_base_freq": 500_000.0,
    },
    layer_types=windows.full_each("", 4),
    layer_fields=frozenset({"layer_types"}),
    local_rope="rope_local_base_freq",
  ),
  "smollm3": Family(
    architecture="SmolLM3ForCausalLM",
    names=tensor_names.LLAMA,
    reads=ACT | BIAS | MLP_BIAS,
    defaults={
      "tie_word_embeddings": True,
      "rope_theta": 2_000_000.0,
      "no_rope_layer_interval": 4,
    },
    layer_types=windows.without_rope,
    layer_fields=WINDOW_SWITCH | {"no_rope_layers", "no_rope_layer_interval"},
  ),
  "phi3": Family(
    architecture="Phi3ForCausalLM",
    names=tensor_names.FUSED,
    reads=ACT,
    defaults=MHA | {"rms_norm_eps": 1e-5},
    only={
      "resid_pdrop": (0, None),
      "embd_pdrop": (0, None),
      "attention_bias": (False, None),
    },
    layer_types=windows.everywhere,
    rope_fields=frozenset(
      {"partial_rotary_factor", "original_max_position_embeddings"}
    ),
  ),
  "granite": Family(
    architecture="GraniteForCausalLM",
    names=tensor_names.LLAMA,
    reads=ACT
    | BIAS
    | MLP_BIAS
    | {
      "embedding_multiplier": Read(("embed_scale",), 1.0),
      "attention_multiplier": Read(("attn_scale",), 1.0),
      "residual_multiplier": Read(("residual_scale",), 1.0),
      "logits_scaling": Read(("logit_divisor",), 1.0),
    },
    defaults=MHA,
  ),
  "mixtral": Family(
    architecture="MixtralForCausalLM",
    names=tensor_names.experts(
      "block_sparse_moe",
      router="gate",
      gate="experts.{}.w1",
      up="experts.{}.w3",
      down="experts.{}.w2",
    ),
    reads=ACT,
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
    only={"router_jitter_noise": (0, None)},
    harmless=BALANCE_LOSS,
    layer_types=windows.everywhere,
    experts=True,
  ),
  "qwen3_moe": Family(
    architecture="Qwen3MoeForCausalLM",
    names=tensor_names.experts(
      "mlp",
      router="gate",
      gate="experts.{}.gate_proj",
      up="experts.{}.up_proj",
      down="experts.{}.down_proj",
    ),
    traits={"qk_norm": "head"},
    reads=ACT | BIAS | {"norm_topk_prob": Read(("norm_topk",), False)},
    defaults={"sliding_window": 4096},
    requires=frozenset({"moe_intermediate_size"}),
    aliases={
      "num_local_experts": "num_experts",
      "intermediate_size": "moe_intermediate_size",
    },
    # Layers without experts among the others would be another tree.
    only={"mlp_only_layers": ([], None), "decoder_sparse_step": (1, None)},
    harmless=BALANCE_LOSS,
    layer_types=windows.if_used,
    layer_fields=WINDOW_SWITCH,
    experts=True,
  ),
  "gpt_oss": Family(
    architecture="GptOssForCausalLM",
    names=tensor_names.experts(
      "mlp",
      router="router",
      gate="experts.gate_up_proj",
      up="experts.gate_up_proj",
      down="experts.down_proj",
    )
    | {"layers/attn": "model.layers.{}.self_attn"},
    traits={"mlp_bias": True, "attn_sinks": True},
    reads={
      "attention_bias": Read(("qkv_bias", "o_bias"), True),
      "swiglu_alpha": Read(("glu_alpha",), 1.702),
      "swiglu_limit": Read(("glu_limit",), 7.0),
    },
    defaults={
      "rms_norm_eps": 1e-5,
      "rope_theta": 150_000.0,
      "sliding_window": 128,
    },
    requires=HEAD_DIM,
    rope=_YARN_32,
    only={"hidden_act": ("silu", None)},
    # Two fields of the released files that say again what others say.
    harmless=BALANCE_LOSS | {"experts_per_token", "initial_context_length"},
    layer_types=windows.full_each("", 2),
    layer_fields=frozenset({"layer_types"}),
    experts=True,
    stacked_experts=True,
  ),
  "gpt2": Family(
    architecture="GPT2LMHeadModel",
    names=tensor_names.GPT2,
    traits={
      **{"norm": "layer", "learned_positions": True, "gated_mlp": False},
      **{"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    },
    reads={
      "activation_function": Read(("activation",), "gelu_new", ACTIVATIONS)
    },
    defaults=MHA
    | {
      "tie_word_embeddings": True,
      "rms_norm_eps": 1e-5,
      "intermediate_size": lambda raw: 4 * raw["hidden_size"],
    },
    aliases={
      "hidden_size": "n_embd",
      "num_hidden_layers": "n_layer",
      "num_attention_heads": "n_head",
      "intermediate_size": "n_inner",
      "max_position_embeddings": "n_positions",
      "rms_norm_eps": "layer_norm_epsilon",
    },
    only={
      "scale_attn_weights": (True, None),
      "scale_attn_by_inverse_layer_idx": (False, None),
    },
    # Dropout is a matter of pretraining; nothing here drops anything.
    harmless=frozenset(
      {
        *("attn_pdrop", "resid_pdrop", "embd_pdrop", "n_ctx"),
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
