"""config.json files as people have them: published values, odd fields included.

From memory of the published files; shortened lists aside, nothing is made up
to be easy. `WILD` is {name: config.json}.
"""

from typing import Any

Json = dict[str, Any]


def _llama(v, d, f, n, h, k, ctx=4096, theta=10000.0, eps=1e-5, **more) -> Json:
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": d,
    "initializer_range": 0.02,
    "intermediate_size": f,
    "max_position_embeddings": ctx,
    "num_attention_heads": h,
    "num_hidden_layers": n,
    "num_key_value_heads": k,
    "pretraining_tp": 1,
    "rms_norm_eps": eps,
    "rope_scaling": None,
    "rope_theta": theta,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
    "vocab_size": v,
  } | more


def _of(
  kind, architecture, v, d, f, n, h, k, ctx, theta=None, eps=1e-6, **more
) -> Json:
  return {
    "architectures": [architecture],
    "model_type": kind,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": d,
    "initializer_range": 0.02,
    "intermediate_size": f,
    "max_position_embeddings": ctx,
    "num_attention_heads": h,
    "num_hidden_layers": n,
    "num_key_value_heads": k,
    "rms_norm_eps": eps,
    **({"rope_theta": theta} if theta else {}),
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "vocab_size": v,
  } | more


def _qwen2(d, f, n, h, k, v=151936, ctx=32768, **more) -> Json:
  more = {
    **{"bos_token_id": 151643, "eos_token_id": 151645},
    **{"max_window_layers": n, "sliding_window": ctx},
    **{"tie_word_embeddings": False, "use_sliding_window": False},
  } | more
  return _of(
    "qwen2", "Qwen2ForCausalLM", v, d, f, n, h, k, ctx, 1000000.0, **more
  )


def _qwen3(d, f, n, h, k, ctx=40960, **more) -> Json:
  more = {
    **{"attention_bias": False, "head_dim": 128, "max_window_layers": n},
    **{"bos_token_id": 151643, "eos_token_id": 151645, "rope_scaling": None},
    **{"sliding_window": None, "use_sliding_window": False},
    **{"tie_word_embeddings": False},
  } | more
  return _of(
    "qwen3", "Qwen3ForCausalLM", 151936, d, f, n, h, k, ctx, 1000000, **more
  )


def _mistral(v, d, f, n, h, k, ctx, theta, **more) -> Json:
  more = {"tie_word_embeddings": False, "sliding_window": None} | more
  return _of(
    *("mistral", "MistralForCausalLM", v, d, f, n, h, k, ctx, theta, 1e-5),
    **more,
  )


def _gemma(kind, architecture, d, f, n, h, k, head, **more) -> Json:
  return {
    **{"architectures": [architecture], "model_type": kind},
    **{"attention_bias": False, "attention_dropout": 0.0},
    **{"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
    **{"head_dim": head, "hidden_size": d, "intermediate_size": f},
    **{"num_attention_heads": h, "num_hidden_layers": n},
    **{"num_key_value_heads": k, "rms_norm_eps": 1e-06},
    **{"initializer_range": 0.02, "torch_dtype": "bfloat16"},
    **{"transformers_version": "4.42.4", "use_cache": True},
  } | more


def _phi3(d, f, n, h, k, **more) -> Json:
  code = "microsoft/Phi-3-mini-4k-instruct--configuration_phi3.Phi3Config"
  more = {
    "auto_map": {"AutoConfig": code},
    **{"bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000},
    **{"attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    **{"original_max_position_embeddings": 4096, "rope_scaling": None},
    "tie_word_embeddings": False,
  } | more
  ctx, v = more.pop("ctx", 4096), more.pop("v", 32064)
  return _of(
    *("phi3", "Phi3ForCausalLM", v, d, f, n, h, k, ctx, 10000.0, 1e-5),
    **more,
  )


def _longrope(pairs: int) -> Json:
  return {
    "type": "longrope",
    "short_factor": [1.0 + i / 100 for i in range(pairs)],
    "long_factor": [1.0 + i / 2 for i in range(pairs)],
  }


def _gpt2(d, n, h, **more) -> Json:
  return {
    **{"activation_function": "gelu_new", "attn_pdrop": 0.1},
    **{"architectures": ["GPT2LMHeadModel"], "bos_token_id": 50256},
    **{"embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02},
    **{"layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024},
    **{"n_embd": d, "n_head": h, "n_layer": n, "n_positions": 1024},
    **{"resid_pdrop": 0.1, "summary_activation": None},
    **{"summary_first_dropout": 0.1, "summary_proj_to_labels": True},
    **{"summary_type": "cls_index", "summary_use_proj": True},
    "task_specific_params": {
      "text-generation": {"do_sample": True, "max_length": 50}
    },
    "vocab_size": 50257,
  } | more


def _nemotron_h(v, d, f, heads, width, ctx, pattern, **more) -> Json:
  code = "configuration_nemotron_h.NemotronHConfig"
  return {
    **{"architectures": ["NemotronHForCausalLM"], "attention_bias": False},
    **{"attention_dropout": 0.0, "auto_map": {"AutoConfig": code}},
    **{"bos_token_id": 1, "chunk_size": 128, "conv_kernel": 4},
    **{"eos_token_id": 2, "expand": 2, "head_dim": 128, "hidden_dropout": 0.0},
    **{"hidden_size": d, "hybrid_override_pattern": pattern},
    **{"initializer_range": 0.02, "intermediate_size": f},
    **{"layer_norm_epsilon": 1e-05, "mamba_head_dim": width},
    **{"mamba_hidden_act": "silu", "mamba_num_heads": heads},
    **{"mamba_proj_bias": False, "max_position_embeddings": ctx},
    **{"mlp_bias": False, "mlp_hidden_act": "relu2"},
    **{"model_type": "nemotron_h", "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "num_logits_to_keep": 1, "pad_token_id": 0},
    **{"rescale_prenorm_residual": True, "residual_in_fp32": False},
    **{"rms_norm_eps": 1e-05, "sliding_window": None, "ssm_state_size": 128},
    **{"tie_word_embeddings": False, "time_step_floor": 0.0001},
    **{"time_step_limit": [0.0, float("inf")], "time_step_max": 0.1},
    **{"time_step_min": 0.001, "time_step_rank": 256},
    **{"torch_dtype": "bfloat16", "transformers_version": "4.48.0.dev0"},
    **{"use_bias": False, "use_cache": True, "use_conv_bias": True},
    **{"vocab_size": v, **more},
  }


def _llama3_rope(factor: float) -> Json:
  return {
    **{"factor": factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0},
    **{"original_max_position_embeddings": 8192, "rope_type": "llama3"},
  }


_JS = {
  "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
}
_LLAMA31 = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}
_GRANITE = {
  **{"attention_bias": False, "bos_token_id": 0, "eos_token_id": 0},
  **{"mlp_bias": False, "pad_token_id": 0, "rope_scaling": None},
  **{"embedding_multiplier": 12.0, "logits_scaling": 8.0},
  **{"residual_multiplier": 0.22, "tie_word_embeddings": True},
}
_MOE = {"output_router_logits": False, "router_aux_loss_coef": 0.001}
_GEMMA3_ROPE = {"rope_theta": 1000000, "rope_local_base_freq": 10000}
_VISION = {
  **{"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304},
  **{"model_type": "siglip_vision_model", "num_attention_heads": 16},
  **{"num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False},
}


def _gemma4(d, f, n, h, k, **text) -> Json:
  return {
    **{"architectures": ["Gemma4ForConditionalGeneration"]},
    **{"audio_config": None, "audio_token_id": 258881, "dtype": "bfloat16"},
    **{"eos_token_id": [1, 106], "image_token_id": 258880},
    **{"model_type": "gemma4", "tie_word_embeddings": True},
    "text_config": {
      **{"attention_bias": False, "attention_dropout": 0.0},
      **{"bos_token_id": 2, "dtype": "bfloat16", "enable_moe_block": False},
      **{"eos_token_id": 1, "final_logit_softcapping": 30.0},
      **{"global_head_dim": 512, "head_dim": 256, "hidden_size": d},
      **{"hidden_activation": "gelu_pytorch_tanh", "intermediate_size": f},
      **{"hidden_size_per_layer_input": 0, "initializer_range": 0.02},
      **{"max_position_embeddings": 262144, "model_type": "gemma4_text"},
      **{"moe_intermediate_size": None, "num_attention_heads": h},
      **{"num_experts": None, "num_hidden_layers": n},
      **{"num_key_value_heads": k, "num_kv_shared_layers": 0},
      **{"pad_token_id": 0, "rms_norm_eps": 1e-06, "top_k_experts": None},
      "rope_parameters": {
        "full_attention": {
          **{"partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
          "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
      },
      **{"tie_word_embeddings": True, "use_cache": True},
      **{"use_bidirectional_attention": "vision", "vocab_size": 262144},
      **{"use_double_wide_mlp": False, "vocab_size_per_layer_input": 262144},
    }
    | text,
    "transformers_version": "5.5.0.dev0",
    "vision_config": {"model_type": "gemma4_vision"},
  }


WILD: dict[str, Json] = {
  "Llama-2-7b-hf": _llama(
    32000, 4096, 11008, 32, 32, 32, _name_or_path="meta-llama/Llama-2-7b-hf"
  ),
  "llama-7b of 2023": {
    **{"architectures": ["LlamaForCausalLM"], "bos_token_id": 0},
    **{"eos_token_id": 1, "hidden_act": "silu", "hidden_size": 4096},
    **{"intermediate_size": 11008, "initializer_range": 0.02},
    **{"max_sequence_length": 2048, "model_type": "llama"},
    **{"num_attention_heads": 32, "num_hidden_layers": 32},
    **{"pad_token_id": -1, "rms_norm_eps": 1e-06, "torch_dtype": "float16"},
    **{"transformers_version": "4.27.0.dev0", "use_cache": True},
    "vocab_size": 32000,
  },
  "vicuna-7b-v1.5-16k": _llama(
    *(32000, 4096, 11008, 32, 32, 32),
    rope_scaling={"factor": 4.0, "type": "linear"},
    max_sequence_length=16384,
    pad_token_id=0,
    temperature=0.9,
    top_p=0.6,
  ),
  "CodeLlama-7b": _llama(32016, 4096, 11008, 32, 32, 32, 16384, 1000000),
  "Meta-Llama-3-8B": _llama(
    128256, 4096, 14336, 32, 32, 8, 8192, 500000.0, bos_token_id=128000
  ),
  "Llama-3.1-8B-Instruct": _llama(
    *(128256, 4096, 14336, 32, 32, 8, 131072, 500000.0),
    rope_scaling=_llama3_rope(8.0),
    mlp_bias=False,
    **_LLAMA31,
  ),
  "Llama-3.2-1B-Instruct": _llama(
    *(128256, 2048, 8192, 16, 32, 8, 131072, 500000.0),
    rope_scaling=_llama3_rope(32.0),
    head_dim=64,
    tie_word_embeddings=True,
    **_LLAMA31,
  ),
  "unsloth Llama-3.2-1B": _llama(
    *(128256, 2048, 8192, 16, 32, 8, 131072, 500000.0),
    rope_scaling=_llama3_rope(32.0),
    head_dim=64,
    pad_token_id=128004,
    tie_word_embeddings=True,
    unsloth_fixed=True,
    unsloth_version="2025.3.19",
  ),
  "Llama-3.3-70B-Instruct": _llama(
    *(128256, 8192, 28672, 80, 64, 8, 131072, 500000.0),
    rope_scaling=_llama3_rope(8.0),
    head_dim=128,
  ),
  "TinyLlama-1.1B-Chat-v1.0": _llama(32000, 2048, 5632, 22, 32, 4, 2048),
  "SmolLM-135M": _llama(
    *(49152, 576, 1536, 30, 9, 3, 2048),
    _name_or_path="/fsx/smollm/checkpoints/200000",
    tie_word_embeddings=True,
  ),
  "SmolLM2-135M": _llama(
    *(49152, 576, 1536, 30, 9, 3, 8192, 100000),
    is_llama_config=True,
    rope_interleaved=False,
    tie_word_embeddings=True,
  ),
  "SmolLM2-1.7B-Instruct": _llama(
    *(49152, 2048, 8192, 24, 32, 32, 8192, 130000),
    pad_token_id=2,
    tie_word_embeddings=True,
    **_JS,
  ),
  "Yi-1.5-9B-Chat": _llama(
    64000, 4096, 11008, 48, 32, 4, 4096, 5000000.0, 1e-6, pad_token_id=0
  ),
  "deepseek-llm-7b-chat": _llama(
    102400, 4096, 11008, 30, 32, 32, eps=1e-6, bos_token_id=100000
  ),
  "deepseek-coder-1.3b": _llama(
    *(32256, 2048, 5504, 24, 16, 16, 16384, 100000, 1e-6),
    rope_scaling={"factor": 4.0, "type": "linear"},
  ),
  "DeepSeek-R1-Distill-Llama-8B": _llama(
    *(128256, 4096, 14336, 32, 32, 8, 131072, 500000.0),
    rope_scaling=_llama3_rope(8.0),
    mlp_bias=False,
  ),
  "SOLAR-10.7B": _llama(
    32000, 4096, 14336, 48, 32, 8, _name_or_path="upstage/SOLAR-10.7B-v1.0"
  ),
  "Nous-Hermes (dynamic)": _llama(
    *(32000, 4096, 11008, 32, 32, 32),
    rope_scaling={"factor": 2.0, "type": "dynamic"},
  ),
  "Falcon3-1B-Instruct": _llama(
    131072, 2048, 8192, 18, 8, 4, 8192, 1000042, 1e-6, head_dim=256
  ),
  "EuroLLM-1.7B": _llama(
    128000, 2048, 5632, 24, 16, 8, _name_or_path="./eurollm", head_dim=128
  ),
  "llama saved by transformers 5": {
    **_llama(32000, 2048, 5632, 22, 32, 4, 2048),
    **{"dtype": "bfloat16", "transformers_version": "5.0.0"},
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
  },
  "Mistral-7B-v0.1": _mistral(
    32000, 4096, 14336, 32, 32, 8, 32768, 10000.0, sliding_window=4096
  ),
  "Mistral-7B-Instruct-v0.3": _mistral(
    32768, 4096, 14336, 32, 32, 8, 32768, 1000000.0
  ),
  "Mistral-Nemo-Instruct-2407": _mistral(
    131072, 5120, 14336, 40, 32, 8, 1024000, 1000000.0, head_dim=128
  ),
  "Mistral-Small-24B-Instruct-2501": _mistral(
    131072, 5120, 32768, 40, 32, 8, 32768, 100000000.0, head_dim=128
  ),
  "zephyr-7b-beta": _mistral(
    *(32000, 4096, 14336, 32, 32, 8, 32768, 10000.0),
    _name_or_path="HuggingFaceH4/mistral-7b-sft-beta",
    pad_token_id=2,
    sliding_window=4096,
  ),
  "Mixtral-8x7B-Instruct-v0.1": _of(
    *("mixtral", "MixtralForCausalLM", 32000, 4096, 14336, 32, 32, 8),
    *(32768, 1000000.0, 1e-5),
    num_experts_per_tok=2,
    num_local_experts=8,
    sliding_window=None,
    tie_word_embeddings=False,
    **_MOE,
  ),
  "Qwen2-0.5B": _qwen2(896, 4864, 24, 14, 2, tie_word_embeddings=True),
  "Qwen2.5-0.5B": _qwen2(
    896, 4864, 24, 14, 2, tie_word_embeddings=True, use_mrope=False
  ),
  "Qwen2.5-7B-Instruct": _qwen2(3584, 18944, 28, 28, 4, 152064),
  "Qwen2.5-7B (YaRN by the card)": _qwen2(
    *(3584, 18944, 28, 28, 4, 152064, 131072),
    rope_scaling={
      **{"factor": 4.0, "type": "yarn"},
      "original_max_position_embeddings": 32768,
    },
  ),
  "Qwen2.5-Coder-1.5B": _qwen2(1536, 8960, 28, 12, 2, tie_word_embeddings=True),
  "DeepSeek-R1-Distill-Qwen-1.5B": _qwen2(
    1536, 8960, 28, 12, 2, ctx=131072, use_mrope=False, rope_theta=10000
  ),
  "unsloth Qwen2.5-3B": _qwen2(
    *(2048, 11008, 36, 16, 2),
    pad_token_id=151654,
    rope_scaling=None,
    tie_word_embeddings=True,
    unsloth_fixed=True,
  ),
  "Qwen1.5-0.5B-Chat": _qwen2(
    1024, 2816, 24, 16, 16, tie_word_embeddings=True, max_window_layers=21
  ),
  "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, 8, tie_word_embeddings=True),
  "Qwen3-8B": _qwen3(4096, 12288, 36, 32, 8),
  "Qwen3-4B-Instruct-2507": _qwen3(
    2560, 9728, 36, 32, 8, 262144, tie_word_embeddings=True, rope_theta=5000000
  ),
  "Qwen3-14B saved by unsloth": _qwen3(
    *(5120, 17408, 40, 40, 8),
    layer_types=["full_attention"] * 40,
    pad_token_id=151654,
    unsloth_version="2025.8.9",
  ),
  "Qwen3-30B-A3B": _of(
    *("qwen3_moe", "Qwen3MoeForCausalLM", 151936, 2048, 6144, 48, 32, 4),
    *(40960, 1000000.0),
    attention_bias=False,
    decoder_sparse_step=1,
    head_dim=128,
    max_window_layers=48,
    mlp_only_layers=[],
    moe_intermediate_size=768,
    norm_topk_prob=True,
    num_experts=128,
    num_experts_per_tok=8,
    rope_scaling=None,
    sliding_window=None,
    tie_word_embeddings=False,
    use_sliding_window=False,
    **_MOE,
  ),
  "gemma-2b": _gemma(
    *("gemma", "GemmaForCausalLM", 2048, 16384, 18, 8, 1, 256),
    hidden_act="gelu",
    hidden_activation=None,
    max_position_embeddings=8192,
    rope_scaling=None,
    rope_theta=10000.0,
    vocab_size=256000,
  ),
  "gemma-2-2b-it": _gemma(
    *("gemma2", "Gemma2ForCausalLM", 2304, 9216, 26, 8, 4, 256),
    attn_logit_softcapping=50.0,
    cache_implementation="hybrid",
    final_logit_softcapping=30.0,
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    max_position_embeddings=8192,
    query_pre_attn_scalar=256,
    rope_theta=10000.0,
    sliding_window=4096,
    vocab_size=256000,
  ),
  "gemma-3-1b-it": _gemma(
    *("gemma3_text", "Gemma3ForCausalLM", 1152, 6912, 26, 4, 1, 256),
    attn_logit_softcapping=None,
    cache_implementation="hybrid",
    final_logit_softcapping=None,
    hidden_activation="gelu_pytorch_tanh",
    max_position_embeddings=32768,
    query_pre_attn_scalar=256,
    rope_scaling=None,
    sliding_window=512,
    sliding_window_pattern=6,
    vocab_size=262144,
    **_GEMMA3_ROPE,
  ),
  "unsloth gemma-3-270m": _gemma(
    *("gemma3_text", "Gemma3ForCausalLM", 640, 2048, 18, 4, 1, 256),
    _sliding_window_pattern=6,
    hidden_activation="gelu_pytorch_tanh",
    layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
    max_position_embeddings=32768,
    query_pre_attn_scalar=256,
    sliding_window=512,
    unsloth_fixed=True,
    use_bidirectional_attention=False,
    vocab_size=262144,
    **_GEMMA3_ROPE,
  ),
  "gemma-3-4b-it": {
    **{"architectures": ["Gemma3ForConditionalGeneration"]},
    **{"boi_token_index": 255999, "eoi_token_index": 256000},
    **{"eos_token_id": [1, 106], "image_token_index": 262144},
    **{"initializer_range": 0.02, "mm_tokens_per_image": 256},
    **{"model_type": "gemma3", "torch_dtype": "bfloat16"},
    "text_config": {
      **{"hidden_size": 2560, "intermediate_size": 10240},
      **{"model_type": "gemma3_text", "num_hidden_layers": 34},
      "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
      "sliding_window": 1024,
    },
    **{"transformers_version": "4.50.0.dev0", "vision_config": _VISION},
  },
  "gemma-4-31B-it": _gemma4(
    *(5376, 21504, 60, 32, 16),
    **{"attention_k_eq_v": True, "num_global_key_value_heads": 4},
    layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 10,
    sliding_window=1024,
  ),
  "gemma-4-26B-A4B-it": _gemma4(
    *(2816, 2112, 30, 16, 8),
    **{"attention_k_eq_v": True, "num_global_key_value_heads": 2},
    **{"enable_moe_block": True, "moe_intermediate_size": 704},
    **{"num_experts": 128, "top_k_experts": 8, "sliding_window": 1024},
    layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 5,
  ),
  "gemma-4-E2B-it": _gemma4(
    *(1536, 6144, 35, 8, 1),
    **{"attention_k_eq_v": False, "num_global_key_value_heads": None},
    **{"hidden_size_per_layer_input": 256, "num_kv_shared_layers": 20},
    **{"sliding_window": 512, "use_bidirectional_attention": None},
    layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 7,
    use_double_wide_mlp=True,
  ),
  "OLMo-2-0425-1B": _of(
    *("olmo2", "Olmo2ForCausalLM", 100352, 2048, 8192, 16, 16, 16),
    *(4096, 500000),
    attention_bias=False,
    eos_token_id=100257,
    pad_token_id=100277,
    rope_scaling=None,
    tie_word_embeddings=False,
  ),
  "Olmo-3-7B-Instruct": _of(
    *("olmo3", "Olmo3ForCausalLM", 100278, 4096, 11008, 32, 32, 32),
    *(65536, 500000),
    attention_bias=False,
    layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8,
    rope_scaling={
      **{"attention_factor": 1.2079441541679836, "beta_fast": 32.0},
      **{"beta_slow": 1.0, "factor": 8.0, "rope_type": "yarn"},
      "original_max_position_embeddings": 8192,
    },
    sliding_window=4096,
    tie_word_embeddings=False,
  ),
  "Nemotron-H-8B-Base-8K": _nemotron_h(
    *(131072, 4096, 21504, 128, 64, 8192),
    "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    **{"attention_head_dim": 128, "num_hidden_layers": 52, "n_groups": 8},
  ),
  "Nemotron-3-Nano-30B-A3B": _nemotron_h(
    *(131072, 2688, 1856, 64, 64, 262144),
    "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    **{"moe_intermediate_size": 1856, "n_group": 1, "n_groups": 8},
    **{"moe_shared_expert_intermediate_size": 3712, "n_routed_experts": 128},
    **{"n_shared_experts": 1, "norm_topk_prob": True, "num_hidden_layers": 52},
    **{"num_experts_per_tok": 6, "partial_rotary_factor": 1.0},
    **{"routed_scaling_factor": 2.5, "topk_group": 1, "rope_theta": 10000},
    **{"num_key_value_heads": 2, "use_mamba_kernels": True},
  ),
  "Olmo-Hybrid-7B": _of(
    *("olmo_hybrid", "OlmoHybridForCausalLM", 100352, 3840, 11008, 32, 30, 30),
    65536,
    attention_bias=False,
    layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 8,
    linear_a_log_max=16.0,
    linear_allow_neg_eigval=True,
    linear_conv_kernel_dim=4,
    linear_key_head_dim=96,
    linear_num_key_heads=30,
    linear_num_value_heads=30,
    linear_value_head_dim=192,
    rope_parameters={"rope_theta": None, "rope_type": "default"},
    tie_word_embeddings=False,
  ),
  "SmolLM3-3B": _of(
    *("smollm3", "SmolLM3ForCausalLM", 128256, 2048, 11008, 36, 16, 4),
    *(65536, 5000000.0),
    attention_bias=False,
    layer_types=["full_attention"] * 36,
    max_window_layers=28,
    mlp_bias=False,
    no_rope_layer_interval=4,
    no_rope_layers=[1, 1, 1, 0] * 9,
    pad_token_id=128004,
    pretraining_tp=2,
    rope_scaling=None,
    sliding_window=None,
    use_sliding_window=False,
    **_JS,
  ),
  "Phi-3-mini-4k-instruct": _phi3(3072, 8192, 32, 32, 32, sliding_window=2047),
  "Phi-3.5-mini-instruct": _phi3(
    *(3072, 8192, 32, 32, 32),
    ctx=131072,
    rope_scaling=_longrope(48),
    sliding_window=262144,
  ),
  "Phi-3-medium-128k": _phi3(
    5120, 17920, 40, 40, 10, ctx=131072, rope_scaling=_longrope(64)
  ),
  "phi-4": _phi3(
    5120,
    17920,
    40,
    40,
    10,
    ctx=16384,
    v=100352,
    rope_theta=250000,
    sliding_window=None,
  ),
  "Phi-4-mini-instruct": _phi3(
    *(3072, 8192, 32, 24, 8),
    ctx=131072,
    full_attn_mod=1,
    interpolate_factor=1,
    lm_head_bias=False,
    mlp_bias=False,
    partial_rotary_factor=0.75,
    rope_scaling=_longrope(48),
    sliding_window=262144,
    tie_word_embeddings=True,
    v=200064,
  ),
  "granite-3.1-2b-instruct": _of(
    *("granite", "GraniteForCausalLM", 49155, 2048, 8192, 40, 32, 8),
    *(131072, 5000000.0, 1e-5),
    attention_multiplier=0.015625,
    **_GRANITE,
  ),
  "granite-3.3-8b-instruct": _of(
    *("granite", "GraniteForCausalLM", 49159, 4096, 12800, 40, 32, 8),
    *(131072, 10000000.0, 1e-5),
    attention_multiplier=0.0078125,
    **_GRANITE,
  ),
  "gpt-oss-20b in bfloat16": _of(
    *("gpt_oss", "GptOssForCausalLM", 201088, 2880, 2880, 24, 64, 8),
    *(131072, 150000, 1e-5),
    attention_bias=True,
    experts_per_token=4,
    head_dim=64,
    initial_context_length=4096,
    layer_types=["sliding_attention", "full_attention"] * 12,
    num_experts_per_tok=4,
    num_local_experts=32,
    output_router_logits=False,
    rope_scaling={
      **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0},
      **{"original_max_position_embeddings": 4096, "rope_type": "yarn"},
      "truncate": False,
    },
    router_aux_loss_coef=0.9,
    sliding_window=128,
    swiglu_limit=7.0,
    tie_word_embeddings=False,
  ),
  "Ministral-3-3B-Instruct in bfloat16": {
    "architectures": ["Mistral3ForConditionalGeneration"],
    **{"dtype": "bfloat16", "image_token_index": 10},
    **{"model_type": "mistral3", "multimodal_projector_bias": False},
    **{"projector_hidden_act": "gelu", "spatial_merge_size": 2},
    "text_config": {
      **{"attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu"},
      **{"hidden_size": 3072, "initializer_range": 0.02},
      **{"intermediate_size": 9216, "max_position_embeddings": 262144},
      **{"model_type": "ministral3", "num_attention_heads": 32},
      **{"num_hidden_layers": 26, "num_key_value_heads": 8},
      "rms_norm_eps": 1e-05,
      "rope_parameters": {
        **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0},
        **{"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0},
        "original_max_position_embeddings": 16384,
        **{"rope_theta": 1000000.0, "rope_type": "yarn", "type": "yarn"},
      },
      **{"sliding_window": None, "tie_word_embeddings": True},
      **{"use_cache": True, "vocab_size": 131072},
    },
    **{"transformers_version": "5.0.0.dev0", "vision_feature_layer": -1},
    "vision_config": {"model_type": "pixtral", "hidden_size": 1024},
  },
  "Mistral-Small-3.1-24B": {
    "architectures": ["Mistral3ForConditionalGeneration"],
    **{"image_token_index": 10, "model_type": "mistral3"},
    "text_config": {
      **{"attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu"},
      **{"hidden_size": 5120, "intermediate_size": 32768},
      **{"max_position_embeddings": 131072, "model_type": "mistral"},
      **{"num_attention_heads": 32, "num_hidden_layers": 40},
      **{"num_key_value_heads": 8, "rms_norm_eps": 1e-05},
      **{"rope_theta": 1000000000.0, "sliding_window": None},
      **{"use_cache": True, "vocab_size": 131072},
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"model_type": "pixtral", "hidden_size": 1024},
  },
  "Qwen2.5-VL-3B-Instruct": _qwen2(
    *(2048, 11008, 36, 16, 2),
    architectures=["Qwen2_5_VLForConditionalGeneration"],
    image_token_id=151655,
    max_window_layers=70,
    model_type="qwen2_5_vl",
    rope_scaling={"mrope_section": [16, 24, 24], "type": "mrope"},
    tie_word_embeddings=True,
    video_token_id=151656,
    vision_config={"depth": 32, "hidden_act": "silu", "hidden_size": 1280},
    vision_end_token_id=151653,
  ),
  "Qwen3-VL-4B-Instruct": {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    **{"image_token_id": 151655, "model_type": "qwen3_vl"},
    "text_config": {
      **{"attention_bias": False, "attention_dropout": 0.0},
      **{"bos_token_id": 151643, "dtype": "bfloat16", "head_dim": 128},
      **{"eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 2560},
      **{"initializer_range": 0.02, "intermediate_size": 9728},
      **{"max_position_embeddings": 262144, "model_type": "qwen3_vl_text"},
      **{"num_attention_heads": 32, "num_hidden_layers": 36},
      **{"num_key_value_heads": 8, "rms_norm_eps": 1e-06},
      "rope_scaling": {
        **{"mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        "rope_type": "default",
      },
      **{"rope_theta": 5000000, "tie_word_embeddings": True},
      **{"use_cache": True, "vocab_size": 151936},
    },
    **{"tie_word_embeddings": True, "transformers_version": "4.57.0.dev0"},
    **{"video_token_id": 151656, "vision_config": {"depth": 24}},
  },
  "gpt2": _gpt2(768, 12, 12),
  "gpt2-medium": _gpt2(1024, 24, 16, n_special=0, predict_special_tokens=True),
  "distilgpt2": _gpt2(
    768, 6, 12, _num_labels=1, id2label={"0": "LABEL_0"}, label2id={"L": 0}
  ),
  "DialoGPT-small": _gpt2(768, 12, 12, conversational=True),
}
