"""Qwen3 4B, all of its parameters, on one GPU of 141 GB or four TPU v5p.

    python -m sft_jax.main --config=configs/models/qwen3_4b_full.py \
        --config.data.train=my_rows.jsonl

Hardware: one GPU of 141 GB. Predicted, by
`sft-jax plan --config=... --topology=gpu-141GB --quick`: 100 of 141 GB
(parameters and moments in float32 take 48, gradients and their sums 32), at
most 35,600 tokens/s on an H200. Not measured yet.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config()
  config.workdir = "runs/qwen3_4b_full"
  config.batch_size = 32
  config.accum_steps = 8
  config.model.path = "Qwen/Qwen3-4B"
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.mesh.data = 1
  config.mesh.fsdp = -1
  config.data.train = "data/train.jsonl"
  config.data.seq_len = 4096
  config.optim.learning_rate = 1e-5
  config.export_dtype = "bfloat16"
  return config
