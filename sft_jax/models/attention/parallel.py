"""How a mesh divides a batch's activations, where XLA must not choose.

    [B, T, D]   B over `data`, `fsdp`, `expert`, T over `context`, D whole
    heads       over `tensor`, and in attention over `context` in place of T

XLA carries these shardings through everywhere else, and is left what does not
divide (a sampled prompt, the one token of `init`): the results are the same.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from sft_jax.common.sharding import ROWS, SLOTS, size
from sft_jax.common.trees import Tree
from sft_jax.models.attention import ring


def divides(mesh: Mesh | None, B: int, T: int) -> bool:
  """Whether there is more than one device, each with as much of a batch."""
  if mesh is None or mesh.size == 1:
    return False
  return not (B % size(mesh) or T % mesh.shape["context"])


def is_ring(mesh: Mesh | None, num_heads: int) -> bool:
  """Whether the devices of a row are too many to divide its heads."""
  if mesh is None or mesh.shape["context"] == 1:
    return False
  return num_heads % size(mesh, ("tensor", "context")) != 0


def check_model(mesh: Mesh | None, num_heads: int, num_experts: int) -> None:
  for axis, number, what, cure in (
    ("expert", num_experts, "experts", "mesh.fsdp"),
    ("tensor", num_heads, "heads", "mesh.fsdp or mesh.context"),
  ):
    if mesh is not None and max(1, number) % (got := mesh.shape[axis]):
      fits = [n for n in range(1, number + 1) if number % n == 0]
      raise ValueError(
        f"mesh.{axis}: got {got} for {number} {what}, expected one of "
        f"{fits or [1]}. Divide by {cure} instead."
      )


def constrain(x: Array, mesh: Mesh | None, spec: PartitionSpec) -> Array:
  """`x`, an array [B, T, ...], laid out so where its sizes divide."""
  if mesh is None or not divides(mesh, *x.shape[:2]):
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def whole_rows(x: Array, mesh: Mesh | None) -> Array:
  """`x`, [B, T, C, ...], with all slots of a row on each of its devices. What a
  layer carries along a row so stays on one device. Channels or heads C are
  divided instead, where they divide."""
  if mesh is None:
    return x
  every = ("tensor", "context")
  fits = lambda axes: x.shape[2] % size(mesh, axes) == 0
  axes = next(filter(fits, (every, every[:1], ())))
  return constrain(x, mesh, PartitionSpec(ROWS, None, axes or None))


def gather_table(leaves: Tree, mesh: Mesh | None) -> Tree:
  """The leaves [V, ...] of an embedding, their other axes made whole.

  A lookup in a table cut over `fsdp`, which cuts the batch too, would have XLA
  gather the results on every device ("involuntary full rematerialization"). As
  the head, the table is then gathered once and not for each chunk of the loss.
  """
  if mesh is None or mesh.size == 1:
    return leaves

  def gather(x: Array) -> Array:
    rows = "tensor" if x.shape[0] % mesh.shape["tensor"] == 0 else None
    whole = NamedSharding(mesh, PartitionSpec(rows))
    return jax.lax.with_sharding_constraint(x, whole)

  return jax.tree.map(gather, leaves)


def attention(
  attend: Callable[..., Array],
  mesh: Mesh | None,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  *,
  in_order: bool,
  **arguments: Any,
) -> Float[Array, "B T N H"]:
  """`attend(q, k, v, ...)`, each device with its rows and its heads.

  Where `context` divides the slots, devices exchange: from all heads of their
  own slots to all slots of their own heads, and back (DeepSpeed-Ulysses, arXiv
  2309.14509). So every backend sees whole rows. Four slots and two heads on two
  devices:

      q [B, T, N, H]  device 0: slots 0 1, heads a b -> slots 0 1 2 3, head a
                      device 1: slots 2 3, heads a b -> slots 0 1 2 3, head b

  Key/value heads that the devices do not divide are repeated until they do.
  Where they do not divide the heads of queries, keys and values go round
  instead: see `ring`; then the mask is that of the backend 'blocks'.
  `arguments` are the others of `attend`, `models.attention.attention`; what is
  not in order, a cache, is left to XLA.
  """
  attend = partial(attend, in_order=in_order, mesh=mesh)
  if mesh is None or not in_order or not divides(mesh, *q.shape[:2]):
    return attend(q, k, v, **arguments)
  rings = is_ring(mesh, q.shape[2])
  share = size(mesh, "tensor" if rings else ("tensor", "context"))
  copies = math.lcm(k.shape[2], share) // k.shape[2]
  if copies > 1:
    k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
  arrays = {k: x for k, x in arguments.items() if isinstance(x, jax.Array)}
  choices = {k: v for k, v in arguments.items() if k not in arrays}
  specs = dict.fromkeys(arrays, PartitionSpec(ROWS))
  # A tensor's heads come first, and of these one's own part.
  specs["sinks"] = PartitionSpec(("tensor", "context"))
  if rings:
    specs |= {"sinks": PartitionSpec("tensor"), "mask": SLOTS}
  specs = {name: specs[name] for name in arrays}
  own_slots = PartitionSpec(ROWS, "context", "tensor")

  def local(q, k, v, arrays):
    if rings:
      scale = choices.get("scale") or q.shape[-1] ** -0.5
      return ring.attend(
        *(q, k, v, arrays["mask"], arrays.get("sinks")),
        **{"scale": scale, "softcap": choices.get("softcap")},
      )
    if mesh.shape["context"] == 1:
      return attend(q, k, v, **arrays, **choices)
    swap = partial(jax.lax.all_to_all, axis_name="context", tiled=True)
    q, k, v = (swap(x, split_axis=2, concat_axis=1) for x in (q, k, v))
    y = attend(q, k, v, **arrays, **choices)
    return swap(y, split_axis=1, concat_axis=2)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(own_slots, own_slots, own_slots, specs),
    out_specs=own_slots,
    check_vma=False,
  )(q, k, v, arrays)
