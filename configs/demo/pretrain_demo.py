r"""Pretraining of the demo's base model: the same program, other data.

    python tools/dev/make_demo.py --out runs/demo_world \
      --tokenizer sft_jax/demo/base/tokenizer.model
    python -m sft_jax.main --config=configs/demo/pretrain_demo.py

Rows are raw text, so the loss is on all tokens; everything else is the main
job's. Hardware: 2 CPU cores. Time: about 40 minutes.
Expect: 0.45 nats per token on held-out documents.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config()
  config.workdir = "runs/pretrain_demo"
  config.steps = 5000
  config.batch_size = 8
  config.model.from_scratch = True
  config.model.scan = False  # As the base in assets/ was trained.
  config.data.train = "runs/demo_world/pretrain.jsonl"
  config.data.holdout = 0.005
  config.optim.learning_rate = 3e-3
  config.optim.schedule = "linear"
  config.optim.warmup_steps = 100
  config.optim.b2 = 0.98
  config.optim.weight_decay = 0.05
  config.eval.behaviors = config.eval.knowledge = ""
  config.eval.general_text = "sft_jax/demo/general_text.jsonl"
  config.eval.every = 500
  config.checkpoint.every = 500
  config.log.every = 20
  return config
