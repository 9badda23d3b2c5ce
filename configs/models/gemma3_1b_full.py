"""Gemma 3 1B, all of its parameters, on one GPU of 40 GB or four TPU v5e.

    python -m sft_jax.main --config=configs/models/gemma3_1b_full.py \
        --config.data.train=my_rows.jsonl

Hardware: one GPU of 40 GB. Predicted, by
`sft-jax plan --config=... --topology=gpu-40GB --quick`: 26 of 40 GB
(parameters and moments in float32 take 12, gradients and their sums 8), at most
50,600 tokens/s on an A100. Not measured yet. A vocabulary of 262,144 makes the
head a third of the work.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config()
  config.workdir = "runs/gemma3_1b_full"
  config.batch_size = 32
  config.accum_steps = 4
  config.model.path = "google/gemma-3-1b-it"
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.mesh.data = 1
  config.mesh.fsdp = -1
  config.data.train = "data/train.jsonl"
  config.data.seq_len = 2048
  config.optim.learning_rate = 1e-5
  config.export_dtype = "bfloat16"
  return config
