"""Where parameters are in a Hugging Face folder, by the table of families.

Kernels are [in, out] here; there they are [out, in], or [in, out] in the files
of GPT-2. Some of ours are side by side in one tensor of theirs:

    layers/attn/k/kernel [L, D, K * H], at index 3
      <-> model.layers.3.self_attn.qkv_proj.weight [(N + 2 K) * H, D],
          rows N * H to (N + K) * H, transposed
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from sft_jax.models.config import ModelConfig, layers_of
from sft_jax.models.families import FAMILIES

_T = TypeVar("_T")

# Tensors that are float32 in every file, as those of a router's correction.
FLOAT32 = ".e_score_correction_bias"

_LEAF = {
  "kernel": "weight",
  "scale": "weight",
  "embedding": "weight",
  "taps": "weight",
  "correction": "e_score_correction_bias",
}
_EXPERTS = ("layers/moe/gate", "layers/moe/up", "layers/moe/down")


class TensorSlice(NamedTuple):
  """Where one matrix or vector of a parameter is.

  ours[index] = theirs[name][cut], transposed if `transpose`
  """

  index: tuple[int, ...]  # In our stacked parameter; () for the whole.
  name: str  # Of the tensor that holds it.
  shape: tuple[int, ...]  # Of that tensor.
  # What of the tensor it is, one slice per axis; an expert's number where the
  # tensor holds those of a layer.
  cut: tuple[slice | int, ...]
  transpose: bool  # Theirs is [out, in].


def modules(
  module: str, config: ModelConfig, stack: tuple[int, ...]
) -> dict[tuple[int, ...], str]:
  """Their names of one of our modules, by layer (and expert, ...).

  >>> modules('layers/attn/q', llama, (2,))
  {(0,): 'model.layers.0.self_attn.q_proj', (1,): ...}
  """
  theirs = FAMILIES[config.family].names[module]
  stack = stack[: theirs.count("{}")]
  sort = module.split("/")[1] if "/" in module else ""
  # Of a mixed model the i-th of the stack is the i-th layer of its sort.
  layers = layers_of(config).get(sort, np.arange(stack[0] if stack else 0))
  return {
    i: theirs.format(*(layers[n] if at == 0 else n for at, n in enumerate(i)))
    for i in np.ndindex(stack)
  }


def table_name(table: str, config: ModelConfig) -> str:
  """The tensor of a table: 'embed' -> 'model.embed_tokens.weight'."""
  return f"{FAMILIES[config.family].names[table]}.weight"


def fused_modules(config: ModelConfig) -> list[tuple[str, list[str]]]:
  """[(module of theirs, those of ours that are in it, in the table's order)].
  Of experts and an MLP those that some layer has. What is in different layers,
  as they and kinds of attention are, may share a name and no tensor."""
  found: dict[tuple[str, str], list[str]] = {}
  absent = {"mlp", "moe"} - {name for sort in config.sorts for name in sort}
  for ours, theirs in FAMILIES[config.family].names.items():
    sort = ours.split("/")[1] if "/" in ours else ours
    if sort not in absent:
      found.setdefault((theirs, sort), []).append(ours)
  return [(theirs, ours) for (theirs, _), ours in found.items()]


def tensor_slices(
  path: str, shape: tuple[int, ...], config: ModelConfig
) -> list[TensorSlice]:
  """Where a parameter is, matrix by matrix."""
  family = FAMILIES[config.family]
  module, leaf = path.rsplit("/", 1)
  elsewhere = path in family.names
  found = modules(path if elsewhere else module, config, shape)
  shape = shape[len(next(iter(found))) :]
  if not shape:
    return [
      TensorSlice(i, f"{name}.{leaf}", (), (), False)
      for i, name in found.items()
    ]
  # Ours that share a tensor are along its output axis, in the table's order.
  groups = (ours for _, ours in fused_modules(config) if module in ours)
  fused = [module] if elsewhere else next(groups)
  if family.experts_in_turns and module in _EXPERTS:
    # Experts [E, in, out] or biases [E, out] of a layer: in turns.
    *rest, width = shape
    turns = slice(fused.index(module), None, len(fused))
    cut, whole = (*map(slice, rest), turns), (*rest, width * len(fused))
    ending = {"kernel": "", "bias": "_bias"}[leaf]
    return [
      TensorSlice(index, name + ending, whole, cut, False)
      for index, name in found.items()
    ]
  # Those of a layer may be one tensor [E, out, in].
  stack: tuple[int, ...] = ()
  if module in _EXPERTS and not family.experts_apart:
    stack, shape = shape[:1], shape[1:]
    elsewhere = family.experts_bare
  start, total = 0, shape[-1]
  if len(fused) > 1:
    widths = [_width(m, config) for m in fused]
    start, total = sum(widths[: fused.index(module)]), sum(widths)
  cut = (*map(slice, shape[:-1]), slice(start, start + shape[-1]))
  whole = (*shape[:-1], total)
  transpose = leaf in ("kernel", "taps") and not family.conv1d
  if transpose:
    cut, whole = cut[::-1], whole[::-1]
  ending = "" if elsewhere else f".{_LEAF.get(leaf, leaf)}"
  return [
    TensorSlice(
      (*index, *at), f"{name}{ending}", (*stack, *whole), (*at, *cut), transpose
    )
    for index, name in found.items()
    for at in np.ndindex(stack)
  ]


# Where multimodal checkpoints have their text model: since transformers 4.52,
# and before.
_TEXT = {
  "model.language_model.": "model.",
  "language_model.model.": "model.",
  "language_model.lm_head.": "lm_head.",
}
_PLAIN = ("lm_head.", "model.embed_tokens.", "model.layers.", "model.norm.")


def text_tensors(tensors: Mapping[str, _T]) -> dict[str, _T]:
  """Those of the text model, by the names that it has alone."""
  found = {name: x for name, x in tensors.items() if name.startswith(_PLAIN)}
  for name, x in tensors.items():
    for theirs, ours in _TEXT.items():
      if name.startswith(theirs):
        found[ours + name.removeprefix(theirs)] = x
  return found


def official_names(
  tensors: Mapping[str, _T], config: ModelConfig
) -> dict[str, _T]:
  """The tensors of a checkpoint by the names that transformers writes.

  Folders of the network without its head, as GPT-2's own, lack the prefix.
  Buffers, which follow from the config, are left out.

      {'wte.weight': w, 'h.0.ln_1.bias': b, 'h.0.attn.bias': mask}
        -> {'transformer.wte.weight': w, 'transformer.h.0.ln_1.bias': b}
  """
  family = FAMILIES[config.family]
  prefix, embed = f"{family.names['embed']}.weight".split(".", 1)
  bare = embed in tensors and f"{prefix}.{embed}" not in tensors
  head = f"{family.names['head']}."
  return {
    f"{prefix}.{name}" if bare and not name.startswith(head) else name: tensor
    for name, tensor in tensors.items()
    if not name.endswith(family.buffers)
  }


def by_table_name(
  tensors: Mapping[str, _T], family: str
) -> dict[str, list[_T]]:
  """Tensors of files by the names of the family's table, in its order where
  several are one there."""
  left, found = dict(tensors), {}
  for theirs, ours in (*FAMILIES[family].stored, ("", "")):
    for name in [name for name in left if theirs in name]:
      found.setdefault(name.replace(theirs, ours), []).append(left.pop(name))
  return found


def names_in_folder(
  name: str, rows: int, config: ModelConfig
) -> dict[str, int]:
  """What files call a tensor [rows, ...]: {name: rows}, if several in order;
  those of the folder that the model came from, else as transformers writes it.
  """
  stored, c = FAMILIES[config.family].stored, config
  usual = [
    name.replace(ours, theirs) for theirs, ours in stored if ours in name
  ]
  held = [x for x in (*usual, name) if x in c.stored] or usual or [name]
  each = -(-rows // len(held))
  if len(held) == 1:
    return {held[0]: rows}
  cut = enumerate(held)
  return {x: c.stored.get(x, min(each, rows - i * each)) for i, x in cut}


def _width(module: str, config: ModelConfig) -> int:
  """Output features of a projection that shares its tensor."""
  c = config
  ff = c.d_ff_shared if "/shared/" in module else c.d_ff
  return {
    **{"q": c.num_heads * c.head_dim, "gate": ff, "up": ff},
    **dict.fromkeys("kv", c.num_kv_heads * c.head_dim),
  }[module.rsplit("/", 1)[1]]
