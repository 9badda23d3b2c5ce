"""The device mesh, and where parameters, optimizer state and batches are."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int64

from sft_jax.common import trees

ROWS = ("data", "fsdp", "expert")
# Of an array [B, T, ...], and of one whose second axis is whole.
SLOTS = PartitionSpec(ROWS, "context")
WHOLE_ROWS = PartitionSpec(ROWS)

# Of neighbors in a mesh the last axis makes the nearest: `tensor` and
# `context` talk in every layer.
AXES = ("data", "fsdp", "expert", "context", "tensor")

# (pattern, spec) over parameter paths; layers are stacked on a leading axis.
# Kernels are [L, in, out]: `tensor` divides what one device can multiply
# alone (heads, ffn width), `fsdp` the other side. Experts are [L, E, in, out]:
# `expert` divides E, and of all else what `fsdp` does. A quantized kernel's
# codes and scales lie as the kernel would: their axes mean the same.
RULES: Sequence[tuple[str, PartitionSpec]] = (
  (r"(embed|head)/embedding", PartitionSpec("tensor", "fsdp")),
  (r"positions/embedding", PartitionSpec(None, "fsdp")),
  (r"per_layer/project/kernel", PartitionSpec("fsdp", "tensor")),
  # Heads leave a latent vector and enter none: the vector itself is whole.
  (r"attn/(q|kv)_down/kernel", PartitionSpec(None, "fsdp")),
  (r"attn/(q|kv)_up/kernel", PartitionSpec(None, None, "tensor")),
  (r"moe/router/kernel$", PartitionSpec(None, "fsdp", None)),
  (r"moe/(gate|up)/kernel", PartitionSpec(None, "expert", "fsdp", "tensor")),
  (r"moe/down/kernel", PartitionSpec(None, "expert", "tensor", "fsdp")),
  (r"shared/share/kernel", PartitionSpec(None, "fsdp", None)),
  (
    r"(conv|delta|mamba)/(in|qkvz?|z|ba?|a)/kernel",
    PartitionSpec(None, "fsdp", "tensor"),
  ),
  (r"(q|k|v|gate|up)/kernel", PartitionSpec(None, "fsdp", "tensor")),
  (r"(o|down|out)/kernel", PartitionSpec(None, "tensor", "fsdp")),
  (r"lora_(m|rows)$", PartitionSpec()),
  (
    r"(bias|scale|sinks|correction|taps|A_log|D|layer_scalar)$|/act/",
    PartitionSpec(),
  ),
)


class Placement(NamedTuple):
  """One line of the sharding table; `note` names axes that are kept whole
  because the mesh does not divide them."""

  path: str
  shape: tuple[int, ...]
  spec: PartitionSpec
  note: str


def make_mesh(
  data: int,
  fsdp: int,
  tensor: int,
  context: int = 1,
  expert: int = 1,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """A mesh over all devices; one of the sizes may be -1: the rest.

  Copies of the model (`data`) take a part of the rows of a batch each, and so
  do the devices that share a copy (`fsdp`). Those of `tensor` share each matrix
  product, heads and widths of MLPs; those of `context` the slots of each row;
  those of `expert` a copy's experts, and are as `fsdp` in all else. Over
  several slices of TPUs `data` goes across.

  Raises ValueError: the sizes do not multiply to the number of devices, or
  slices do not divide `data`.
  """
  sizes = [data, fsdp, expert, context, tensor]
  devices = jax.devices() if devices is None else devices
  got = ", ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
  if -1 in sizes:
    sizes[sizes.index(-1)] = len(devices) // abs(math.prod(sizes))
  if math.prod(sizes) != len(devices) or min(sizes) < 1:
    raise ValueError(
      f"mesh: got {got} for {len(devices)} devices, expected sizes that "
      f"multiply to {len(devices)}, at most one of them -1. Set one of "
      "mesh.data, mesh.fsdp, mesh.expert, mesh.tensor, mesh.context to -1."
    )
  # Auto: XLA propagates shardings from parameters and batch inwards.
  auto = (AxisType.Auto,) * len(AXES)
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  # Axes of a slice's torus may be cut: 32 x 8 chips of 16 x 16.
  cut = {"allow_split_physical_axes": True}
  if slices == 1:
    grid = mesh_utils.create_device_mesh(tuple(sizes), devices, **cut)
    return Mesh(grid, AXES, axis_types=auto)
  if sizes[0] % slices:
    raise ValueError(
      f"mesh: got {got} for {slices} slices of {len(devices) // slices} "
      "devices, expected mesh.data to be a multiple of the slices: the network "
      "between slices is too slow for what the other axes send. Set "
      f"mesh.data to {slices}, or to -1 and the others to divide a slice."
    )
  grid = mesh_utils.create_hybrid_device_mesh(
    (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1, 1), devices, **cut
  )
  return Mesh(grid, AXES, axis_types=auto)


def size(mesh: Mesh, axes: str | Iterable[str] = ROWS) -> int:
  """Of these axes together; of those that divide the rows of a batch."""
  names = [axes] if isinstance(axes, str) else axes
  return math.prod(mesh.shape[axis] for axis in names)


def place_parameter(path: str, shape: Sequence[int], mesh: Mesh) -> Placement:
  """The placement of one parameter: the first rule, where sizes divide. Raises
  ValueError: no rule matches the path."""
  # LoRA's [.., in, R] and [.., R, out] are divided where their kernel is.
  kernel, factors = re.subn(r"lora_[ab]0?$", "kernel", path)
  spec = trees.first_match(RULES, kernel, "sharding")
  axes, whole = [*spec] + [None] * (len(shape) - len(spec)), []
  if factors:
    axes[-1 if "/lora_a" in path else -2] = None
  if mesh.shape["expert"] > 1 and "expert" not in axes:
    axes = [("fsdp", "expert") if axis == "fsdp" else axis for axis in axes]
  for i, axis in enumerate(axes):
    if axis is not None and shape[i] % size(mesh, axis):
      names = axis if isinstance(axis, str) else " x ".join(axis)
      whole.append(f"{shape[i]} is not a multiple of {names}")
      axes[i] = None
  return Placement(path, tuple(shape), PartitionSpec(*axes), "; ".join(whole))


def placements(params: trees.Tree, mesh: Mesh) -> list[Placement]:
  shapes = trees.flatten(params).items()
  return [place_parameter(path, x.shape, mesh) for path, x in shapes]


def param_shardings(params: trees.Tree, mesh: Mesh) -> trees.Tree:
  spec = lambda path, x: place_parameter(path, x.shape, mesh).spec
  return trees.map_paths(lambda p, x: NamedSharding(mesh, spec(p, x)), params)


def state_shardings(state: Any, params: trees.Tree, mesh: Mesh) -> Any:
  """Shardings of an optimizer's state, each array by its own shape.

  An array belongs to the parameter whose path ends its own and whose axes, or
  some of them in their order, are its axes: a moment [L, in, out], a factored
  one [L, in]. What belongs to none, such as a counter, is whole.
  """
  flat = trees.flatten(params)

  def of(keys: tuple[Any, ...], x: Any) -> NamedSharding:
    names = [str(key.key) for key in keys if hasattr(key, "key")]
    paths = ("/".join(names[i:]) for i in range(len(names)))
    for path in filter(flat.__contains__, paths):
      shape = flat[path].shape
      spec = [*place_parameter(path, shape, mesh).spec]
      spec += [None] * (len(shape) - len(spec))
      axes = iter([*zip(shape, spec, strict=True)])
      # The first axis of each size, after those that are taken.
      found = [next((a for a in axes if a[0] == n), None) for n in x.shape]
      if None not in found:
        return NamedSharding(mesh, PartitionSpec(*(a[1] for a in found if a)))
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(of, state)


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def row_sharding(mesh: Mesh, *, leading_axes: int = 0) -> NamedSharding:
  """Of arrays [B, T, ...], after `leading_axes` others. Rows are divided over
  `ROWS`, their slots over `context`."""
  return NamedSharding(mesh, PartitionSpec(*[None] * leading_axes, *SLOTS))


def check_rows(mesh: Mesh, num_rows: int, parts: int) -> None:
  """Raises ValueError unless the mesh divides each of the parts of a batch."""
  if num_rows % (parts * size(mesh)):
    axes = ", ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in ROWS)
    raise ValueError(
      f"batch_size: got {num_rows} for accum_steps={parts}, {axes}, expected "
      "a multiple of their product. Change batch_size or accum_steps."
    )


def own_rows(
  mesh: Mesh, num_rows: int, *, parts: int = 1
) -> Int64[np.ndarray, " rows"]:
  """Numbers of the rows of a global batch that this process must read.

  Each of `parts` micro-batches is divided over the mesh. Of 8 rows in 2 parts
  over 4 devices, the third and fourth of which are this process's, they are [2,
  3, 6, 7]. Processes whose devices hold the same rows read the same ones.

  Raises ValueError: the mesh does not divide the rows.
  """
  check_rows(mesh, num_rows, parts)
  part = num_rows // parts
  own = np.zeros(part, bool)
  sharding = NamedSharding(mesh, PartitionSpec(ROWS))
  for index in sharding.addressable_devices_indices_map((part,)).values():
    assert index is not None  # Only where a shape is not known.
    own[index] = True
  return np.flatnonzero(np.tile(own, parts))


def put_rows(tree: Any, sharding: NamedSharding) -> Any:
  """Global arrays from the rows that each process read, those of `own_rows` in
  that order: a tree of [B, T, ...] after the leading axes of the sharding."""
  mesh, axis = sharding.mesh, list(sharding.spec).index(ROWS)
  assert isinstance(mesh, Mesh)
  blocks = size(mesh)
  own_blocks = own_rows(mesh, blocks)

  def put(x: np.ndarray) -> jax.Array:
    length = x.shape[axis] // len(own_blocks)
    shape = (*x.shape[:axis], blocks * length, *x.shape[axis + 1 :])

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None
      # A device holds one block; of the own ones it is the n-th.
      n = np.searchsorted(own_blocks, (index[axis].start or 0) // length)
      local = slice(n * length, (n + 1) * length)
      return x[(*index[:axis], local, *index[axis + 1 :])]

    return jax.make_array_from_callback(shape, sharding, part)

  return jax.tree.map(put, tree)
