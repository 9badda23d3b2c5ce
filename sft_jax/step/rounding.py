"""Rounding float32 to bfloat16, to nearest or by chance.

A bfloat16 has 8 significant bits, so a step below 1/512 of a weight, which is
most steps of fine-tuning, is rounded away by the nearest value: the weight
never moves. Rounded by chance, up as often as it is near the upper neighbour,

    1 + 0.001:  1.0078125 in 12.8 % of the draws, 1 in the others

it is right on average, and so is the sum of many steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32

Tree = Any


ROUNDINGS = ("nearest", "stochastic")


def seed_of(name: str, seed: int) -> int | None:
  """The seed of roundings by chance; None where they are to nearest.

  Raises:
    ValueError: an unknown name.
  """
  if name not in ROUNDINGS:
    raise ValueError(
      f"optim.rounding: got {name!r}, expected one of {ROUNDINGS}. Set it to "
      "one of these."
    )
  # Apart from the run's own seed, of which dropout draws.
  return seed + 1 if name == "stochastic" else None


def stochastic(
  key: jax.Array, x: Float32[Array, "..."]
) -> BFloat16[Array, "..."]:
  """One of the two bfloat16 around x, with E[result] = x.

  The lower 16 bits of x say how far it is past the lower neighbour: a random
  number of 16 bits is added, which carries over in that share of the draws,
  and they are cut off. What is not finite stays as it is.
  """
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  cut = (bits + noise) & jnp.uint32(0xFFFF0000)
  cut = jax.lax.bitcast_convert_type(cut, jnp.float32)
  # The cut value is a bfloat16 already: nothing is rounded here.
  return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def round_tree(
  tree: Tree, like: Tree, seed: int | None, step: jax.Array | int, what: int
) -> Tree:
  """Float32 leaves in the dtypes of `like`; by chance where there is a seed.

  Draws are a function of (seed, step, what, place in the tree): the same on
  any mesh and after a resume, with nothing to store. Leaves that stay float32
  are not touched.

  Args:
    tree: what to round.
    like: a tree of the same structure.
    seed: None rounds to nearest.
    step: number of the step.
    what: tells apart trees that are rounded at the same step.
  """
  key: Any = None
  if seed is not None:
    key = jax.random.fold_in(
      jax.random.fold_in(jax.random.key(seed), step), what
    )
  leaves, structure = jax.tree.flatten(tree)
  rounded = []
  for i, (x, y) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True)):
    if key is not None and y.dtype == jnp.bfloat16:
      rounded.append(stochastic(jax.random.fold_in(key, i), x))
    else:
      rounded.append(x.astype(y.dtype))
  return jax.tree.unflatten(structure, rounded)
