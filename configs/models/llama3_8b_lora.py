"""Llama 3.1 8B with LoRA, its base in bfloat16, on one GPU of 80 GB.

    python -m sft_jax.main --config=configs/models/llama3_8b_lora.py \
        --config.data.train=my_rows.jsonl

Hardware: one GPU of 80 GB. Predicted, by
`sft-jax plan --config=... --topology=gpu-80GB --quick`: 68 of 80 GB, an
estimate from the CPU's program (16 GB the base, 46 GB temporaries that come out
up to twice too large), at most 18,700 tokens/s on an H100. Not measured yet.
With model.quantize="nf4" the base takes 5 GB.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config()
  config.workdir = "runs/llama3_8b_lora"
  config.batch_size = 16
  config.accum_steps = 4
  config.model.path = "meta-llama/Llama-3.1-8B-Instruct"
  config.model.dtype = "bfloat16"
  config.model.param_dtype = "bfloat16"
  config.model.remat = "full"
  config.lora.rank = 16
  config.lora.alpha = 32.0
  config.mesh.data = 1
  config.mesh.fsdp = -1
  config.data.train = "data/train.jsonl"
  config.data.seq_len = 4096
  config.optim.learning_rate = 2e-4
  return config
