"""The demo with LoRA: adapters of rank 16 on every linear layer.

    python -m sft_jax.main --config=configs/lora_demo.py

Hardware: 2 CPU cores. Time: as base. A tiny model keeps little in 16 ranks:
expect it behind full fine-tuning in behaviour, ahead in what is kept.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config()
  config.workdir = "runs/lora_demo"
  config.lora.rank = 16
  config.lora.alpha = 32.0
  config.optim.learning_rate = 5e-3
  return config
