"""The device mesh, and where parameters, optimiser state and batches lie."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sft_jax import trees

AXES = ("data", "fsdp", "tensor")

# Both data-parallel axes divide the rows of a batch; `fsdp` also divides the
# parameters.
ROWS = PartitionSpec(("data", "fsdp"))

# (pattern, spec) over parameter paths; layers are stacked on a leading axis.
# Kernels are [L, in, out]: `tensor` divides what one device can multiply
# alone (heads, ffn width), `fsdp` the other side.
RULES: Sequence[tuple[str, PartitionSpec]] = (
  (r"(embed|head)/embedding$", PartitionSpec("tensor", "fsdp")),
  (r"(q|k|v|gate|up)/kernel$", PartitionSpec(None, "fsdp", "tensor")),
  (r"(o|down)/kernel$", PartitionSpec(None, "tensor", "fsdp")),
  (r"(q|k|v|gate|up)/lora_a$", PartitionSpec(None, "fsdp", None)),
  (r"(q|k|v|gate|up)/lora_b$", PartitionSpec(None, None, "tensor")),
  (r"(o|down)/lora_a$", PartitionSpec(None, "tensor", None)),
  (r"(o|down)/lora_b$", PartitionSpec(None, None, "fsdp")),
  (r"(bias|scale)$", PartitionSpec()),
)


class Placement(NamedTuple):
  """One line of the sharding table.

  Attributes:
    path: the parameter.
    shape: its global shape.
    spec: where its axes lie.
    note: axes kept whole because the mesh does not divide them, or ''.
  """

  path: str
  shape: tuple[int, ...]
  spec: PartitionSpec
  note: str


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
  """A mesh over all devices; one of the sizes may be -1: the rest.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  sizes = [data, fsdp, tensor]
  num_devices = jax.device_count()
  got = ", ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
  if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
    raise ValueError(
      f"mesh: got {got}, expected positive sizes, at most one of them -1"
    )
  if -1 in sizes:
    known = int(np.prod([s for s in sizes if s != -1]))
    sizes[sizes.index(-1)] = num_devices // known
  if int(np.prod(sizes)) != num_devices:
    raise ValueError(
      f"mesh: got {got} for {num_devices} devices, expected sizes that "
      f"multiply to {num_devices}. Set one of mesh.data, mesh.fsdp, "
      "mesh.tensor to -1."
    )
  # Auto: XLA propagates shardings from parameters and batch inwards.
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def place(path: str, shape: Sequence[int], mesh: Mesh) -> Placement:
  """The placement of one parameter: the first rule, where sizes divide.

  Raises:
    ValueError: no rule matches the path.
  """
  spec = trees.first_match(RULES, path, "sharding")
  axes, whole = list(spec), []
  for i, axis in enumerate(axes):
    if axis is not None and shape[i] % mesh.shape[axis]:
      whole.append(f"{shape[i]} is not a multiple of {axis}")
      axes[i] = None
  return Placement(path, tuple(shape), PartitionSpec(*axes), "; ".join(whole))


def table(params: trees.Tree, mesh: Mesh) -> list[Placement]:
  """Placements of all parameters, in order of paths."""
  return [place(p, x.shape, mesh) for p, x in trees.flatten(params).items()]


def param_shardings(params: trees.Tree, mesh: Mesh) -> trees.Tree:
  """The tree of shardings of a parameter tree (arrays or shapes)."""
  return trees.map_paths(
    lambda path, x: NamedSharding(mesh, place(path, x.shape, mesh).spec),
    params,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh, *, leading_axes: int = 0) -> NamedSharding:
  """Rows divided over the data-parallel axes, after `leading_axes` others."""
  return NamedSharding(mesh, PartitionSpec(*[None] * leading_axes, *ROWS))


def put_rows(tree: Any, sharding: NamedSharding) -> Any:
  """Global arrays from each process's own rows (NumPy leaves)."""
  put: Callable = lambda x: jax.make_array_from_process_local_data(sharding, x)
  return jax.tree.map(put, tree)
