"""Llama 3.3 70B, all of its parameters, on 64 chips of TPU v5p.

    python -m sft_jax.main --config=configs/models/llama3_70b_tpu_v5p.py \
        --config.data.train=my_rows.jsonl

Hardware: 64 chips of TPU v5p. Predicted, by
`sft-jax plan --config=... --topology=v5p:4x4x4 --quick`: 39.1 of
102.8 GB per chip, at most 57,500 tokens/s. Not measured yet.
"""

import ml_collections

from configs.models import llama3_8b_tpu_v5p


def get_config() -> ml_collections.ConfigDict:
  config = llama3_8b_tpu_v5p.get_config()
  config.workdir = "runs/llama3_70b_tpu_v5p"
  config.batch_size = 64
  config.accum_steps = 1
  config.model.path = "meta-llama/Llama-3.3-70B-Instruct"
  config.model.remat = "full"  # With "norms" 95 of 102.8 GB are taken.
  return config
