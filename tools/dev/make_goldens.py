"""Writes tests/models/goldens: what transformers computes for tiny models.

    python tools/dev/make_goldens.py [case ...]

Each case is a model folder as transformers saves it (bfloat16, so that it is
small and exact in float32) and `golden.npz`: tokens, logits, the norm of the
gradient of every tensor, and a greedy continuation. Weights are wide: at the
usual 0.02 attention is uniform and half of all mistakes are invisible.
Windows are shorter than the rows and rows longer than the original context.
Needs torch and transformers; the tests that read the goldens do not.
"""

import argparse
import json
import shutil
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from sft_jax.models.hf import parameter_map

# Matrices this small are slower on several threads.
torch.set_num_threads(1)

GOLDENS = Path(__file__).parents[2] / "tests" / "models" / "goldens"

ROWS, LENGTH, PROMPT, NEW = 2, 40, 5, 64


class Case(NamedTuple):
  """One tiny model.

  Attributes:
    family: `model_type`.
    fields: of its config, beside SIZES.
    shard: size above which the weights are split over files.
    old: the config is written in the form of transformers 4.
    prompt: tokens before the greedy continuation.
    new: tokens of that continuation.
  """

  family: str
  fields: dict[str, Any]
  shard: str = "1GB"
  old: bool = False
  prompt: int = PROMPT
  new: int = NEW


SIZES: dict[str, Any] = {
  "vocab_size": 61,
  "num_hidden_layers": 2,
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 128,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "pad_token_id": 0,
}


def rope(kind: str = "default", theta: float = 1000.0, **fields: Any) -> dict:
  """The rotary fields of a config."""
  return {"rope_type": kind, "rope_theta": theta, **fields}


LLAMA3 = rope(
  "llama3",
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
)
YARN = rope(
  "yarn",
  factor=4.0,
  beta_fast=4.0,
  beta_slow=1.0,
  original_max_position_embeddings=16,
)
LONGROPE = rope(
  "longrope",
  short_factor=[1.0, 1.1, 1.3],
  long_factor=[1.5, 2.5, 4.0],
  original_max_position_embeddings=16,
  partial_rotary_factor=0.75,
)
LOCAL_LAYER, FULL_LAYER = "sliding_attention", "full_attention"
LINEAR_LAYER = "linear_attention"
TWO_ROPES = {
  LOCAL_LAYER: rope(theta=100.0),
  FULL_LAYER: rope("linear", factor=4.0),
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

ROUTED = {
  **{"moe_intermediate_size": 16, "n_routed_experts": 8, "n_group": 4},
  **{"topk_group": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1},
  **{"n_shared_experts": 2, "routed_scaling_factor": 1.5},
}
LATENT = {
  **{"num_key_value_heads": 4, "kv_lora_rank": 12, "v_head_dim": 8},
  **{"qk_nope_head_dim": 6, "qk_rope_head_dim": 4},
}

MAMBA = {
  **{"mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_d_state": 7},
  "mamba_proj_bias": True,
}
GRANITE: dict[str, Any] = {
  **{"embedding_multiplier": 3.0, "attention_multiplier": 0.2},
  **{"residual_multiplier": 0.7, "logits_scaling": 0.5},
  "rope_parameters": rope(),
  **TIED,
}
GRANITE_HYBRID = {
  "num_hidden_layers": 3,
  "layer_types": [LINEAR_LAYER, FULL_LAYER, LINEAR_LAYER],
  "position_embedding_type": "rope",
  **MAMBA,
  **GRANITE,
}
GEMMA4 = {
  "num_hidden_layers": 4,
  "layer_types": [LOCAL_LAYER, FULL_LAYER] * 2,
  **{"head_dim": 6, "global_head_dim": 12, "sliding_window": 7},
  **{"attention_k_eq_v": True, "num_global_key_value_heads": 1},
  "final_logit_softcapping": 5.0,
  "rope_parameters": {
    LOCAL_LAYER: rope(theta=100.0),
    FULL_LAYER: rope("proportional", partial_rotary_factor=0.5),
  },
  "hidden_size_per_layer_input": 0,
  **TIED,
}
DELTA = {
  **{"head_dim": 12, "linear_num_key_heads": 2, "linear_key_head_dim": 6},
  "linear_value_head_dim": 5,
  "rope_parameters": rope(partial_rotary_factor=0.5),
}
DELTA_MOE = {
  "layer_types": [LINEAR_LAYER, FULL_LAYER],
  **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 12},
  **{"num_experts": 4, "num_experts_per_tok": 2, **DELTA},
}

# The reference's own code; its kernels refuse some sizes of experts.
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}

CASES: dict[str, Case] = {
  "llama": Case("llama", {"head_dim": 10, "rope_parameters": LLAMA3, **UNTIED}),
  "llama_old_config": Case(
    "llama",
    {
      "attention_bias": True,
      "mlp_bias": True,
      "rope_parameters": rope("linear", factor=2.0),
      **TIED,
    },
    old=True,
  ),
  "llama_dynamic": Case(
    "llama",
    {
      "num_key_value_heads": 1,
      "max_position_embeddings": 16,
      "rope_parameters": rope("dynamic", factor=2.0),
      **TIED,
    },
    # Keys cached under an earlier length are not what the reference computes
    # anew; see docs/models.md.
    new=11,
  ),
  "mistral": Case(
    "mistral",
    {"head_dim": 10, "sliding_window": 7, "rope_parameters": rope(), **UNTIED},
  ),
  "ministral3": Case(
    "ministral3",
    {
      "head_dim": 10,
      "rope_parameters": YARN
      | {"mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.5},
      **UNTIED,
    },
  ),
  "qwen2_sharded": Case(
    "qwen2",
    {
      "use_sliding_window": True,
      "sliding_window": 9,
      "max_window_layers": 1,
      "rope_parameters": YARN,
      **UNTIED,
    },
    shard="10KB",
  ),
  "qwen3": Case("qwen3", {"head_dim": 10, "rope_parameters": rope(), **TIED}),
  "gemma": Case(
    "gemma",
    {
      "head_dim": 10,
      "num_key_value_heads": 1,
      "rope_parameters": rope(),
      **TIED,
    },
  ),
  "gemma2": Case(
    "gemma2",
    {
      "head_dim": 10,
      "sliding_window": 7,
      "query_pre_attn_scalar": 16,
      "attn_logit_softcapping": 2.0,
      "final_logit_softcapping": 5.0,
      "rope_parameters": rope(),
      **TIED,
    },
  ),
  "gemma3_text": Case(
    "gemma3_text",
    {
      "num_hidden_layers": 3,
      "layer_types": [LOCAL_LAYER, FULL_LAYER, LOCAL_LAYER],
      "head_dim": 10,
      "sliding_window": 7,
      "query_pre_attn_scalar": 16,
      "final_logit_softcapping": 5.0,
      "rope_parameters": TWO_ROPES,
      **TIED,
    },
  ),
  "gemma4_text": Case("gemma4_text", GEMMA4),
  "gemma4_text_moe": Case(
    "gemma4_text",
    {
      **GEMMA4,
      "enable_moe_block": True,
      **{"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    },
  ),
  "gemma4_text_shared": Case(
    "gemma4_text",
    {
      **GEMMA4,
      "num_hidden_layers": 5,
      "layer_types": [FULL_LAYER, *[LOCAL_LAYER] * 3, FULL_LAYER],
      **{"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
      **{"attention_k_eq_v": False, "num_global_key_value_heads": None},
      **{"hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": 96},
    },
  ),
  "olmo2": Case(
    "olmo2",
    {"num_key_value_heads": 4, "rope_parameters": rope(), **UNTIED},
  ),
  "olmo3": Case(
    "olmo3",
    {
      "layer_types": [LOCAL_LAYER, FULL_LAYER],
      "sliding_window": 7,
      "rope_parameters": {LOCAL_LAYER: rope(), FULL_LAYER: YARN},
      **UNTIED,
    },
  ),
  "smollm3": Case(
    "smollm3",
    {
      "num_hidden_layers": 3,
      "no_rope_layers": [1, 0, 1],
      "rope_parameters": rope(),
      **TIED,
    },
  ),
  "phi3": Case(
    "phi3",
    {
      "hidden_size": 32,
      "sliding_window": 19,
      "original_max_position_embeddings": 16,
      "rope_parameters": LONGROPE,
      **UNTIED,
    },
    # From the start longer than the original context; see docs/models.md.
    prompt=17,
  ),
  "glm4": Case(
    "glm4",
    {
      "head_dim": 12,
      "rope_parameters": rope(partial_rotary_factor=0.5),
      **UNTIED,
    },
  ),
  "seed_oss": Case(
    "seed_oss",
    {
      "head_dim": 10,
      "attention_out_bias": True,
      "rope_parameters": rope(),
      **UNTIED,
    },
  ),
  "exaone4": Case(
    "exaone4",
    {
      "layer_types": [LOCAL_LAYER, FULL_LAYER],
      "sliding_window": 7,
      "rope_parameters": LLAMA3,
      **UNTIED,
    },
  ),
  "ernie4_5": Case(
    "ernie4_5", {"head_dim": 10, "rope_parameters": rope(), **TIED}
  ),
  "hunyuan_v1_dense": Case(
    "hunyuan_v1_dense",
    {
      "head_dim": 10,
      "rope_parameters": rope("dynamic", alpha=50.0, factor=1.0),
      **TIED,
    },
  ),
  "cohere2": Case(
    "cohere2",
    {
      "layer_types": [LOCAL_LAYER, FULL_LAYER],
      "sliding_window": 7,
      "logit_scale": 0.5,
      "attention_bias": True,
      "rope_parameters": rope(),
      **TIED,
    },
  ),
  "apertus": Case("apertus", {"rope_parameters": LLAMA3, **UNTIED}),
  "lfm2": Case(
    "lfm2",
    {
      "num_hidden_layers": 3,
      "layer_types": ["conv", FULL_LAYER, "conv"],
      "conv_bias": True,
      "block_auto_adjust_ff_dim": True,
      "block_multiple_of": 8,
      "rope_parameters": rope(),
      **TIED,
    },
  ),
  "qwen3_5": Case(
    "qwen3_5_text",
    {
      "num_hidden_layers": 4,
      "layer_types": [LINEAR_LAYER, FULL_LAYER] * 2,
      **{"linear_num_value_heads": 4, **DELTA, **TIED},
    },
  ),
  "olmo_hybrid": Case(
    "olmo_hybrid",
    {
      **{"num_hidden_layers": 3, "rms_norm_eps": 1e-3},
      "layer_types": [LINEAR_LAYER, FULL_LAYER, LINEAR_LAYER],
      **{"linear_num_key_heads": 2, "linear_key_head_dim": 6},
      **{"linear_num_value_heads": 4, "linear_value_head_dim": 5},
      "rope_parameters": rope(),
      **UNTIED,
    },
  ),
  "qwen3_next": Case(
    "qwen3_next", {"linear_num_value_heads": 4, **DELTA_MOE, **UNTIED}
  ),
  "qwen3_5_moe": Case(
    "qwen3_5_moe_text",
    {
      **{"linear_num_value_heads": 2, "intermediate_size": None},
      **{**DELTA_MOE, **TIED},
    },
  ),
  "lfm2_moe": Case(
    "lfm2_moe",
    {
      "num_hidden_layers": 3,
      "layer_types": ["conv", FULL_LAYER, "conv"],
      "moe_intermediate_size": 16,
      "num_dense_layers": 1,
      "num_experts": 4,
      "num_experts_per_tok": 2,
      "routed_scaling_factor": 1.5,
      "rope_parameters": rope(),
      **TIED,
    },
  ),
  "granitemoehybrid": Case(
    "granitemoehybrid",
    {"num_local_experts": 0, "shared_intermediate_size": 40, **GRANITE_HYBRID},
  ),
  "granitemoehybrid_moe": Case(
    "granitemoehybrid",
    {
      **GRANITE_HYBRID,
      **{"intermediate_size": 16, "shared_intermediate_size": 12},
      **{"num_local_experts": 4, "num_experts_per_tok": 2},
    },
  ),
  "bamba": Case(
    "bamba",
    {
      **{"num_hidden_layers": 3, "hidden_size": 32, "attn_layer_indices": [1]},
      **MAMBA,
      "rope_parameters": rope(partial_rotary_factor=0.5),
      **UNTIED,
    },
  ),
  "nemotron_h": Case(
    "nemotron_h",
    {
      "layers_block_type": [
        LINEAR_LAYER,
        "moe",
        FULL_LAYER,
        LINEAR_LAYER,
        "mlp",
      ],
      **{"head_dim": 10, "mamba_num_heads": 4, "mamba_head_dim": 5},
      **{"n_groups": 2, "ssm_state_size": 7, "use_bias": True},
      **{"time_step_min": 0.6, **ROUTED},
      "moe_shared_expert_intermediate_size": 12,
      **UNTIED,
    },
  ),
  "granite": Case("granite", {"attention_bias": True, **GRANITE}),
  "mixtral": Case(
    "mixtral",
    {
      "head_dim": 10,
      "intermediate_size": 16,
      "num_key_value_heads": 1,
      "num_local_experts": 4,
      "num_experts_per_tok": 2,
      "sliding_window": 7,
      "rope_parameters": rope(),
      **UNTIED,
    },
  ),
  "qwen3_moe": Case(
    "qwen3_moe",
    {
      "head_dim": 10,
      "moe_intermediate_size": 16,
      "num_experts": 4,
      "num_experts_per_tok": 1,
      "rope_parameters": rope(),
      **TIED,
    },
  ),
  "olmoe": Case(
    "olmoe",
    {
      "intermediate_size": 16,
      "num_experts": 4,
      "num_experts_per_tok": 3,
      "rope_parameters": rope(),
      **UNTIED,
    },
  ),
  "glm4_moe": Case(
    "glm4_moe",
    {
      **ROUTED,
      **{"head_dim": 12, "use_qk_norm": True, "attention_bias": True},
      "rope_parameters": rope(partial_rotary_factor=0.5),
      **UNTIED,
    },
  ),
  "minimax_m2": Case(
    "minimax_m2",
    {
      **{"head_dim": 12, "intermediate_size": 16},
      **{"num_local_experts": 4, "num_experts_per_tok": 2},
      "rope_parameters": rope(partial_rotary_factor=0.5),
      **UNTIED,
    },
  ),
  "ernie4_5_moe": Case(
    "ernie4_5_moe",
    {
      **{"num_hidden_layers": 3, "moe_intermediate_size": 16, "moe_k": 2},
      **{"moe_num_experts": 4, "moe_layer_end_index": 1},
      "rope_parameters": rope(),
      **TIED,
    },
  ),
  "deepseek_v2": Case(
    "deepseek_v2",
    {
      **ROUTED,
      **LATENT,
      **{"topk_method": "group_limited_greedy", "q_lora_rank": None},
      "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
      **UNTIED,
    },
  ),
  "deepseek_v3": Case(
    "deepseek_v3",
    {
      **ROUTED,
      **LATENT,
      "q_lora_rank": 14,
      "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
      **UNTIED,
    },
  ),
  "glm4_moe_lite": Case(
    "glm4_moe_lite",
    {
      **{k: v for k, v in ROUTED.items() if k != "first_k_dense_replace"},
      **LATENT,
      **{"v_head_dim": 14, "q_lora_rank": 14, "n_group": 1, "topk_group": 1},
      "rope_parameters": rope(),
      **UNTIED,
    },
  ),
  "gpt_oss": Case(
    "gpt_oss",
    {
      "head_dim": 10,
      "intermediate_size": 16,
      "num_local_experts": 4,
      "num_experts_per_tok": 3,
      "sliding_window": 7,
      "swiglu_limit": 1.0,
      "rope_parameters": YARN | {"truncate": False, "factor": 8.0},
      **UNTIED,
    },
  ),
  "gpt2": Case(
    "gpt2",
    {
      "n_inner": 40,
      "num_key_value_heads": None,
      "intermediate_size": None,
      **TIED,
    },
  ),
}


def seed_of(name: str) -> int:
  """A case's own seed: cases to come leave the others as they are."""
  return zlib.crc32(name.encode())


def make_model(case: Case, seed: int) -> Any:
  """A random float32 model whose weights are exact in bfloat16."""
  config = transformers.AutoConfig.for_model(
    case.family, **(SIZES | case.fields)
  )
  model = transformers.AutoModelForCausalLM.from_config(
    config, dtype=torch.float32, **PLAIN
  )
  rng = np.random.default_rng(seed)
  # Norms of some families add 1 to their weights.
  offset = case.family.startswith(("gemma", "qwen3_5", "qwen3_next"))
  offset &= case.family != "gemma4_text"
  with torch.no_grad():
    corrections = [
      (key, buffer)
      for key, buffer in model.named_buffers()
      if key.endswith(("correction_bias", "expert_bias", "layer_scalar"))
    ]
    for key, weight in [*model.named_parameters(), *corrections]:
      ones = ("norm", ".ln_", "layer_scalar", "per_expert_scale")
      norm = any(name in key for name in ones)
      about = float(norm and (not offset or "linear_attn" in key))
      fresh = rng.standard_normal(weight.shape) * 0.3 + about
      weight.copy_(torch.tensor(fresh).bfloat16().float())
  return model.eval()


def compute(model: Any, case: Case) -> dict[str, Any]:
  """Logits, loss, gradients and a greedy continuation."""
  rng = np.random.default_rng(0)
  vocab = model.config.vocab_size
  tokens = torch.tensor(rng.integers(3, vocab, (ROWS, LENGTH)))
  logits = model(tokens).logits
  # Summed cross-entropy of every next token.
  loss = torch.nn.functional.cross_entropy(
    logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
  )
  model.zero_grad()
  loss.backward()
  sequence = tokens[:1, : case.prompt]
  with torch.no_grad():
    for _ in range(case.new):
      best = model(sequence).logits[:, -1].argmax(-1, keepdim=True)
      sequence = torch.cat((sequence, best), dim=1)
  return {
    "tokens": tokens.numpy().astype(np.int32),
    "logits": logits.detach().numpy(),
    "loss": loss.detach().numpy(),
    "prompt": np.int32(case.prompt),
    "greedy": sequence[0].numpy().astype(np.int32),
    **_gradients(model),
  }


def _gradients(model: Any) -> dict[str, np.ndarray]:
  """By the names of the family's table: in memory all experts are one."""
  state = {
    key: weight.grad
    for key, weight in model.named_parameters()
    if weight.requires_grad
  }
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder, state_dict=state)
    tensors = load_file(Path(folder) / "model.safetensors")
  found = parameter_map.by_table_name(tensors, model.config.model_type)
  return {
    f"gradient/{key}": np.concatenate(parts) if len(parts) > 1 else parts[0]
    for key, parts in found.items()
  }


def norms(golden: dict[str, Any]) -> dict[str, Any]:
  """The same with the norm of each gradient in its place, to be small."""
  return {
    key: np.linalg.norm(x) if key.startswith("gradient/") else x
    for key, x in golden.items()
  }


def write_model(model: Any, case: Case, folder: Path) -> None:
  """Writes a model folder in bfloat16, of which corrections are float32."""
  model.bfloat16()
  for key, x in [*model.named_parameters(), *model.named_buffers()]:
    if "correction" in key:
      x.data = x.data.float()
  model.save_pretrained(folder, max_shard_size=case.shard)
  model.float()
  if case.old:
    _age(folder / "config.json")


def _age(path: Path) -> None:
  """Rewrites a config in the form of transformers 4."""
  raw = json.loads(path.read_text())
  rope = raw.pop("rope_parameters")
  raw["rope_theta"] = rope["rope_theta"]
  raw["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
  raw["torch_dtype"] = raw.pop("dtype")
  path.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def main() -> None:
  """Writes the named cases anew, or all."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("case", nargs="*", choices=[*CASES, []])
  warnings.simplefilter("ignore")
  for name in parser.parse_args().case or CASES:
    case = CASES[name]
    shutil.rmtree(GOLDENS / name, ignore_errors=True)
    model = make_model(case, seed_of(name))
    golden = norms(compute(model, case))
    write_model(model, case, GOLDENS / name)
    np.savez_compressed(GOLDENS / name / "golden.npz", **golden)
    size = sum(p.stat().st_size for p in (GOLDENS / name).iterdir())
    print(f"{name}: {size / 1000:.0f} kB")


if __name__ == "__main__":
  main()
