"""Qwen3 30B-A3B, 128 experts, with LoRA on attention, on 16 TPU v6e.

    python -m sft_jax.main --config=configs/models/moe_tpu.py \
        --config.data.train=my_rows.jsonl

Hardware: 16 chips of TPU v6e; all of its parameters with moments in float32
do not fit on them. Predicted, by
`sft-jax plan --config=... --topology=v6e:4x4 --quick`: 15.9 of 33.6 GB
per chip, at most 115,000 tokens/s. Not measured yet.
"""

import ml_collections

from configs.models import llama3_8b_tpu_v5p


def get_config() -> ml_collections.ConfigDict:
  config = llama3_8b_tpu_v5p.get_config()
  config.workdir = "runs/moe_tpu"
  config.batch_size = 16
  config.accum_steps = 1
  config.model.path = "Qwen/Qwen3-30B-A3B"
  config.model.param_dtype = "bfloat16"
  config.lora.rank = 16
  config.lora.alpha = 32.0
  config.lora.targets = "attention"
  config.data.seq_len = 2048
  config.optim.learning_rate = 2e-4
  return config
