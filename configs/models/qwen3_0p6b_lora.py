"""Qwen3 0.6B with LoRA on every linear layer: a first run on a new machine.

    python -m sft_jax.main --config=configs/models/qwen3_0p6b_lora.py \
        --config.data.train=my_rows.jsonl

Hardware: one chip of 16 GB, or more of them. Predicted, by
`sft-jax plan --config=... --topology=v5e:2x2`: 5.6 of 16.9 GB and
15,900 tokens/s per chip, by the compiler's cycles. Not measured yet.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config()
  config.workdir = "runs/qwen3_0p6b_lora"
  config.batch_size = 16
  config.model.path = "Qwen/Qwen3-0.6B"
  config.model.dtype = "bfloat16"
  config.model.param_dtype = "bfloat16"  # The base's; adapters are float32.
  config.model.remat = "attention"
  config.loss.chunk_tokens = 2048
  config.lora.rank = 16
  config.lora.alpha = 32.0
  config.data.train = "data/train.jsonl"
  config.data.seq_len = 2048
  config.optim.learning_rate = 2e-4
  return config
