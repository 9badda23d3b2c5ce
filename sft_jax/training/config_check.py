"""Checks a config whole, before anything is loaded.

`check(config)` names in one message every key that is unknown, of a wrong type
or out of bounds, and every pair of keys that cannot go together.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from sft_jax.common.buckets import storage
from sft_jax.common.sharding import ROWS
from sft_jax.step import distillation, optimizer, preferences
from sft_jax.training.config import RunConfig

# The only values of a text; '' is the first where nothing else is.
_FLOATS = "float32 bfloat16"
_CHOICES = {
  "selfcheck": "auto on off",
  "model.dtype": _FLOATS,
  "model.param_dtype": _FLOATS,
  "model.quantize": " int8 nf4",
  "model.attention": "auto xla blocks splash triton tokamax",
  "model.remat": "none norms attention full offload",
  "model.new_rows": "mean matched",
  "lora.init": "zero pissa",
  "data.train_on": "assistant last_turn all",
  "data.reasoning": "train write hide strip",
  "data.history": "auto split keep",
  "data.generation_prompt": "error omit",
  "data.control_tokens": "escape error allow",
  "data.over_long": "drop truncate error",
  "data.merge": " turns system all",
  "data.on_bad_row": "error skip",
  "loss.normalize": "token example",
  "loss.kl_on": "trained text",
  "distill.divergence": " ".join(distillation.KINDS),
  "preference.loss": " " + " ".join(preferences.LOSSES),
  "preference.reference": "base kept",
  "optim.name": " ".join(optimizer.OPTIMIZERS),
  "optim.schedule": " ".join(optimizer.SCHEDULES),
  "optim.mu_dtype": _FLOATS,
  "optim.nu_dtype": _FLOATS,
  "optim.rounding": "nearest stochastic",
  "checkpoint.best_is": "lowest highest",
  "faults.on_bad_step": "halt skip",
  "eval.during": "all losses",
  "export_dtype": " float32 bfloat16 float16",
}
# Intervals of numbers; all others are in [0, 1e9].
_BOUNDS = {
  key: interval
  for interval, keys in {
    "[0, 2147483647]": "seed",
    "[1, 1e9]": "epochs batch_size accum_steps loss.chunk_tokens "
    "checkpoint.keep eval.max_new_tokens eval.batch_size log.every "
    "profile.start",
    "[0, 1)": "lora.dropout data.holdout loss.label_smoothing "
    "optim.warmup_fraction optim.b1 optim.b2 optim.ema",
    "[0, 0.5)": "preference.label_smoothing",
    "(0, 1)": "distill.mix",
    "(0, 1e3]": "distill.temperature",
    "[1, 1e6]": "distill.top",
    "(0, 1e30]": "lora.alpha lora.plus_ratio data.canary_copies "
    "optim.learning_rate preference.beta",
    "[2, 1e8]": "data.seq_len",
    "[0, 1e4]": "data.workers data.canaries",
    "[0, 65536]": "lora.rank",
    "(0, 1]": "optim.decay_fraction",
    "[-1, 1e9]": "optim.warmup_steps",
    "[0, 1]": "optim.final_fraction optim.eps",
    "[0, 1e30]": "optim.clip_norm",
    "[0, 1e7]": "faults.hang_seconds",
    "[-1, 1e6]": "mesh.data mesh.fsdp mesh.tensor mesh.context mesh.expert",
  }.items()
  for key in keys.split()
}
# The schemes that a path may have; those of the other keys are none.
_REMOTE = {
  "workdir": ("gs", "s3"),
  "compile_cache": ("gs",),
  **dict.fromkeys(
    (
      *("model.path", "lora.path", "data.train", "data.eval"),
      *("eval.behaviors", "eval.knowledge", "eval.general_text"),
    ),
    ("gs", "s3", "hf"),
  ),
}
_LOCAL = ("data.cache_dir", "data.scores", "model.chat_template")
# What knows of single tokens only.
_NO_PAIRS = (
  *("loss.z_loss", "loss.kl", "loss.label_smoothing", "loss.dft"),
  "data.canaries",
)
# Variables of templates that the rows decide.
_NOT_KWARGS = {"messages", "tools", "add_generation_prompt"}
EXTENSIONS = ("constant", "rewarm", "stretch")  # See build/step.py.
# What a number may be besides.
_WORDS: dict[str, tuple[str, ...]] = dict.fromkeys(
  ("eval.max_seconds", "optim.learning_rate"), ("auto",)
)


def check(config: ml_collections.ConfigDict | Mapping[str, Any]) -> RunConfig:
  """The config, typed.

  Raises ValueError: with a line for every key that is wrong.
  """
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  wrong = list(_wrong_keys(config, RunConfig, ""))
  if not wrong:
    wrong = [*_wrong_places(config), *_wrong_pairs(config)]
  if wrong:
    many = f"{len(wrong)} keys are wrong:\n  " if len(wrong) > 1 else ""
    raise ValueError(f"config: {many}" + "\n  ".join(wrong))
  return _typed(config, RunConfig)


def _wrong_places(c: Mapping[str, Any]) -> Iterator[str]:
  """A line for each path of a scheme that its key does not take."""

  def texts(value: Any) -> Iterator[str]:
    inner = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, str):
      yield from (text.strip() for text in value.split(","))
    elif isinstance(value, Mapping | list | tuple):
      for one in inner:
        yield from texts(one)

  for key in (*_REMOTE, *_LOCAL):
    section, _, name = key.rpartition(".")
    for text in texts((c[section] if section else c)[name]):
      try:
        storage.check_scheme(text, key, _REMOTE.get(key, ()))
      except ValueError as error:
        yield str(error)


def _typed(values: Mapping[str, Any], kind: Any) -> Any:
  values = dict(values)
  for field in dataclasses.fields(kind):
    if dataclasses.is_dataclass(field.type):
      values[field.name] = _typed(values[field.name], field.type)
  return kind(**values)


def _all_keys(kind: Any = RunConfig, prefix: str = "") -> Iterator[str]:
  for field in dataclasses.fields(kind):
    if dataclasses.is_dataclass(field.type):
      yield from _all_keys(field.type, f"{prefix}{field.name}.")
    else:
      yield prefix + field.name


def _wrong_keys(values: Any, kind: Any, prefix: str) -> Iterator[str]:
  """A line for each key that is unknown, missing, or has a wrong value."""
  if not isinstance(values, Mapping):
    yield f"{prefix[:-1]}: got {values!r}, expected keys of its own"
    return
  fields = {field.name: field for field in dataclasses.fields(kind)}
  for name in values:
    if name not in fields:
      yield _unknown(f"{prefix}{name}")
  for name, field in fields.items():
    if name not in values:
      yield f"{prefix}{name}: is missing; start from sft_jax.default_config()"
    elif dataclasses.is_dataclass(field.type):
      yield from _wrong_keys(values[name], field.type, f"{prefix}{name}.")
    elif expected := _expected(values[name], field.type, prefix + name):
      yield f"{prefix}{name}: got {_short(values[name])}, expected {expected}"


def _unknown(key: str) -> str:
  known = list(_all_keys())
  last = {name.rpartition(".")[2]: name for name in reversed(known)}
  near = difflib.get_close_matches(key, known, 3, 0.7) or [
    last[name]
    for name in difflib.get_close_matches(key.rpartition(".")[2], last, 3, 0.7)
  ]
  hint = f"; did you mean {' or '.join(near)}?" if near else ""
  return f"{key}: no such key{hint} All are in configs/base.py"


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else text[:77] + "..."


def _expected(value: Any, kind: Any, key: str) -> str:
  """What was expected in place of a value; '' if it is right."""
  if key in _CHOICES:
    choices = _CHOICES[key].split(" ")
    right = isinstance(value, str) and value in choices
    return "" if right else "one of " + ", ".join(map(repr, choices))
  words = _WORDS.get(key, ())
  if kind in (int, float) or words:
    if isinstance(value, str) and value in words:
      return ""
    number = int if kind is int else int | float
    interval = _BOUNDS.get(key, "[0, 1e9]")
    known = isinstance(value, number) and not isinstance(value, bool)
    if known and _is_inside(float(value), interval):
      return ""
    noun = "whole number" if kind is int else "number"
    return "".join(f"{x!r} or " for x in words) + f"a {noun} in {interval}"
  if kind is str and isinstance(value, str) and "\0" in value:
    return "a text without a null character"
  kinds, name = {
    bool: (bool, "True or False"),
    str: (str, "a text"),
    dict: (Mapping, "a dict"),
    tuple: (list | tuple, "a tuple"),
    Any: (str | list | tuple | Mapping | None, "a path, a tuple or a dict"),
  }[kind]
  return "" if isinstance(value, kinds) else name


def _is_inside(value: float, interval: str) -> bool:
  low, high = map(float, interval[1:-1].split(","))
  above = value > low or (value == low and interval[0] == "[")
  below = value < high or (value == high and interval[-1] == "]")
  return above and below  # So NaN is not.


def _wrong_pairs(c: Mapping[str, Any]) -> Iterator[str]:
  """A line for each combination of keys that cannot be."""
  model, lora, data, optim = (c[x] for x in ("model", "lora", "data", "optim"))
  mesh, evals, keep_best = c["mesh"], c["eval"], c["checkpoint"]["keep_best"]
  spike_factor = c["faults"]["spike_factor"]
  if c["steps"] and optim["warmup_steps"] >= c["steps"]:
    yield (
      f"optim.warmup_steps: got {optim['warmup_steps']} with steps="
      f"{c['steps']}, expected fewer; -1 takes optim.warmup_fraction"
    )
  if sum(size == -1 for size in mesh.values()) > 1 or 0 in mesh.values():
    yield (
      f"mesh: got {dict(mesh)}, expected 1 or more of each, and -1 (the rest) "
      "at most once"
    )
  if mesh["context"] > 0 and data["seq_len"] % mesh["context"]:
    yield (
      f"data.seq_len: got {data['seq_len']} with mesh.context="
      f"{mesh['context']}, expected a multiple"
    )
  parts = math.prod(max(mesh[axis], 1) for axis in ROWS) * c["accum_steps"]
  if c["batch_size"] % parts:
    yield (
      f"batch_size: got {c['batch_size']} with accum_steps="
      f"{c['accum_steps']}, "
      + ", ".join(f"mesh.{axis}={mesh[axis]}" for axis in ROWS)
      + ", expected a multiple of their product"
    )
  if lora["path"] and lora["rank"]:
    yield (
      f"lora.path: got {lora['path']!r} with lora.rank={lora['rank']}, "
      "expected lora.rank=0: the folder has a rank"
    )
  if model["quantize"] and not (lora["rank"] or lora["path"]):
    yield (
      f"model.quantize: got {model['quantize']!r} with lora.rank=0, expected "
      "adapters, as what is quantized cannot train"
    )
  if c["loss"]["kl"] and model["from_scratch"]:
    yield (
      f"loss.kl: got {c['loss']['kl']} with model.from_scratch=True, expected "
      "0, or a model that knows something"
    )
  pairs, teacher = c["preference"]["loss"], c["distill"]["teacher"]
  every = c["distill"]["every"]
  if every and teacher in ("", "kept"):
    yield (
      f"distill.every: got {every} with distill.teacher={teacher!r}, expected "
      "0, or a teacher that can be asked about new replies"
    )
  if teacher in ("average", "self_average") and not optim["ema"]:
    yield (
      f"distill.teacher: got {teacher!r} with optim.ema=0, expected an average "
      "to learn from; 0.99 is over some hundred steps"
    )
  of_pairs, taught = (
    f"preference.loss={pairs!r}",
    f"distill.teacher={teacher!r}",
  )
  whole = {"model.from_scratch": (False,), "lora.path": ("",)}
  uncut = {"data.over_long": ("drop", "error")}
  for on, what, wanted in (
    (
      pairs,
      of_pairs,
      whole
      | uncut
      | dict.fromkeys(_NO_PAIRS, (0,))
      | {
        "loss.normalize": ("token",),
        "data.train_on": ("assistant", "last_turn"),
      },
    ),
    (
      c["preference"]["reference"] == "kept",
      "preference.reference='kept'",
      {"preference.loss": ("dpo", "ipo", "robust", "kto")},
    ),
    (teacher, taught, {"preference.loss": ("",), "loss.kl": (0,)}),
    (teacher in ("base", "self"), taught, whole),
    (
      teacher.startswith("self"),
      taught,
      uncut | {"data.train_on": ("last_turn",)},
    ),
    (every, f"distill.every={every}", {"distill.ce": (0,)}),
    (
      teacher == "kept",
      taught,
      {"distill.divergence": ("forward",), "distill.temperature": (1,)},
    ),
  ):
    for key, allowed in wanted.items() if on else ():
      section, _, name = key.partition(".")
      if (value := c[section][name]) not in allowed:
        choices = " or ".join(map(repr, allowed))
        yield f"{key}: got {value!r} with {what}, expected {choices}"
  if 0 < spike_factor <= 1:
    yield (
      f"faults.spike_factor: got {spike_factor}, expected more than 1, or 0 "
      "for none"
    )
  if keep_best and not (evals["every"] or evals["patience"]):
    yield (
      f"checkpoint.keep_best: got {keep_best!r} with eval.every=0, expected "
      "evaluations while training: set eval.every"
    )
  if evals["patience"] and not (data["eval"] or data["holdout"] or keep_best):
    yield (
      f"eval.patience: got {evals['patience']} without held-out rows, expected "
      "data.holdout, data.eval or checkpoint.keep_best, to have a figure"
    )
  if not c["workdir"].strip():
    yield f"workdir: got {c['workdir']!r}, expected a folder"
  if c["batch_size"] * data["seq_len"] >= 2**31:
    yield (
      f"batch_size: got {c['batch_size']} with data.seq_len={data['seq_len']}, "
      "expected fewer than 2^31 tokens of a step"
    )
  if ours := {*data["template_kwargs"]} & _NOT_KWARGS:
    yield (
      f"data.template_kwargs: got {sorted(ours)}, expected other names: these "
      "are the rows'"
    )
  if not data["train"]:
    yield f"data.train: got {data['train']!r}, expected rows"
  yield from _wrong_extensions(c)
  yield from _wrong_items(c)


def _wrong_extensions(c: Mapping[str, Any]) -> Iterator[str]:
  """A line where optim.extended is not what --extend writes."""
  last, value = 0, c["optim"]["extended"]
  for pair in value:
    right = isinstance(pair, list | tuple) and len(pair) == 2
    if not right or pair[1] not in EXTENSIONS or not pair[0] > last:
      yield (
        f"optim.extended: got {_short(value)}, expected ((step, how), ...), "
        f"steps rising and how one of {EXTENSIONS}; leave it to --extend"
      )
      return
    last = pair[0]


def _wrong_items(c: Mapping[str, Any]) -> Iterator[str]:
  """A line for each item of a tuple that is no name, token, pair or regex."""

  def values(name: str) -> list[tuple[str, Any]]:
    section, _, key = name.partition(".")
    return [(name, value) for value in c[section][key]]

  patterns = [("lora.targets", c["lora"]["targets"])]
  for name in ("lora.also_train", "optim.freeze", "optim.decay"):
    patterns += values(name)
  for key in ("lora.rank_pattern", "lora.alpha_pattern", "optim.rates"):
    for name, pair in values(key):
      right = isinstance(pair, list | tuple) and len(pair) == 2
      value = pair[1] if right else None
      if not isinstance(value, int | float) or not 0 <= value < math.inf:
        yield f"{name}: got {_short(pair)}, expected (regex, a number)"
      else:
        patterns.append((name, pair[0]))
  for key, expected in (
    ("log.writers", "names"),
    ("data.allow", "names"),
    ("lora.new_token_rows", "the text of a token"),
    ("model.new_tokens", "the text of a token"),
    ("model.stop_tokens", "the text of a token"),
  ):
    for name, value in values(key):
      if not isinstance(value, str):
        yield f"{name}: got {_short(value)}, expected {expected}"
  for name, pattern in patterns:
    try:
      re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
      yield f"{name}: got {_short(pattern)}, expected a regex ({error})"
