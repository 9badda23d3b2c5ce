"""Every key of a config: its type, default and meaning.

`default()` is what every config starts from, anywhere. To add a key, add a
field here, its choices or bounds in config_check.py, and run
`python tools/dev/write_base_config.py`, which copies it into configs/base.py.
"""

import dataclasses
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

# Sections with keys that may be of several types.
LOOSE = ("data", "eval", "optim")
NumberOrWord = float | str


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """model.*"""

  path: str = "sft_jax/demo/base"  # A folder, or org/name@rev.
  # '' = the folder's; chatml, gemma, llama3, mistral, plain; or a .jinja file.
  chat_template: str = ""
  # Of a folder with several: default, tool_use, ...
  chat_template_name: str = "default"
  from_scratch: bool = False  # True: config.json's shapes, new weights.
  dtype: str = "float32"  # Of activations: float32 or bfloat16.
  param_dtype: str = "float32"  # Of parameters, while they train.
  quantize: str = ""  # int8 | nf4: a base frozen under LoRA, in few bits.
  attention: str = "auto"  # Backend; 'auto' picks a segment-aware one.
  # What the backward pass computes again, rather than keep: none | norms |
  # attention | full | offload (kept in host memory); see docs/memory.md.
  remat: str = "none"
  scan: bool = True  # Scan over layers; False = unrolled.
  new_tokens: tuple = ()  # Control tokens to add to the vocabulary.
  stop_tokens: tuple = ()  # Tokens that end a reply, beside the folder's.
  new_rows: str = "mean"  # mean | matched: how rows of new tokens start.


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """lora.*"""

  rank: int = 0  # 0 = full fine-tuning.
  alpha: float = 16.0  # Scale is alpha / rank.
  targets: str = "all-linear"  # all-linear | attention | a regex of paths.
  rank_pattern: tuple = ()  # (("attn/(q|v)$", 8), ...): ranks of modules.
  alpha_pattern: tuple = ()  # The same for alpha.
  rslora: bool = False  # Scale is alpha / sqrt(rank).
  dora: bool = False  # Train the columns' lengths apart from directions.
  init: str = "zero"  # zero | pissa: the kernel's principal directions.
  dropout: float = 0.0  # Of an adapter's inputs, in training; 0 = off.
  plus_ratio: float = 1.0  # Learning rate of B over that of A (LoRA+).
  also_train: tuple = ()  # Regexes of parameters that train whole: ("norm",).
  # Tokens whose rows of the embedding train, alone; "auto" stands for new ones
  # and control tokens that the base never learned; () = none.
  new_token_rows: tuple = ("auto",)
  path: str = ""  # A PEFT folder to start from, with its own rank and alpha.


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """data.*"""

  # A path, a glob, or a tuple of them, each alone, as (path, copies of it per
  # epoch), or as a dict with path and any of repeat, share, limit, loss_weight,
  # format, columns and name: see Source in sft_jax/data/sources.py.
  train: Any = "sft_jax/demo/train_*.jsonl"
  eval: Any = ""  # Held-out rows; '' = hold out a share of train.
  holdout: float = 0.02  # That share, chosen by content; 0 = none.
  limit: int = 0  # Rows of each source of train, at random; 0 = all.
  format: str = "auto"  # By shape, or the name of a format.
  # {name in the rows: name here}, of sources that have no columns of their own;
  # see docs/data_formats.md.
  columns: dict = dataclasses.field(default_factory=dict)
  seq_len: int = 256  # Tokens per pack, and the longest example.
  packing: bool = True  # False: one example per row.
  train_on: str = "assistant"  # assistant | last_turn | all.
  reasoning: str = "train"  # train | write | hide (weight 0) | strip.
  history: str = "auto"  # auto | split | keep: turns per example.
  generation_prompt: str = "error"  # error | omit: where replies disagree.
  control_tokens: str = "escape"  # escape | error | allow: in messages.
  text: str = "plain"  # plain | rendered: rows of text are conversations.
  over_long: str = "drop"  # drop | truncate | error.
  merge: str = ""  # turns | system | all: joined where a template refuses them.
  on_bad_row: str = "error"  # error | skip (counted and written down).
  # Secrets planted among the rows, to measure memorization; as many more are
  # measured and not planted. 0 = none. See docs/forgetting.md.
  canaries: int = 0
  canary_copies: float = 1.0  # Times that each is seen per epoch.
  allow: tuple = ()  # Findings to train in spite of: ("overlap", ...).
  # What rows must satisfy: (("ifd", "<", 1.0), ("row.language", "==", "en"));
  # () = none. By scores of sft-jax score or columns: docs/selection.md.
  filter: Any = ()
  # What their loss is weighted by: a name, or ("ifd", (0.5, 1.0), (1.0, 0.0)):
  # 1 up to 0.5, falling to 0; () = none.
  weight_by: Any = ()
  scores: str = ""  # Folder of score files; '' = beside the rows.
  # For the template.
  template_kwargs: dict = dataclasses.field(default_factory=dict)
  cache_dir: str = ""  # Encoded rows; '' = workdir/cache.
  workers: int = 0  # Processes that encode; 0 = one per core.


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """loss.*"""

  normalize: str = "token"  # token | example: what weighs the same.
  chunk_tokens: int = 512  # Tokens of a device whose logits exist at once.
  z_loss: float = 0.0  # Coefficient of log_z^2; 0 = off.
  label_smoothing: float = 0.0  # Share of the target spread over all; 0 = off.
  dft: bool = False  # Weigh each token by its probability (arXiv 2508.05629).
  # Coefficient of KL(base || tuned) over trained tokens, in nats per token: a
  # forward pass of the base more per step; 0 = off. See docs/forgetting.md.
  kl: float = 0.0
  # trained | text: beside the cross-entropy of all tokens, or in place of that
  # of raw text alone.
  kl_on: str = "trained"


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  """distill.*"""

  # base | average (of the weights, optim.ema) | self, self_average (these two,
  # shown the answer in their prompt) | kept (by sft-jax teach) | the folder of
  # another model of the same vocabulary; '' = off. See docs/distillation.md.
  teacher: str = ""
  # Steps after which the model answers the prompts of so many batches anew, and
  # learns from its own replies in the place of answers; 0 = the rows' answers.
  every: int = 0
  weight: float = 1.0  # Of the divergence from the teacher.
  ce: float = 0.0  # Of the cross-entropy beside it.
  divergence: str = "forward"  # forward | reverse | jsd.
  mix: float = 0.5  # Of jsd: share of the teacher in the mean.
  temperature: float = 1.0  # Of both models' predictions.
  top: int = 64  # Tokens that sft-jax teach keeps of each prediction.


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
  """preference.*"""

  # dpo | ipo | robust | simpo | orpo | kto, in place of cross-entropy: rows are
  # pairs of a chosen and a rejected answer; '' = off. See docs/preferences.md.
  loss: str = ""
  # base | kept (by sft-jax teach: no second copy, no pass of it in a step).
  reference: str = "base"
  beta: float = 0.1  # How near to the reference; of SimPO 2 or more.
  label_smoothing: float = 0.0  # Share of pairs believed swapped: cDPO, robust.
  margin: float = 0.0  # Of SimPO, in rewards.
  sft: float = 0.0  # Weight of the chosen side's nats per token beside it.


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """optim.*"""

  name: str = "adamw"  # adamw | adafactor | lion | sgd | muon.
  # Peak; a model of 1.4 M needs a large one. 'auto' = what sft-jax suggest
  # finds, docs/learning_rate.md.
  learning_rate: NumberOrWord = 2e-3
  schedule: str = "cosine"  # cosine | linear | constant | wsd.
  decay_fraction: float = 0.2  # Of the steps, at the end: the decay of wsd.
  # (("embed/", 0.1), ...): factors of the rate by regexes of parameters; the
  # first that matches decides.
  rates: tuple = ()
  freeze: tuple = ()  # Regexes of parameters that do not train: ("embed/",).
  warmup_fraction: float = 0.03  # Share of the steps; 0 = none.
  warmup_steps: int = -1  # So many steps instead; -1 = warmup_fraction.
  final_fraction: float = 0.05  # Of the peak, at the last step.
  # ((step, "constant"), ...): where --extend made the run longer, and how the
  # schedule continues, see docs/continue.md; it is kept with the run.
  extended: tuple = ()
  b1: float = 0.9  # Of the first moment; the momentum of sgd and muon.
  b2: float = 0.99  # Of the second moment.
  eps: float = 1e-8  # Of the denominator.
  weight_decay: float = 0.01  # 0 = off.
  decay: tuple = ("kernel$", "embedding$", "lora_[ab]$")  # What decays.
  mu_dtype: str = "float32"  # Of the first moment: float32 or bfloat16.
  nu_dtype: str = "float32"  # Of the second.
  # What is bfloat16, moments or parameters, is rounded to: nearest | stochastic
  # (right on average, so that small updates are not lost).
  rounding: str = "nearest"
  clip_norm: float = 1.0  # Global gradient norm; 0 = off.
  # Decay of an average of the weights, which is measured and exported in place
  # of the last ones: 0.99 is over some hundred steps; 0 = off.
  ema: float = 0.0
  # Decay towards the first weights, as weight_decay is towards 0; 0 = off.
  anchor: float = 0.0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """mesh.*"""

  data: int = -1  # Copies of the model; -1 = the remaining devices.
  fsdp: int = 1  # Devices that share one copy's parameters.
  tensor: int = 1  # Devices that share one matrix product.
  context: int = 1  # Devices that share one row: long documents.
  expert: int = 1  # Devices that share the experts of a mixture.


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """checkpoint.*"""

  every: int = 100  # Steps; 0 = only at the end.
  keep: int = 2  # Newest to keep.
  keep_every: int = 0  # And every so many steps; 0 = none.
  # Between them, a copy in each host's memory every so many steps; 0 = none.
  local_every: int = 0
  local_dir: str = "/dev/shm/sft_jax"
  # And the best by this figure of an evaluation, such as
  # held_out/nats_per_token; '' = none. See eval.every.
  keep_best: str = ""
  best_is: str = "lowest"  # lowest | highest.


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
  """faults.*"""

  on_bad_step: str = "halt"  # halt | skip: at a loss that is not finite.
  skip_limit: int = 3  # Steps skipped before the run halts after all.
  # Bad, too: a loss above so many running medians of the last 64; 0 = off, else
  # more than 1. 3 is generous.
  spike_factor: float = 0.0
  # Without a step done: ends with a stack dump; 0 = never.
  hang_seconds: float = 3600.0


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """eval.*"""

  every: int = 0  # Steps between evaluations; 0 = before, after.
  during: str = "all"  # all | losses: what those in between measure.
  # A path or glob, or sets by name, {"maths": "maths/*.jsonl", ...}; 'auto' =
  # behaviors.jsonl beside the training data, if there is one; '' = none.
  behaviors: Any = "auto"
  # What the base knows: behavior sets of raw text to continue; 'auto' =
  # knowledge.jsonl beside the training data, if there is one; '' = none.
  knowledge: Any = "auto"
  # jsonl; 'auto' = general_text.jsonl beside the training data, if there is
  # one; '' = none.
  general_text: Any = "auto"
  # KL(base || tuned) and which of the base's predictions remain, of held-out
  # rows and general text. Where base and model do not share all but adapters,
  # measured after training, when the base is read again; False = off.
  kl: bool = True
  # After each epoch: the loss of held-out rows above that of as many training
  # rows; False = off.
  gap: bool = True
  # Evaluations without a better figure after which training ends, and the best
  # checkpoint is exported; the figure is checkpoint.keep_best, or the held-out
  # loss. 0 = off.
  patience: int = 0
  # Words of training answers that replies are searched for; 0 = off.
  answer_words: int = 100_000
  # Most seconds of one measurement: the first leaves out what does not fit, and
  # those after it measure the same. 'auto' = a quarter of the expected
  # training, at least two minutes; 0 = no bound.
  max_seconds: NumberOrWord = "auto"
  max_new_tokens: int = 80  # Per reply.
  batch_size: int = 64  # Prompts sampled together.
  # Replies shown before and after, to held-out rows where there are no
  # behaviors; 0 = none.
  samples: int = 3


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """log.*"""

  every: int = 10  # Steps per record of metrics.jsonl.
  # Who gets copies of the records: any of tensorboard (workdir/tensorboard),
  # wandb, mlflow; () = nobody. See docs/metrics.md.
  writers: tuple = ("tensorboard",)
  project: str = "sft_jax"  # W&B's project, MLflow's experiment.


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  """profile.*"""

  start: int = 10  # First step of a trace in workdir/profile.
  steps: int = 0  # Steps that it holds; 0 = no trace.


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """All keys of a run."""

  workdir: str = "runs/demo"  # Everything a run writes.
  seed: int = 0  # Data order, new parameters, sampling.
  steps: int = 0  # Optimizer steps; 0 = as many as `epochs` make.
  epochs: int = 2  # Passes over the data; read when steps = 0.
  batch_size: int = 16  # Packs of data.seq_len tokens per step.
  accum_steps: int = 1  # Micro-batches per step; 1 = none.
  # auto | on | off: before the first step; auto where there are several
  # devices. See docs/reliability.md.
  selfcheck: str = "auto"
  # Folder of compiled programs, so that a second start need not compile; 'auto'
  # = ~/.cache/sft_jax/compiled/<processor>; '' = none.
  compile_cache: str = "auto"
  export: bool = True  # Write workdir/export, a Hugging Face folder.
  export_dtype: str = ""  # Of its weights; '' = model.param_dtype.
  # Compare its greedy replies in transformers, where that is installed, with
  # the model's, and the folder with what servers load it by.
  export_check: bool = False
  # A folder, perhaps multimodal: the export is a copy in which the text model's
  # weights are the run's, in the dtype they have there; '' = the model alone.
  export_into: str = ""
  model: ModelConfig = ModelConfig()
  lora: LoraConfig = LoraConfig()
  data: DataConfig = DataConfig()
  loss: LossConfig = LossConfig()
  preference: PreferenceConfig = PreferenceConfig()
  distill: DistillConfig = DistillConfig()
  optim: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  faults: FaultsConfig = FaultsConfig()
  eval: EvalConfig = EvalConfig()
  log: LogConfig = LogConfig()
  profile: ProfileConfig = ProfileConfig()


def default() -> ml_collections.ConfigDict:
  """A config of all keys with their defaults, locked: the bundled demo.

  The demo's files are named as in a checkout; outside of one, where the
  package is installed.
  """
  package = Path(__file__).parents[1]
  elsewhere = not Path("sft_jax/demo").is_dir()

  def value(x: Any) -> Any:
    demo = isinstance(x, str) and x.startswith("sft_jax/demo/")
    return str(package.parent / x) if demo and elsewhere else x

  def build(kind: Any, loose: bool = False) -> ml_collections.ConfigDict:
    built = ml_collections.ConfigDict(type_safe=not loose)
    for field in dataclasses.fields(kind):
      if dataclasses.is_dataclass(field.type):
        built[field.name] = build(field.type, field.name in LOOSE)
      elif field.type is dict:
        built[field.name] = ml_collections.ConfigDict()
      elif field.type == NumberOrWord:  # On the command line, too.
        built[field.name] = config_dict.FieldReference(field.default, object)
      else:
        built[field.name] = value(field.default)
    return built

  return build(RunConfig).lock()


get_config = default  # So that this file is a config file, too: the demo's.
