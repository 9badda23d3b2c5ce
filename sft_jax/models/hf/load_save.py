"""Hugging Face folders: one table of names, read and written by it.

    model.layers.3.self_attn.q_proj.weight [N * H, D]
      <-> layers/attn/q/kernel [L, D, N * H], at index 3, transposed

`safetensors_files` reads and writes the files, `device_loading` puts tensors
on devices.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sft_jax.common import distributed, hub, sharding, trees
from sft_jax.common.buckets import ranges
from sft_jax.common.trees import Tree
from sft_jax.common.workdir import replace_folder
from sft_jax.models import transformer
from sft_jax.models.config import FIELDS, ModelConfig, read_config
from sft_jax.models.families import FAMILIES
from sft_jax.models.hf import device_loading as loading
from sft_jax.models.hf import parameter_map
from sft_jax.models.hf import safetensors_files as files
from sft_jax.models.hf.dequantize import Decoded, check_method, dequantized
from sft_jax.models.hf.safetensors_files import Pending, Tensor
from sft_jax.models.lora import lora as lora_lib
from sft_jax.models.lora import token_rows
from sft_jax.models.lora.merge import merge
from sft_jax.models.transformer import Model

_FLOATS = (np.float32, ml_dtypes.bfloat16, np.float16)
# Rows of tensors are compared this many bytes at a time.
_CHUNK = 64 << 20

# The shardings of a tree of parameters, from the tree of their shapes.
Shardings = Callable[[Tree], Tree]


class TokenizerFiles(Protocol):
  """What an export needs of a tokenizer: its files, and where replies stop."""

  def write_files(self, folder: Path) -> None: ...

  @property
  def stop_ids(self) -> Sequence[int]: ...


def load_pretrained(
  path: str | Path,
  *,
  param_dtype: Any = jnp.float32,
  lora: lora_lib.LoraConfig | None = None,
  quantize: str = "",
  mesh: Mesh | None = None,
  key: jax.Array | None = None,
  shardings: Shardings | None = None,
  vocab_size: int = 0,
  new_rows: str = "mean",
  **choices: Any,
) -> tuple[Model, Tree]:
  """Loads a model folder: config.json and safetensors, sharded or not.

  Args:
    path: the folder, or an id of the hub: 'org/name' or 'org/name@revision'.
    param_dtype: of the parameters, whatever the file holds.
    lora: adapters to add; fresh, so the model is still the base model.
    quantize: 'int8' or 'nf4' keeps what does not train in few bits, see
      `models.quantize`; '' keeps it in `param_dtype`.
    key: randomness of the adapters; jax.random.key(0) by default.
    mesh: that parameters and batches are divided over, see
      `sharding.make_mesh`; None is one device.
    shardings: where parameters are, if not as `sharding.RULES` say.
    vocab_size: of the model, if larger than the folder's: the embedding and
      the head grow by rows for new tokens.
    new_rows: how these start, see `token_rows.grow`.
    choices: further arguments of `transformer.build`: dtype, attention, ...

  Raises ValueError: a missing folder, config or weight file; pickled weights; a
  file outside the folder; a missing, unknown, wrongly shaped or non-floating
  tensor; a config that is not supported.
  """
  folder = hub.find_model(path).folder
  if not folder.is_dir():
    raise ValueError(
      f"{folder}: no such folder; expected a Hugging Face model folder "
      "(config.json, *.safetensors). Check model.path."
    )
  files.inside(folder, "config.json")
  files.check_checksums(folder)
  config = read_config(folder)
  tensors, notes = open_folder(folder, config)
  held = [part for x in tensors.values() for part in getattr(x, "parts", (x,))]
  stored = {part.name: part.shape[0] for part in held if part and part.shape}
  notes = config.notes + notes
  config = dataclasses.replace(config, notes=notes, stored=stored)
  # Of the shapes in the files; the model's vocabulary may be larger.
  old = transformer.build(config, param_dtype=param_dtype)
  if vocab_size > config.vocab_size:
    config = config.with_vocab(vocab_size)
  choices |= {"param_dtype": param_dtype, "lora": lora, "mesh": mesh}
  model = transformer.build(config, **choices)
  key = jax.random.key(0) if key is None else key
  shapes = jax.eval_shape(model.init, key)
  grown, _ = trees.partition(shapes, lambda path: not lora_lib.is_adapter(path))
  adapt = lora_lib.prepare(key, grown, lora, quantize)
  base = jax.eval_shape(old.init, key)

  def prepare(path: str, x: jax.Array) -> dict[str, jax.Array]:
    """What a leaf of the folder becomes."""
    if path in lora_lib.BY_TOKEN and len(x) < config.vocab_size:
      own = jax.random.fold_in(key, lora_lib.BY_TOKEN.index(path))
      x = token_rows.grow(own, x, config.vocab_size, new_rows)
    return adapt(path, x)

  whole = {
    name: shape
    for path, x in trees.flatten(base).items()
    for name, shape in jax.eval_shape(partial(prepare, path), x).items()
  }
  placed: dict[str, Any] = {}
  if mesh and not shardings:
    shardings = partial(sharding.param_shardings, mesh=mesh)
  if shardings:
    placed = trees.flatten(shardings(base))
    placed |= trees.flatten(shardings(trees.unflatten(whole)))
  _check_tensors(folder, tensors, base, old.config)
  params = {}
  leaves = _leaves(tensors, base, old.config, placed)
  for path, x in loading.load_leaves(leaves):
    become = jax.eval_shape(partial(prepare, path), x)
    own = become.get(path, x)
    if len(become) == 1 and (own.shape, own.dtype) == (x.shape, x.dtype):
      params[path] = x
    else:
      places = {name: placed.get(name) for name in become}
      params |= jax.jit(partial(prepare, path), out_shardings=places)(x)
  ranges.check(folder)
  return model, trees.unflatten(dict(sorted(params.items())))


def save_pretrained(
  path: str | Path, model: Model, params: Tree, *args: Any, **choices: Any
) -> None:
  """`write_folder`, all of it or nothing; an older model folder is replaced.

  Raises ValueError: parameters that are not this model's; a path that holds
  something else than a model.
  """
  write = lambda folder: write_folder(folder, model, params, *args, **choices)
  replace_folder(Path(path), "config.json", write)


def merged(model: Model, params: Tree, dtype: Any = None) -> Tree:
  """The parameters with adapters folded in and quantized leaves decoded.

  Raises ValueError: parameters that are not this model's.
  """
  params = merge(params, model.lora, dtype=dtype).params
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
  return params


def write_folder(
  folder: Path,
  model: Model,
  params: Tree,
  tokenizer: TokenizerFiles | None = None,
  *,
  dtype: Any = None,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Fills a folder with a model that transformers and others load.

  Adapters are folded into their kernels in float32 and what is quantized is
  decoded, see `models.merge`. Arrays may be sharded, over processes too: they
  are gathered one tensor at a time, and the first process writes.

  Args:
    tokenizer: whose files to copy and whose stop ids to write.
    dtype: of the written tensors; by default that of the parameters.
    max_shard_bytes: size above which the tensors are split over files.

  Raises ValueError: parameters that are not this model's.
  """
  dtype = export_dtype(params, dtype)
  params = merged(model, params, dtype)
  # Neither few bits nor code of its own are in the folder that is written.
  gone = ("quantization_config", "auto_map")
  raw = {k: v for k, v in model.config.raw.items() if k not in gone}
  raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = dtype.name
  tensors = _as_stored(_pending(model, params, dtype), model.config)
  if jax.process_index():
    files.write_tensors(None, tensors, max_shard_bytes=max_shard_bytes)
    return
  generation = {"bos_token_id": raw.get("bos_token_id")}
  if tokenizer:
    tokenizer.write_files(folder)
    file = folder / "generation_config.json"
    if file.is_file():
      generation = json.loads(file.read_text(encoding="utf-8"))
    stops = [int(i) for i in tokenizer.stop_ids]
    raw["eos_token_id"] = stops[0] if len(stops) == 1 else stops
  generation["eos_token_id"] = raw.get("eos_token_id")
  known = {k: v for k, v in generation.items() if v is not None}
  files.write_json(folder / "config.json", raw)
  files.write_json(folder / "generation_config.json", known)
  files.write_tensors(folder, tensors, max_shard_bytes=max_shard_bytes)


def write_into(folder: Path, source: Path, model: Model, params: Tree) -> None:
  """Fills a folder with a copy of `source`, these weights in place of its own.

  Those keep the dtype that they have there. Every other byte is as it was,
  vision towers and tokenizer files among them.

  Raises ValueError: weights in few bits there, or another model's.
  """
  there = model_tensors(source)
  params = merged(model, params, jnp.float32)
  tensors = list(_pending(model, params, np.dtype(np.float32)))
  c = model.config
  head, embed = (parameter_map.table_name(x, c) for x in ("head", "embed"))
  for new in tensors:
    old = there.get(new.name)
    kept = isinstance(old, Tensor) and old.dtype in _FLOATS
    if old is None or not kept or old.shape != new.shape:
      found = "nothing" if old is None else f"{old.dtype} {old.shape}"
      raise ValueError(
        f"{source}: {new.name} is {found}; expected {new.shape} in float32, "
        "bfloat16 or float16. Export a folder of its own instead."
      )
  if jax.process_index() == 0:
    for file in [*source.iterdir()]:
      kept = file.name != files.CHECKSUMS and file.suffix != ranges.ENDING
      if kept and file.is_file():
        ranges.need_all(file)
        shutil.copyfile(file, folder / file.name)
  for new in tensors:
    array: Any = new.make()
    if jax.process_index():
      continue
    same = [new.name]
    if new.name == embed and c.tie_embeddings and head in there:
      same.append(head)
    for old in (there[name] for name in same):
      with (folder / old.path.name).open("r+b") as file:
        file.seek(old.offset)
        files.write_array(file, array.astype(old.dtype))


def model_tensors(folder: Path) -> dict[str, Tensor]:
  """The model's tensors of a folder by their official names, in its dtypes."""
  config, tensors = read_config(folder), files.open_tensors(folder)
  if config.part_of:
    tensors = parameter_map.text_tensors(tensors)
  return _as_named(tensors, config)


def export_dtype(params: Tree, dtype: Any = None) -> np.dtype:
  """What `write_folder` writes: `dtype`, else that of the parameters.

  Of parameters in several, as adapters may be, that of the final norm.
  """
  return jnp.dtype(dtype or params["final_norm"]["scale"].dtype)


# -- Reading ----------------------------------------------------------------


def open_folder(
  folder: Path, config: ModelConfig
) -> tuple[dict[str, Tensor | Decoded], tuple[str, ...]]:
  """The model's tensors by their official names, and what to tell of them.

  Raises ValueError: see `load_pretrained`; fewer tensors than config.json has
  layers, before anything is made in that size.
  """
  method = check_method(config.raw, folder / "config.json")
  tensors: dict[str, Any] = files.open_tensors(folder)
  notes: tuple[str, ...] = ()
  if config.part_of:
    text = parameter_map.text_tensors(tensors)
    left = {t.name for t in tensors.values()} - {t.name for t in text.values()}
    parts = {name.removeprefix("model.").split(".")[0] for name in left}
    if left:
      notes += (f"{len(left)} tensors not loaded: {', '.join(sorted(parts))}",)
    tensors = text
  if method:
    tensors = dequantized(tensors, config.raw["quantization_config"])
    notes += (f"weights dequantized from {method} while loading",)
  fields = ("num_mtp_layers", "num_nextn_predict_layers")
  if any(field in FIELDS[config.family] for field in fields):
    last = [f"model.layers.{config.num_layers + i}." for i in range(8)]
    last.append("mtp.")
    beyond = [name for name in tensors if name.startswith(tuple(last))]
    tensors = {k: x for k, x in tensors.items() if k not in beyond}
    if beyond:
      notes += (
        f"{len(beyond)} tensors that predict further tokens not loaded",
      )
  shared = tuple(
    f"model.layers.{i}.self_attn.{name}_"
    for i, kind in enumerate(config.layers)
    if kind.shares
    for name in "kv"
  )
  unused = [name for name in tensors if name.startswith(shared)]
  tensors = {k: x for k, x in tensors.items() if k not in unused}
  if unused:
    notes += (f"{len(unused)} tensors of layers that share keys not loaded",)
  apart = FAMILIES[config.family].experts_apart
  each = config.num_experts if apart else 1
  least = sum(each if "moe" in sort else 1 for sort in config.sorts)
  if len(tensors) < least:
    experts = f" of {config.num_experts} experts" if config.num_experts else ""
    raise ValueError(
      f"{folder}: {len(tensors)} tensors; expected {least} or more for "
      f"num_hidden_layers={config.num_layers}{experts}. Check config.json "
      "against the weights."
    )
  return _as_named(tensors, config), notes


def _as_named(
  tensors: Mapping[str, Any], config: ModelConfig
) -> dict[str, Any]:
  """By the names of the family's table; those that share one, as one."""

  def joined(first: Any, *rest: Tensor) -> Tensor | Decoded:
    if not rest or any(x.shape[1:] != first.shape[1:] for x in rest):
      return first
    parts = (first, *rest)
    shape = (sum(x.shape[0] for x in parts), *first.shape[1:])
    whole = lambda *xs: np.concatenate(xs)
    return Decoded(first.path, first.name, shape, whole, parts, first.dtype)

  found = parameter_map.by_table_name(tensors, config.family)
  named = {name: joined(*parts) for name, parts in found.items()}
  return parameter_map.official_names(named, config)


def _check_tensors(
  folder: Path,
  tensors: Mapping[str, Tensor | Decoded],
  base: Tree,
  config: ModelConfig,
) -> None:
  """Refuses a checkpoint that is not exactly this model's."""

  def refuse(got: str, expected: str) -> ValueError:
    return ValueError(
      f"{folder}: {got}; expected {expected}. Check config.json against the "
      "weights."
    )

  expected = {
    place.name: place.shape
    for path, leaf in trees.flatten(base).items()
    for place in parameter_map.tensor_slices(path, leaf.shape, config)
  }
  extras = set(tensors.keys() - expected.keys())
  head, name = (parameter_map.table_name(x, config) for x in ("head", "embed"))
  if config.tie_embeddings and head in extras:
    if name not in tensors or not _equal(tensors[head], tensors[name]):
      raise ValueError(
        f"{folder}: {head} differs from {name} though config.json ties them; "
        "expected equal tensors. Set tie_word_embeddings to false."
      )
    extras.discard(head)
  missing = expected.keys() - tensors.keys()
  for what, odd in (("missing", missing), ("unknown", extras)):
    if odd:
      raise refuse(
        f"{len(odd)} tensors are {what}: {sorted(odd)[:3]}",
        f"those of a {config.family} with {config.num_layers} layers",
      )
  for name, shape in expected.items():
    found = tensors[name]
    if found.shape != shape:
      raise refuse(f"{name} has shape {found.shape}", f"{shape}")
    if found.dtype not in _FLOATS:
      raise refuse(
        f"{name} is {found.dtype}",
        "float32, bfloat16 or float16, or a quantization_config",
      )


def _equal(one: Tensor | Decoded, other: Tensor | Decoded) -> bool:
  """Whether two tensors hold the same numbers; processes share the rows."""
  if one.shape != other.shape:
    return False
  step = max(1, _CHUNK // (one.num_bytes // one.shape[0] or 1))
  rows = distributed.own_rows(one.shape[0])
  return all(
    np.array_equal(one.read(i, stop), other.read(i, stop))
    for i in range(rows.start, rows.stop, step)
    for stop in [min(i + step, rows.stop)]
  )


def _leaves(
  tensors: Mapping[str, Tensor | Decoded],
  base: Tree,
  config: ModelConfig,
  shardings: Mapping[str, Any],
) -> Iterator[loading.Leaf]:
  """Where each parameter comes from and where it goes."""
  for path, leaf in trees.flatten(base).items():
    sources = {
      x.index: loading.Source(tensors[x.name], x.cut, x.transpose)
      for x in parameter_map.tensor_slices(path, leaf.shape, config)
    }
    where = shardings.get(path)
    yield loading.Leaf(path, leaf.shape, leaf.dtype, where, sources)


# -- Writing ----------------------------------------------------------------


def _pending(model: Model, params: Tree, dtype: np.dtype) -> Iterator[Pending]:
  """The tensors of a parameter tree; nothing is copied before its turn."""
  flat = trees.flatten(params)
  parts: dict[str, list[tuple[str, parameter_map.TensorSlice]]] = {}
  for path, leaf in flat.items():
    for place in parameter_map.tensor_slices(path, leaf.shape, model.config):
      parts.setdefault(place.name, []).append((path, place))

  def dtype_of(name: str) -> np.dtype:
    alone = name.endswith(parameter_map.FLOAT32)
    return np.dtype(np.float32) if alone else dtype

  def make(name: str) -> np.ndarray:
    tensor = np.empty(parts[name][0][1].shape, dtype_of(name))
    for path, place in parts[name]:
      part = _to_host(flat[path][place.index])
      own = tensor[(*place.cut, ...)]  # A view, of a scalar too.
      loading.copy_into(own, part, transpose=place.transpose)
    return tensor

  for name, ((_, place), *_) in parts.items():
    yield Pending(name, dtype_of(name), place.shape, partial(make, name))


def _as_stored(
  tensors: Iterator[Pending], config: ModelConfig
) -> Iterator[Pending]:
  """The tensors as files of the family have them."""
  for x in tensors:
    names = parameter_map.names_in_folder(x.name, (*x.shape, 1)[0], config)
    if len(names) == 1:
      yield x._replace(name=next(iter(names)))
      continue
    start = 0
    for name, rows in names.items():
      make = lambda x=x, at=slice(start, start + rows): np.asarray(x.make())[at]
      yield Pending(name, x.dtype, (rows, *x.shape[1:]), make)
      start += rows


def _to_host(x: jax.Array) -> np.ndarray:
  """All of an array, gathered first where other processes hold parts of it."""
  if not x.is_fully_addressable:
    assert isinstance(x.sharding, NamedSharding)
    everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
    x = jax.jit(lambda x: x, out_shardings=everywhere)(x).addressable_data(0)
  return np.asarray(x)
