"""Hugging Face folders: one table of names, read and written by it.

    model.layers.3.self_attn.q_proj.weight [N * H, D]
      <-> layers/attn/q/kernel [L, D, N * H], at index 3, transposed

How tensors lie in files is the business of `weights`.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax import trees
from sft_jax.models import lora as lora_lib
from sft_jax.models import transformer
from sft_jax.models.config import read_config
from sft_jax.models.transformer import Model
from sft_jax.models.weights import (
  Pending,
  open_tensors,
  replace_folder,
  save_tensors,
  write_json,
  write_tensors,
)
from sft_jax.trees import Tree

# Ours: theirs. Kernels are [in, out] here and [out, in] there.
_TOP = {
  "embed/embedding": "model.embed_tokens.weight",
  "final_norm/scale": "model.norm.weight",
  "head/embedding": "lm_head.weight",
}
_LAYER = {
  "attn_norm": "input_layernorm",
  "attn/q": "self_attn.q_proj",
  "attn/k": "self_attn.k_proj",
  "attn/v": "self_attn.v_proj",
  "attn/o": "self_attn.o_proj",
  "attn/q_norm": "self_attn.q_norm",
  "attn/k_norm": "self_attn.k_norm",
  "mlp_norm": "post_attention_layernorm",
  "mlp/gate": "mlp.gate_proj",
  "mlp/up": "mlp.up_proj",
  "mlp/down": "mlp.down_proj",
}
_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_FLOATS = ("F32", "BF16", "F16")

Shardings = Tree | Callable[[Tree], Tree]


@runtime_checkable
class TokenizerFiles(Protocol):
  """What an export needs to know of a tokenizer."""

  @property
  def files(self) -> Sequence[Path]:
    """Files of the tokenizer, to copy."""
    ...

  @property
  def stop_ids(self) -> Sequence[int]:
    """Ids at which generation stops."""
    ...


def hf_names(path: str, num_layers: int) -> list[str]:
  """Names of a parameter's tensors: one per layer, or one.

  >>> hf_names('layers/attn/q/kernel', 2)[1]
  'model.layers.1.self_attn.q_proj.weight'
  """
  if path in _TOP:
    return [_TOP[path]]
  module, leaf = path.removeprefix("layers/").rsplit("/", 1)
  name = f"{_LAYER[module]}.{_LEAF[leaf]}"
  return [f"model.layers.{i}.{name}" for i in range(num_layers)]


def load_pretrained(
  path: str | Path,
  *,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  attention: str = "auto",
  remat: str = "none",
  scan: bool = True,
  lora: lora_lib.LoraConfig | None = None,
  key: jax.Array | None = None,
  shardings: Shardings | None = None,
) -> tuple[Model, Tree]:
  """Loads a model folder: config.json and safetensors, sharded or not.

  Args:
    path: the folder.
    dtype: of activations and products.
    param_dtype: of the parameters, whatever the file holds.
    attention: see `transformer.build`.
    remat: see `transformer.build`.
    scan: see `transformer.build`.
    lora: adapters to add; fresh, so the model is still the base model.
    key: randomness of the adapters; jax.random.key(0) by default.
    shardings: a tree of shardings like the parameters, or a function that
      gives one from the tree of their shapes. By default one device.

  Raises:
    ValueError: a missing folder, config or weight file; pickled weights; a
      file outside the folder; a missing, unknown, wrongly shaped or
      non-floating tensor; a config that is not supported.
  """
  folder = Path(path)
  if not folder.is_dir():
    raise ValueError(
      f"{folder}: no such folder; expected a Hugging Face model folder "
      "(config.json, *.safetensors). Check model.path."
    )
  config = read_config(folder)
  model = transformer.build(
    config,
    dtype=dtype,
    param_dtype=param_dtype,
    attention=attention,
    remat=remat,
    scan=scan,
    lora=lora,
  )
  key = jax.random.key(0) if key is None else key
  shapes = jax.eval_shape(model.init, key)
  placed = shardings(shapes) if callable(shardings) else shardings
  places = trees.flatten(placed) if placed else {}
  base, _ = trees.partition(shapes, lambda path: not lora_lib.is_adapter(path))
  params = {}
  with ExitStack() as stack:
    tensors = open_tensors(folder, stack)
    _check_tensors(folder, tensors, base, model)
    for leaf, array in _read(tensors, base, config.num_layers):
      params[leaf] = _put(array, places.get(leaf))
  params = trees.unflatten(params)
  if lora:
    whole = lora_lib.init(key, params, lora, dtype=jnp.dtype(param_dtype))
    params = trees.map_paths(
      lambda path, x: (
        _put(np.asarray(x), places.get(path))
        if lora_lib.is_adapter(path)
        else x
      ),
      whole,
    )
  return model, params


def save_pretrained(
  path: str | Path,
  model: Model,
  params: Tree,
  tokenizer: TokenizerFiles | None = None,
  *,
  dtype: Any = None,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a folder that transformers and others load; all of it or nothing.

  Adapters are folded into their kernels in float32. A model folder that is
  already there is replaced.

  Args:
    path: the folder to write.
    model: the model.
    params: its parameters.
    tokenizer: whose files to copy and whose stop ids to write.
    dtype: of the written tensors; by default the dtype that config.json
      names (so that load and save give back the same bytes), else float32.
    max_shard_bytes: size above which the tensors are split over files.

  Raises:
    ValueError: parameters that are not this model's; a path that holds
      something else than a model.
  """
  if any(lora_lib.is_adapter(leaf) for leaf in trees.flatten(params)):
    if model.lora is None:
      raise ValueError(
        "save_pretrained: the parameters hold adapters but the model was "
        "built without; expected lora=LoraConfig(...). Pass the model that "
        "trained them."
      )
    params = lora_lib.merge(params, model.lora)
  _check_params(model, params)
  raw = dict(model.config.raw)
  dtype_key = "torch_dtype" if "torch_dtype" in raw else "dtype"
  dtype = jnp.dtype(dtype or raw.get(dtype_key) or jnp.float32)
  raw[dtype_key] = dtype.name
  generation = {"bos_token_id": raw.get("bos_token_id")}
  files = list(tokenizer.files) if tokenizer else []
  for file in files:
    if file.name == "generation_config.json":
      generation = json.loads(file.read_text(encoding="utf-8"))
  if tokenizer:
    stops = [int(i) for i in tokenizer.stop_ids]
    raw["eos_token_id"] = stops[0] if len(stops) == 1 else stops
  generation["eos_token_id"] = raw.get("eos_token_id")

  def write(folder: Path) -> None:
    for file in files:
      shutil.copyfile(file, folder / file.name)
    write_json(folder / "config.json", raw)
    write_json(
      folder / "generation_config.json",
      {k: v for k, v in generation.items() if v is not None},
    )
    tensors = _pending(model, params, dtype)
    write_tensors(folder, tensors, max_shard_bytes=max_shard_bytes)

  replace_folder(Path(path), "config.json", write)


def save_adapter(
  path: str | Path, model: Model, params: Tree, *, base: str
) -> None:
  """Writes the adapters alone, as a PEFT folder.

  Args:
    path: the folder to write.
    model: a model built with `lora`.
    params: its parameters, adapters among them.
    base: name or path of the base model, as PEFT will look for it.

  Raises:
    ValueError: no adapters.
  """
  flat = trees.flatten(params)
  adapters = [leaf for leaf in flat if lora_lib.is_adapter(leaf)]
  if model.lora is None or not adapters:
    raise ValueError(
      "save_adapter: no adapters; expected a model built with "
      "lora=LoraConfig(...) and its parameters. Use save_pretrained."
    )
  tensors, modules = {}, set()
  for leaf in adapters:
    module, half = leaf.removeprefix("layers/").rsplit("/", 1)
    name = _LAYER[module]
    modules.add(name.rsplit(".", 1)[1])
    letter = {"lora_a": "A", "lora_b": "B"}[half]
    for i, x in enumerate(np.asarray(flat[leaf])):
      tensors[
        f"base_model.model.model.layers.{i}.{name}.lora_{letter}.weight"
      ] = x.T
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": model.lora.rank,
    "lora_alpha": model.lora.alpha,
    "lora_dropout": 0.0,
    "target_modules": sorted(modules),
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "inference_mode": True,
  }

  def write(folder: Path) -> None:
    write_json(folder / "adapter_config.json", config)
    save_tensors(folder / "adapter_model.safetensors", tensors)

  replace_folder(Path(path), "adapter_config.json", write)


# -- Reading ----------------------------------------------------------------


def _check_tensors(
  folder: Path, tensors: Mapping[str, Any], base: Tree, model: Model
) -> None:
  """Refuses a checkpoint that is not exactly this model's."""
  layers = model.config.num_layers
  expected = {}
  for path, leaf in trees.flatten(base).items():
    shape = leaf.shape[1:] if path.startswith("layers/") else leaf.shape
    shape = shape[::-1] if path.endswith("/kernel") else shape
    expected |= dict.fromkeys(hf_names(path, layers), tuple(shape))
  extras = {
    name
    for name in tensors.keys() - expected.keys()
    # Computed from the config; old checkpoints also stored it.
    if not name.endswith("rotary_emb.inv_freq")
  }
  if model.config.tie_embeddings and "lm_head.weight" in extras:
    head = tensors["lm_head.weight"].get_tensor("lm_head.weight")
    name = _TOP["embed/embedding"]
    same = name in tensors and np.array_equal(
      head, tensors[name].get_tensor(name)
    )
    if not same:
      raise ValueError(
        f"{folder}: lm_head.weight differs from {name} though config.json "
        "ties them; expected equal tensors. Set tie_word_embeddings to false."
      )
    extras.discard("lm_head.weight")
  missing = expected.keys() - tensors.keys()
  for what, names in (("missing", missing), ("unknown", extras)):
    if names:
      raise ValueError(
        f"{folder}: {len(names)} tensors are {what}: {sorted(names)[:3]}; "
        f"expected those of a {model.config.family} with {layers} layers. "
        "Check config.json against the weights."
      )
  for name, shape in expected.items():
    view = tensors[name].get_slice(name)
    got = tuple(view.get_shape())
    if got != shape:
      raise ValueError(
        f"{folder}: {name} has shape {got}; expected {shape} by config.json. "
        "Check config.json against the weights."
      )
    if view.get_dtype() not in _FLOATS:
      raise ValueError(
        f"{folder}: {name} is {view.get_dtype()}; expected one of {_FLOATS}. "
        "Use the checkpoint before quantisation."
      )


def _read(
  tensors: Mapping[str, Any], base: Tree, layers: int
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (path, stacked array), reading one tensor at a time."""
  for path, leaf in trees.flatten(base).items():
    stacked = np.empty(leaf.shape, leaf.dtype)
    parts = stacked if path.startswith("layers/") else stacked[None]
    for i, name in enumerate(hf_names(path, layers)):
      tensor = tensors[name].get_tensor(name)
      parts[i] = tensor.T if path.endswith("/kernel") else tensor
    yield path, stacked


def _put(array: np.ndarray, sharding: Any) -> jax.Array:
  """Places an array; each process hands over the parts that it holds."""
  if sharding is None:
    return jnp.asarray(array)
  return jax.make_array_from_callback(
    array.shape, sharding, lambda index: array[index]
  )


# -- Writing ----------------------------------------------------------------


def _pending(model: Model, params: Tree, dtype: Any) -> Iterator[Pending]:
  """The tensors of a parameter tree; nothing is copied before its turn."""
  for path, leaf in trees.flatten(params).items():
    names = hf_names(path, model.config.num_layers)

    def make(i: int, path: str = path, leaf: Any = leaf) -> np.ndarray:
      x = leaf[i] if path.startswith("layers/") else leaf
      x = np.asarray(x).astype(dtype)
      return x.T if path.endswith("/kernel") else x

    for i, name in enumerate(names):
      size = leaf.size // len(names) * dtype.itemsize
      yield Pending(name, size, partial(make, i))


def _check_params(model: Model, params: Tree) -> None:
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  want = {
    path: leaf.shape
    for path, leaf in trees.flatten(shapes).items()
    if not lora_lib.is_adapter(path)
  }
  got = {path: tuple(x.shape) for path, x in trees.flatten(params).items()}
  odd = sorted(p for p in want.keys() | got.keys() if want.get(p) != got.get(p))
  if odd:
    raise ValueError(
      f"save_pretrained: {odd[0]} has shape {got.get(odd[0])}; expected "
      f"{want.get(odd[0])}. Pass the parameters of this model."
    )
