"""config.json: both generations read alike; what is not done is refused."""

import dataclasses
import json

import pytest

from sft_jax.models.config import Rope, config_from_fields, parse_config

BASE = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "vocab_size": 100,
  "num_hidden_layers": 2,
  "hidden_size": 32,
  "intermediate_size": 64,
  "num_attention_heads": 4,
  "max_position_embeddings": 128,
  "rms_norm_eps": 1e-5,
}
LLAMA3 = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}


def test_both_generations_of_the_file_mean_the_same():
  old = parse_config(
    BASE
    | {
      "torch_dtype": "bfloat16",
      "rope_theta": 500.0,
      "rope_scaling": {"rope_type": "llama3"} | LLAMA3,
    }
  )
  new = parse_config(
    BASE
    | {
      "dtype": "bfloat16",
      "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0} | LLAMA3,
    }
  )
  assert old == new
  assert old.rope == Rope(500.0, "llama3", 8.0, 1.0, 4.0, 64)


def test_defaults_of_old_llama_files():
  config = parse_config(BASE)
  assert config.num_kv_heads == 4
  assert config.head_dim == 8
  assert config.rope == Rope(10_000.0)
  assert not config.tie_embeddings


def test_families_are_fields():
  kv = {"num_key_value_heads": 2, "head_dim": 8}
  arch = lambda name: {"architectures": [f"{name}ForCausalLM"]}
  llama = parse_config(BASE | kv)
  qwen2 = parse_config(BASE | kv | arch("Qwen2") | {"model_type": "qwen2"})
  qwen3 = parse_config(BASE | kv | arch("Qwen3") | {"model_type": "qwen3"})
  assert qwen2 == dataclasses.replace(llama, family="qwen2", qkv_bias=True)
  assert qwen3 == dataclasses.replace(llama, family="qwen3", qk_norm=True)


def test_the_raw_file_is_kept():
  raw = BASE | {"pad_token_id": 7}
  assert parse_config(raw).raw == raw


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"model_type": "gpt_neox"}, "model_type='gpt_neox'"),
    ({"model_type": None}, "model_type=None"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "Classification"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"mlp_bias": True}, "mlp_bias=True"),
    ({"sliding_window": 64}, "sliding_window=64"),
    ({"use_sliding_window": True}, "use_sliding_window=True"),
    ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    ({"num_experts": 8}, "num_experts=8"),
    ({"hidden_size": None}, "hidden_size=None"),
    ({"vocab_size": "100"}, "vocab_size='100'"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ({"head_dim": 7}, "head_dim=7"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
    ({"rope_scaling": {"type": "linear"}}, "factor=None"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq"),
    ({"rope_scaling": 2.0}, "rope_scaling=2.0"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (
      {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}},
      "partial_rotary_factor=0.5",
    ),
    ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "rope_theta"),
    (
      {
        "rope_parameters": {"rope_theta": 1e4},
        "rope_scaling": {"type": "linear", "factor": 2.0},
      },
      "rope_scaling",
    ),
  ],
)
def test_what_is_not_implemented_is_refused_by_name(change, named):
  with pytest.raises(ValueError, match=named) as error:
    parse_config(BASE | change, where="some/config.json")
  assert "some/config.json" in str(error.value)
  assert "expected" in str(error.value)


def test_disabled_sliding_windows_are_accepted():
  off = {"sliding_window": 64, "use_sliding_window": False}
  assert parse_config(BASE | off) == parse_config(BASE)


def test_a_new_model_is_written_as_transformers_writes_it():
  config = config_from_fields(
    "qwen3",
    vocab_size=64,
    num_layers=2,
    d_model=40,
    d_ff=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=32,
  )
  again = parse_config(json.loads(json.dumps(config.raw)))
  assert again == config
  assert config.init_std == pytest.approx(0.1)
