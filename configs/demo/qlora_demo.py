"""The LoRA demo beside a base in 4 bits: nf4 kernels, embeddings that train.

    python -m sft_jax.main --config=configs/demo/qlora_demo.py

Hardware: 2 CPU cores. Time: a little more than the LoRA demo, which it should
match within 3 points on every behavior.
"""

import ml_collections

from configs.demo import lora_demo


def get_config() -> ml_collections.ConfigDict:
  config = lora_demo.get_config()
  config.workdir = "runs/qlora_demo"
  config.model.quantize = "nf4"
  return config
