"""The main job: the bundled demo on a CPU, and every key there is.

    python -m sft_jax.main --config=configs/base.py

Hardware: 2 CPU cores. Time: 3 to 4 minutes. Expect: every behaviour from 0 %
to 90 % or more, perplexity on general text 5 to 6 % above the base model's.
Any key can be set on the command line: --config.optim.learning_rate=1e-5.
Paths are relative to the folder the command runs in.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()

  config.workdir = "runs/demo"  # Everything a run writes.
  config.seed = 0  # Data order, new parameters, sampling.
  config.steps = 0  # Optimiser steps; 0 = as many as `epochs` make.
  config.epochs = 2  # Passes over the data; read when steps = 0.
  config.batch_size = 16  # Rows of data.seq_len tokens per optimiser step.
  config.accum_steps = 1  # Micro-batches per step; 1 = none.

  config.model = model = ml_collections.ConfigDict()
  model.path = "sft_jax/assets/demo/base"  # A Hugging Face folder.
  model.from_scratch = False  # True: config.json's shapes, new weights.
  model.dtype = "float32"  # Of activations: float32 or bfloat16.
  model.param_dtype = "float32"  # Of parameters, while they train.
  model.attention = "auto"  # Backend; 'auto' picks a segment-aware one.
  model.remat = "none"  # Rematerialisation: none | dots | full.
  model.scan = True  # Scan over layers; False = unrolled.

  config.lora = lora = ml_collections.ConfigDict()
  lora.rank = 0  # 0 = full fine-tuning.
  lora.alpha = 16.0  # Scale is alpha / rank.
  lora.targets = "all-linear"  # all-linear | attention | a regex of paths.

  # Not type-safe, for data.train's sake: a path, a glob, or a tuple of them,
  # each alone or as (path, copies of it per epoch).
  config.data = data = ml_collections.ConfigDict(type_safe=False)
  data.train = "sft_jax/assets/demo/train_*.jsonl"
  data.eval = ""  # Held-out rows; '' = hold out a share of train.
  data.holdout = 0.02  # That share, chosen by content; 0 = none.
  data.format = "auto"  # By shape, or the name of a format.
  data.seq_len = 256  # Tokens per packed row, and the longest example.
  data.packing = True  # False: one example per row.
  data.history = "auto"  # auto | split | keep: turns per example.
  data.over_long = "drop"  # drop | truncate | error.
  data.on_bad_row = "error"  # error | skip (counted and written down).
  data.template_kwargs = ml_collections.ConfigDict()  # For the template.
  data.cache_dir = ""  # Encoded rows; '' = workdir/cache.

  config.loss = loss = ml_collections.ConfigDict()
  loss.normalize = "token"  # token | example: what weighs the same.
  loss.chunk_tokens = 1024  # Tokens whose logits exist at once.

  config.optim = optim = ml_collections.ConfigDict()
  optim.learning_rate = 2e-3  # Peak. A model of 1.4 M wants a large one.
  optim.schedule = "cosine"  # cosine | linear | constant.
  optim.warmup_steps = 20  # 0 = none.
  optim.final_fraction = 0.05  # Of the peak, at the last step.
  optim.b1 = 0.9
  optim.b2 = 0.99
  optim.eps = 1e-8
  optim.weight_decay = 0.01  # 0 = off.
  optim.decay = ("kernel$", "embedding$", "lora_[ab]$")  # What decays.
  optim.clip_norm = 1.0  # Global gradient norm; 0 = off.

  config.mesh = mesh = ml_collections.ConfigDict()
  mesh.data = -1  # Copies of the model; -1 = the remaining devices.
  mesh.fsdp = 1  # Devices that share one copy's parameters.
  mesh.tensor = 1  # Devices that share one matrix product.

  config.checkpoint = checkpoint = ml_collections.ConfigDict()
  checkpoint.every = 100  # Steps; 0 = only at the end.
  checkpoint.keep = 2  # Newest to keep.

  config.eval = evaluation = ml_collections.ConfigDict()
  evaluation.every = 0  # Steps between held-out losses; 0 = before, after.
  evaluation.behaviours = "auto"  # jsonl; 'auto' = behaviours.jsonl beside
  # the training data, if there is one; '' = none.
  evaluation.general_text = "auto"  # jsonl; 'auto' = general_text.jsonl
  # beside the training data, if there is one; '' = none.
  evaluation.max_new_tokens = 80  # Per reply.
  evaluation.batch_size = 64  # Prompts sampled together.
  evaluation.samples = 3  # Replies shown before and after; 0 = none.

  config.export = True  # Write workdir/export, a Hugging Face folder.

  config.log = log = ml_collections.ConfigDict()
  log.every = 10  # Steps per record of metrics.jsonl.

  return config.lock()
