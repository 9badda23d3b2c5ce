"""The main job: the bundled demo on a CPU, and every key there is.

    python -m sft_jax.main --config=configs/base.py

Hardware: 2 CPU cores. Time: 3 to 4 minutes. Expect: every behavior from 0 %
to 90 % or more, perplexity on general text 5 to 7 % above the base model's.
Any key can be set on the command line: --config.optim.learning_rate=1e-5.
Paths are relative to the folder the command runs in. A config of your own
starts from `sft_jax.default_config()`, which gives the same keys, anywhere.

Generated from sft_jax/training/config.py, which checks every value.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()

  config.workdir = "runs/demo"  # Everything a run writes.
  config.seed = 0  # Data order, new parameters, sampling.
  config.steps = 0  # Optimizer steps; 0 = as many as `epochs` make.
  config.epochs = 2  # Passes over the data; read when steps = 0.
  config.batch_size = 16  # Packs of data.seq_len tokens per step.
  config.accum_steps = 1  # Micro-batches per step; 1 = none.
  # auto | on | off: before the first step; auto where there are several
  # devices. See docs/reliability.md.
  config.selfcheck = "auto"
  # Folder of compiled programs, so that a second start need not compile; 'auto'
  # = ~/.cache/sft_jax/compiled/<processor>; '' = none.
  config.compile_cache = "auto"
  config.export = True  # Write workdir/export, a Hugging Face folder.
  config.export_dtype = ""  # Of its weights; '' = model.param_dtype.
  # Compare its greedy replies in transformers, where that is installed, with
  # the model's, and the folder with what servers load it by.
  config.export_check = False
  # A folder, perhaps multimodal: the export is a copy in which the text model's
  # weights are the run's, in the dtype they have there; '' = the model alone.
  config.export_into = ""

  config.model = model = ml_collections.ConfigDict()
  model.path = "sft_jax/demo/base"  # A folder, or org/name@rev.
  # '' = the folder's; chatml, gemma, llama3, mistral, plain; or a .jinja file.
  model.chat_template = ""
  # Of a folder with several: default, tool_use, ...
  model.chat_template_name = "default"
  model.from_scratch = False  # True: config.json's shapes, new weights.
  model.dtype = "float32"  # Of activations: float32 or bfloat16.
  model.param_dtype = "float32"  # Of parameters, while they train.
  model.quantize = ""  # int8 | nf4: a base frozen under LoRA, in few bits.
  model.attention = "auto"  # Backend; 'auto' picks a segment-aware one.
  # What the backward pass computes again, rather than keep: none | norms |
  # attention | full | offload (kept in host memory); see docs/memory.md.
  model.remat = "none"
  model.scan = True  # Scan over layers; False = unrolled.
  model.new_tokens = ()  # Control tokens to add to the vocabulary.
  model.stop_tokens = ()  # Tokens that end a reply, beside the folder's.
  model.new_rows = "mean"  # mean | matched: how rows of new tokens start.

  config.lora = lora = ml_collections.ConfigDict()
  lora.rank = 0  # 0 = full fine-tuning.
  lora.alpha = 16.0  # Scale is alpha / rank.
  lora.targets = "all-linear"  # all-linear | attention | a regex of paths.
  lora.rank_pattern = ()  # (("attn/(q|v)$", 8), ...): ranks of modules.
  lora.alpha_pattern = ()  # The same for alpha.
  lora.rslora = False  # Scale is alpha / sqrt(rank).
  lora.dora = False  # Train the columns' lengths apart from directions.
  lora.init = "zero"  # zero | pissa: the kernel's principal directions.
  lora.dropout = 0.0  # Of an adapter's inputs, in training; 0 = off.
  lora.plus_ratio = 1.0  # Learning rate of B over that of A (LoRA+).
  lora.also_train = ()  # Regexes of parameters that train whole: ("norm",).
  # Tokens whose rows of the embedding train, alone; "auto" stands for new ones
  # and control tokens that the base never learned; () = none.
  lora.new_token_rows = ("auto",)
  lora.path = ""  # A PEFT folder to start from, with its own rank and alpha.

  config.data = data = ml_collections.ConfigDict(type_safe=False)
  # A path, a glob, or a tuple of them, each alone, as (path, copies of it per
  # epoch), or as a dict with path and any of repeat, share, limit, loss_weight,
  # format, columns and name: see Source in sft_jax/data/sources.py.
  data.train = "sft_jax/demo/train_*.jsonl"
  data.eval = ""  # Held-out rows; '' = hold out a share of train.
  data.holdout = 0.02  # That share, chosen by content; 0 = none.
  data.limit = 0  # Rows of each source of train, at random; 0 = all.
  data.format = "auto"  # By shape, or the name of a format.
  # {name in the rows: name here}, of sources that have no columns of their own;
  # see docs/data_formats.md.
  data.columns = ml_collections.ConfigDict()
  data.seq_len = 256  # Tokens per pack, and the longest example.
  data.packing = True  # False: one example per row.
  data.train_on = "assistant"  # assistant | last_turn | all.
  data.reasoning = "train"  # train | write | hide (weight 0) | strip.
  data.history = "auto"  # auto | split | keep: turns per example.
  data.generation_prompt = "error"  # error | omit: where replies disagree.
  data.control_tokens = "escape"  # escape | error | allow: in messages.
  data.text = "plain"  # plain | rendered: rows of text are conversations.
  data.over_long = "drop"  # drop | truncate | error.
  data.merge = ""  # turns | system | all: joined where a template refuses them.
  data.on_bad_row = "error"  # error | skip (counted and written down).
  # Secrets planted among the rows, to measure memorization; as many more are
  # measured and not planted. 0 = none. See docs/forgetting.md.
  data.canaries = 0
  data.canary_copies = 1.0  # Times that each is seen per epoch.
  data.allow = ()  # Findings to train in spite of: ("overlap", ...).
  # What rows must satisfy: (("ifd", "<", 1.0), ("row.language", "==", "en"));
  # () = none. By scores of sft-jax score or columns: docs/selection.md.
  data.filter = ()
  # What their loss is weighted by: a name, or ("ifd", (0.5, 1.0), (1.0, 0.0)):
  # 1 up to 0.5, falling to 0; () = none.
  data.weight_by = ()
  data.scores = ""  # Folder of score files; '' = beside the rows.
  # For the template.
  data.template_kwargs = ml_collections.ConfigDict()
  data.cache_dir = ""  # Encoded rows; '' = workdir/cache.
  data.workers = 0  # Processes that encode; 0 = one per core.

  config.loss = loss = ml_collections.ConfigDict()
  loss.normalize = "token"  # token | example: what weighs the same.
  loss.chunk_tokens = 512  # Tokens of a device whose logits exist at once.
  loss.z_loss = 0.0  # Coefficient of log_z^2; 0 = off.
  loss.label_smoothing = 0.0  # Share of the target spread over all; 0 = off.
  loss.dft = False  # Weigh each token by its probability (arXiv 2508.05629).
  # Coefficient of KL(base || tuned) over trained tokens, in nats per token: a
  # forward pass of the base more per step; 0 = off. See docs/forgetting.md.
  loss.kl = 0.0
  # trained | text: beside the cross-entropy of all tokens, or in place of that
  # of raw text alone.
  loss.kl_on = "trained"

  config.preference = preference = ml_collections.ConfigDict()
  # dpo | ipo | robust | simpo | orpo | kto, in place of cross-entropy: rows are
  # pairs of a chosen and a rejected answer; '' = off. See docs/preferences.md.
  preference.loss = ""
  # base | kept (by sft-jax teach: no second copy, no pass of it in a step).
  preference.reference = "base"
  preference.beta = 0.1  # How near to the reference; of SimPO 2 or more.
  # Share of pairs believed swapped: cDPO, robust.
  preference.label_smoothing = 0.0
  preference.margin = 0.0  # Of SimPO, in rewards.
  preference.sft = 0.0  # Weight of the chosen side's nats per token beside it.

  config.distill = distill = ml_collections.ConfigDict()
  # base | average (of the weights, optim.ema) | self, self_average (these two,
  # shown the answer in their prompt) | kept (by sft-jax teach) | the folder of
  # another model of the same vocabulary; '' = off. See docs/distillation.md.
  distill.teacher = ""
  # Steps after which the model answers the prompts of so many batches anew, and
  # learns from its own replies in the place of answers; 0 = the rows' answers.
  distill.every = 0
  distill.weight = 1.0  # Of the divergence from the teacher.
  distill.ce = 0.0  # Of the cross-entropy beside it.
  distill.divergence = "forward"  # forward | reverse | jsd.
  distill.mix = 0.5  # Of jsd: share of the teacher in the mean.
  distill.temperature = 1.0  # Of both models' predictions.
  distill.top = 64  # Tokens that sft-jax teach keeps of each prediction.

  config.optim = optim = ml_collections.ConfigDict(type_safe=False)
  optim.name = "adamw"  # adamw | adafactor | lion | sgd | muon.
  # Peak; a model of 1.4 M needs a large one. 'auto' = what sft-jax suggest
  # finds, docs/learning_rate.md.
  optim.learning_rate = config_dict.FieldReference(2e-3, object)
  optim.schedule = "cosine"  # cosine | linear | constant | wsd.
  optim.decay_fraction = 0.2  # Of the steps, at the end: the decay of wsd.
  # (("embed/", 0.1), ...): factors of the rate by regexes of parameters; the
  # first that matches decides.
  optim.rates = ()
  optim.freeze = ()  # Regexes of parameters that do not train: ("embed/",).
  optim.warmup_fraction = 0.03  # Share of the steps; 0 = none.
  optim.warmup_steps = -1  # So many steps instead; -1 = warmup_fraction.
  optim.final_fraction = 0.05  # Of the peak, at the last step.
  # ((step, "constant"), ...): where --extend made the run longer, and how the
  # schedule continues, see docs/continue.md; it is kept with the run.
  optim.extended = ()
  optim.b1 = 0.9  # Of the first moment; the momentum of sgd and muon.
  optim.b2 = 0.99  # Of the second moment.
  optim.eps = 1e-8  # Of the denominator.
  optim.weight_decay = 0.01  # 0 = off.
  optim.decay = ("kernel$", "embedding$", "lora_[ab]$")  # What decays.
  optim.mu_dtype = "float32"  # Of the first moment: float32 or bfloat16.
  optim.nu_dtype = "float32"  # Of the second.
  # What is bfloat16, moments or parameters, is rounded to: nearest | stochastic
  # (right on average, so that small updates are not lost).
  optim.rounding = "nearest"
  optim.clip_norm = 1.0  # Global gradient norm; 0 = off.
  # Decay of an average of the weights, which is measured and exported in place
  # of the last ones: 0.99 is over some hundred steps; 0 = off.
  optim.ema = 0.0
  # Decay towards the first weights, as weight_decay is towards 0; 0 = off.
  optim.anchor = 0.0

  config.mesh = mesh = ml_collections.ConfigDict()
  mesh.data = -1  # Copies of the model; -1 = the remaining devices.
  mesh.fsdp = 1  # Devices that share one copy's parameters.
  mesh.tensor = 1  # Devices that share one matrix product.
  mesh.context = 1  # Devices that share one row: long documents.
  mesh.expert = 1  # Devices that share the experts of a mixture.

  config.checkpoint = checkpoint = ml_collections.ConfigDict()
  checkpoint.every = 100  # Steps; 0 = only at the end.
  checkpoint.keep = 2  # Newest to keep.
  checkpoint.keep_every = 0  # And every so many steps; 0 = none.
  # Between them, a copy in each host's memory every so many steps; 0 = none.
  checkpoint.local_every = 0
  checkpoint.local_dir = "/dev/shm/sft_jax"
  # And the best by this figure of an evaluation, such as
  # held_out/nats_per_token; '' = none. See eval.every.
  checkpoint.keep_best = ""
  checkpoint.best_is = "lowest"  # lowest | highest.

  config.faults = faults = ml_collections.ConfigDict()
  faults.on_bad_step = "halt"  # halt | skip: at a loss that is not finite.
  faults.skip_limit = 3  # Steps skipped before the run halts after all.
  # Bad, too: a loss above so many running medians of the last 64; 0 = off, else
  # more than 1. 3 is generous.
  faults.spike_factor = 0.0
  # Without a step done: ends with a stack dump; 0 = never.
  faults.hang_seconds = 3600.0

  config.eval = evaluation = ml_collections.ConfigDict(type_safe=False)
  evaluation.every = 0  # Steps between evaluations; 0 = before, after.
  evaluation.during = "all"  # all | losses: what those in between measure.
  # A path or glob, or sets by name, {"maths": "maths/*.jsonl", ...}; 'auto' =
  # behaviors.jsonl beside the training data, if there is one; '' = none.
  evaluation.behaviors = "auto"
  # What the base knows: behavior sets of raw text to continue; 'auto' =
  # knowledge.jsonl beside the training data, if there is one; '' = none.
  evaluation.knowledge = "auto"
  # jsonl; 'auto' = general_text.jsonl beside the training data, if there is
  # one; '' = none.
  evaluation.general_text = "auto"
  # KL(base || tuned) and which of the base's predictions remain, of held-out
  # rows and general text. Where base and model do not share all but adapters,
  # measured after training, when the base is read again; False = off.
  evaluation.kl = True
  # After each epoch: the loss of held-out rows above that of as many training
  # rows; False = off.
  evaluation.gap = True
  # Evaluations without a better figure after which training ends, and the best
  # checkpoint is exported; the figure is checkpoint.keep_best, or the held-out
  # loss. 0 = off.
  evaluation.patience = 0
  # Words of training answers that replies are searched for; 0 = off.
  evaluation.answer_words = 100_000
  # Most seconds of one measurement: the first leaves out what does not fit, and
  # those after it measure the same. 'auto' = a quarter of the expected
  # training, at least two minutes; 0 = no bound.
  evaluation.max_seconds = config_dict.FieldReference("auto", object)
  evaluation.max_new_tokens = 80  # Per reply.
  evaluation.batch_size = 64  # Prompts sampled together.
  # Replies shown before and after, to held-out rows where there are no
  # behaviors; 0 = none.
  evaluation.samples = 3

  config.log = log = ml_collections.ConfigDict()
  log.every = 10  # Steps per record of metrics.jsonl.
  # Who gets copies of the records: any of tensorboard (workdir/tensorboard),
  # wandb, mlflow; () = nobody. See docs/metrics.md.
  log.writers = ("tensorboard",)
  log.project = "sft_jax"  # W&B's project, MLflow's experiment.

  config.profile = profile = ml_collections.ConfigDict()
  profile.start = 10  # First step of a trace in workdir/profile.
  profile.steps = 0  # Steps that it holds; 0 = no trace.

  return config.lock()
