"""What a config says of the model: where it is, and what is done to it."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sft_jax.common import hub, sharding, trees
from sft_jax.common.buckets import remote_workdir, storage
from sft_jax.common.workdir import find_json
from sft_jax.data.chat import template as templates
from sft_jax.data.tokenizers import tokenizer as tokenizers
from sft_jax.models import transformer
from sft_jax.models.attention import fastest, parallel
from sft_jax.models.config import ModelConfig, read_config
from sft_jax.models.hf import load_save, parameter_map, peft_load
from sft_jax.models.lora import lora, quantize, token_rows
from sft_jax.models.transformer import Model
from sft_jax.training.build.data import Config, Log, load_tokenizer


def find_model(config: Config) -> hub.Snapshot:
  """The folder of model.path; a resumed run's is of the commit it began with.

  A workdir stands for its export. `run.train` leaves the commit in
  workdir/model.json.

  Raises ValueError: the workdir of a run that has written no export.
  """
  folder = Path(config.model.path)
  if remote_workdir.is_run(config.model.path):
    return hub.find_model(storage.join(config.model.path, "export"))
  if (folder / "metrics.jsonl").exists():
    if not (folder / "export").is_dir():
      raise ValueError(
        f"model.path: got {folder}, a run without an export, expected one. "
        "Let it end with export=True, or write one: sft-jax export."
      )
    return hub.find_model(str(folder / "export"))
  path = config.model.path
  record = remote_workdir.folder(config.workdir) / "model.json"
  began = None if Path(path).exists() else find_json(record)
  if began and began["commit"]:
    path = f"{began['repo_id']}@{began['commit']}"
  return hub.find_model(path)


def _choose_rows(
  config: Config,
  shape: ModelConfig,
  tokenizer: tokenizers.Tokenizer,
  log: Log,
) -> tuple[int, ...]:
  """Ids of the rows that train alone, see lora.new_token_rows.

  Under LoRA, and unless the embedding trains whole: new tokens, and of the
  tokens that the template or the stop ids use, those that are not trained.
  """
  choice = config.lora.new_token_rows
  whole = trees.matches_any(config.lora.also_train, "embed/embedding")
  if not config.lora.rank or whole:
    return ()
  known = {t: tokenizer.special_tokens.get(t) for t in choice if t != "auto"}
  if odd := sorted(text for text, i in known.items() if i is None):
    raise ValueError(
      f"lora.new_token_rows: {odd} are no special tokens of the tokenizer, "
      "expected 'auto' or some of them. Add them by model.new_tokens."
    )
  chosen = {i for i in known.values() if i is not None}
  if "auto" not in choice:
    return tuple(sorted(chosen))
  source = tokenizer.chat_template or ""
  used = {
    i: text
    for text, i in sorted(tokenizer.special_tokens.items())
    if text in source or i in tokenizer.stop_ids
  }
  chosen |= {i for i in used if i >= shape.vocab_size}
  chosen |= {tokenizer.special_tokens[t] for t in config.model.new_tokens}
  old = sorted(used.keys() - chosen)
  found: dict[int, str] = {}
  if old and not config.model.from_scratch:
    tensors, _ = load_save.open_folder(Path(config.model.path), shape)
    for at in ("embed",) if shape.tie_embeddings else ("embed", "head"):
      table = tensors[parameter_map.table_name(at, shape)]
      found |= token_rows.untrained(table.read, shape.vocab_size, old)
  for i, why in found.items():
    log(
      f"{used[i]} (id {i}) looks untrained in the base model: {why}. Its row "
      "trains alone (lora.new_token_rows)."
    )
  return tuple(sorted(chosen | found.keys()))


class Skeleton(NamedTuple):
  """A model that has shapes and no parameters yet.

  Attributes:
    model: its functions.
    init: init(key) -> fresh parameters, quantized where the config says so.
    choices: the arguments that `models.transformer.build` took.
    leaves: adapters that take the place of fresh ones.
  """

  model: Model
  init: Callable[[jax.Array], trees.Tree]
  choices: dict[str, Any]
  leaves: dict[str, Any]


def build_model(
  config: Config, shape: ModelConfig, mesh: Mesh, rows: tuple[int, ...] = ()
) -> Skeleton:
  """The model of this shape that the config asks for; nothing is allocated.

  The shape includes new tokens; for `rows` see `lora.LoraConfig.token_rows`.
  """
  adapters, leaves = _adapters(config, shape)
  if adapters and rows:
    adapters = dataclasses.replace(adapters, token_rows=rows)
  names = ("dtype", "param_dtype", "attention", "remat", "scan")
  choices = {name: config.model[name] for name in names}
  choices |= {"lora": adapters, "mesh": mesh}
  if measured := measure_attention(config, shape, mesh):
    choices["attention"] = measured.name
  codec = config.model.quantize
  model = transformer.build(shape, **choices)

  def init(key: jax.Array) -> trees.Tree:
    params = model.init(key)
    if codec and adapters:
      params = quantize.pack_tree(params, codec, keep=adapters.trains)
    return params

  return Skeleton(model, init, choices, leaves)


def measure_attention(
  config: Config, shape: ModelConfig, mesh: Mesh
) -> fastest.Found | None:
  """The fastest attention for this run where 'auto' meets a GPU, else None."""
  devices = mesh.local_devices
  on_gpu = bool(devices) and devices[0].platform in ("gpu", "cuda")
  if config.model.attention != "auto" or not on_gpu:
    return None
  if parallel.is_ring(mesh, shape.num_heads):
    return None
  rows = sharding.size(mesh) * config.accum_steps
  heads = mesh.shape["tensor"] * mesh.shape["context"]
  return fastest.fastest(
    fastest.Shape(
      max(1, config.batch_size // rows),
      config.data.seq_len,
      max(1, shape.num_heads // heads),
      max(1, shape.num_kv_heads // heads),
      max(shape.head_dim, shape.global_head_dim),
      config.model.dtype,
      tuple(sorted({x.window for x in shape.layers}, key=lambda w: w or 0)),
      shape.attn_softcap,
      shape.attn_sinks,
    ),
    devices[0].device_kind,
  )


def load_model(
  config: Config, mesh: Mesh, log: Log
) -> tuple[Model, trees.Tree]:
  """The model and its parameters, on their devices.

  The vocabulary has room for all of the tokenizer's ids; where it grows it is
  padded to a multiple of 64 and of what the mesh divides it by.
  """
  shape = read_config(config.model.path)
  tokenizer = load_tokenizer(config, config.model.path)
  rows = _choose_rows(config, shape, tokenizer, log)
  grows = (
    config.model.new_tokens or config.model.chat_template in templates.TEMPLATES
  )
  if grows and tokenizer.vocab_size > shape.vocab_size:
    unit = math.lcm(64, mesh.shape["tensor"])
    size = -(-tokenizer.vocab_size // unit) * unit
    log(f"The vocabulary grows from {shape.vocab_size:,} to {size:,} rows.")
    shape = shape.with_vocab(size)
  built = build_model(config, shape, mesh, rows)
  model, key = built.model, jax.random.key(config.seed)
  if config.model.from_scratch:
    log(f"New parameters in the shapes of {config.model.path} ...")
    shardings = sharding.param_shardings(jax.eval_shape(built.init, key), mesh)
    params = jax.jit(built.init, out_shardings=shardings)(key)
  else:
    log(f"Loading {config.model.path} ...")
    model, params = load_save.load_pretrained(
      config.model.path,
      key=key,
      quantize=config.model.quantize,
      vocab_size=shape.vocab_size,
      new_rows=config.model.new_rows,
      **built.choices,
    )
  return model, peft_load.place_adapter(params, built.leaves)


def teacher_config(config: Config) -> Config | None:
  """The config of distill.teacher where it is another model, else None."""
  path = config.get("distill", {}).get("teacher", "")
  if path in ("", "base", "self", "average", "self_average", "kept"):
    return None
  config = config.copy_and_resolve_references()
  config.model.path = str(hub.find_model(path).folder)
  config.model.param_dtype = config.model.dtype
  config.model.quantize = config.lora.path = ""
  config.model.new_tokens = config.model.stop_tokens = ()
  config.lora.rank = 0
  return config


def load_teacher(
  config: Config, tokenizer: tokenizers.Tokenizer, mesh: Mesh, log: Log
) -> tuple[Model, trees.Tree] | None:
  """The model that distill.teacher names, and its parameters, if one.

  Raises ValueError: a model of another vocabulary.
  """
  theirs = teacher_config(config)
  if theirs is None:
    return None
  other = load_tokenizer(theirs, theirs.model.path)
  check_same_vocabulary(tokenizer, other, "distill.teacher")
  return load_model(theirs, mesh, log)


def check_same_vocabulary(
  ours: tokenizers.Tokenizer, theirs: tokenizers.Tokenizer, what: str
) -> None:
  """Raises ValueError unless every id stands for the same text."""
  if ours.fingerprint == theirs.fingerprint:
    return
  texts = [
    [one.decode([i], skip_special=False) for i in range(one.vocab_size)]
    for one in (ours, theirs)
  ]
  pairs = enumerate(zip(*texts, strict=False))
  odd = next(
    (f"id {i} is {a!r} and {b!r}" for i, (a, b) in pairs if a != b), ""
  )
  if odd or ours.vocab_size != theirs.vocab_size:
    raise ValueError(
      f"{what}: {theirs.folder} has {theirs.vocab_size} ids and {ours.folder} "
      f"{ours.vocab_size}{odd and '; ' + odd}; expected one vocabulary, as the "
      "predictions are compared id by id. Name a teacher of the same family."
    )


def _adapters(
  config: Config, shape: ModelConfig
) -> tuple[lora.LoraConfig | None, dict[str, Any]]:
  """The adapters that the config asks for, and the leaves they start from."""
  if config.lora.path:
    found = peft_load.load_adapter(config.lora.path, shape)
    # How it is trained on is this run's business.
    dropout = config.lora.dropout
    return dataclasses.replace(found.lora, dropout=dropout), found.leaves
  if not config.lora.rank:
    return None, {}
  fields = {field.name for field in dataclasses.fields(lora.LoraConfig)}
  fields -= {"token_rows"}  # Of the tokenizer, see `_choose_rows`.
  chosen = {name: _tuples(config.lora[name]) for name in fields}
  return lora.LoraConfig(**chosen), {}


def _tuples(value: Any) -> Any:
  """Lists as tuples, all the way down: JSON, as in a workdir, has no tuples."""
  if isinstance(value, list | tuple):
    return tuple(_tuples(x) for x in value)
  return value
