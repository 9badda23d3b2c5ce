"""What a config says of the model: where it is, and what is done to it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sft_jax.common import hub, sharding, trees
from sft_jax.models import transformer
from sft_jax.models.config import ModelConfig, read_config
from sft_jax.models.hf import load_save, peft
from sft_jax.models.lora import lora, quantize
from sft_jax.models.transformer import Model
from sft_jax.training.build.data import Config, Log


def find_model(config: Config) -> hub.Snapshot:
  """The folder of model.path; a resumed run's is of the commit it began with.

  `train.run` leaves the commit in workdir/model.json.
  """
  path, record = config.model.path, Path(config.workdir) / "model.json"
  if record.exists() and not Path(path).exists():
    began = json.loads(record.read_text())
    if began["commit"]:
      path = f"{began['repo_id']}@{began['commit']}"
  return hub.find_model(path)


class Skeleton(NamedTuple):
  """A model that has shapes and no parameters yet.

  Attributes:
    model: its functions.
    init: init(key) -> fresh parameters, quantised where the config says so.
    choices: the arguments that `models.transformer.build` took.
    leaves: adapters that take the place of fresh ones.
  """

  model: Model
  init: Callable[[jax.Array], trees.Tree]
  choices: dict[str, Any]
  leaves: dict[str, Any]


def build_model(config: Config, shape: ModelConfig, mesh: Mesh) -> Skeleton:
  """The model of this shape that the config asks for; nothing is allocated."""
  adapters, leaves = _adapters(config, shape)
  choices = {
    "dtype": config.model.dtype,
    "param_dtype": config.model.param_dtype,
    "attention": config.model.attention,
    "remat": config.model.remat,
    "scan": config.model.scan,
    "lora": adapters,
    "mesh": mesh,
  }
  codec = config.model.quantize
  keep = adapters.trains if adapters else lambda path: True
  if codec and not adapters:
    raise ValueError(
      f"model.quantize: got {codec!r} with lora.rank 0, expected adapters, as "
      "what is quantised cannot train. Set lora.rank, or model.quantize to ''."
    )
  model = transformer.build(shape, **choices)

  def init(key: jax.Array) -> trees.Tree:
    params = model.init(key)
    return quantize.pack_tree(params, codec, keep=keep) if codec else params

  return Skeleton(model, init, choices, leaves)


def load_model(
  config: Config, mesh: Mesh, log: Log
) -> tuple[Model, trees.Tree]:
  """The model and its parameters, on their devices."""
  built = build_model(config, read_config(config.model.path), mesh)
  model, key = built.model, jax.random.key(config.seed)
  if config.model.from_scratch:
    log(f"New parameters in the shapes of {config.model.path} ...")
    shardings = sharding.param_shardings(jax.eval_shape(built.init, key), mesh)
    params = jax.jit(built.init, out_shardings=shardings)(key)
  else:
    log(f"Loading {config.model.path} ...")
    model, params = load_pretrained(
      config.model.path,
      key=key,
      quantize=config.model.quantize,
      **built.choices,
    )
  return model, peft.place(params, built.leaves)


def _adapters(
  config: Config, shape: ModelConfig
) -> tuple[lora.LoraConfig | None, dict[str, Any]]:
  """The adapters that the config asks for, and the leaves they start from."""
  if config.lora.path:
    if config.lora.rank:
      raise ValueError(
        f"lora.path: got {config.lora.path} and lora.rank {config.lora.rank}, "
        "expected one of them: the folder has a rank, an alpha and targets. "
        "Set lora.rank to 0."
      )
    found = peft.load_adapter(config.lora.path, shape)
    # How it is trained on is this run's business.
    dropout = config.lora.dropout
    return dataclasses.replace(found.lora, dropout=dropout), found.leaves
  if not config.lora.rank:
    return None, {}
  fields = {field.name for field in dataclasses.fields(lora.LoraConfig)}
  fields -= {"token_rows"}
  chosen = {name: _tuples(config.lora[name]) for name in fields}
  return lora.LoraConfig(**chosen), {}


def _tuples(value: Any) -> Any:
  """Lists as tuples, all the way down: JSON, as in a workdir, has no tuples."""
  if isinstance(value, list | tuple):
    return tuple(_tuples(x) for x in value)
  return value


def load_pretrained(
  path: str | Path,
  *,
  dtype: str = "float32",
  mesh: Mesh | None = None,
  **choices: Any,
) -> tuple[Model, trees.Tree]:
  """A Hugging Face folder as (model, parameters), ready to run.

  Args:
    path: the folder (config.json and safetensors), or an id of the hub:
      'org/name' or 'org/name@revision'.
    dtype: of activations; parameters are float32 unless `param_dtype` says
      otherwise.
    mesh: where the parameters shall lie and batches will, see
      `sharding.make_mesh`; None is the first device.
    choices: further arguments of `models.hf.load_pretrained`.

  Raises:
    ValueError: a folder that is not there, not whole or not supported.
  """
  shardings = None
  if mesh is not None:
    shardings = lambda shapes: sharding.param_shardings(shapes, mesh)
  return load_save.load_pretrained(
    path, dtype=dtype, mesh=mesh, shardings=shardings, **choices
  )
