"""What a function does by the trace JAX makes of it: FLOPs, what is kept.

A trace holds every product, recomputed ones too, and says how often a loop
runs, on any machine and before any compiler. It does not say how devices
divide the work.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def matmul_flops(function: Callable[..., Any], *arguments: Any) -> int:
  """FLOPs of all matrix products that a call executes, loops multiplied out.

  Unlike `fit.model_flops_per_token`, recomputation (remat) and padding count.
  It is a lower bound: kernels (Pallas) skip what they please and count as 0,
  of the branches of a condition the cheapest counts, of a loop of unknown
  length one round.

  Args:
    function: traced, not run.
    arguments: arrays or `jax.ShapeDtypeStruct`s.
  """
  return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr: Any) -> int:
  return sum(_flops_of(equation) for equation in jaxpr.eqns)


def _flops_of(equation: Any) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    size = math.prod(equation.outvars[0].aval.shape)
    return 2 * size * math.prod(left[i] for i in contracted)
  if name.startswith("ragged_dot"):
    # Every row of the left side meets one of the groups of the right.
    rows, inner, outer = _ragged_sizes(equation)
    return 2 * rows * inner * outer
  if name == "pallas_call":
    return 0
  inner = [_flops(jaxpr) for jaxpr in _inner(params)]
  if name == "cond":
    return min(inner)
  times = params["length"] if name == "scan" else 1
  if name == "shard_map":
    # Traced for one device, by the axes that are divided by hand.
    mesh = params["mesh"]
    times = math.prod(mesh.shape[axis] for axis in params["newly_manual_axes"])
  return times * sum(inner)


def _ragged_sizes(equation: Any) -> tuple[int, int, int]:
  """(rows, contracted, others) of a product of [M, K] and [G, K, N], or of
  [M, K] and [M, N] in groups of rows, the gradient of the latter."""
  left, right = (v.aval.shape for v in equation.invars[:2])
  out = equation.outvars[0].aval.shape
  if len(out) == 2:
    return left[0], left[1], out[1]
  return left[0], left[1], right[1]


def _inner(params: Any) -> list[Any]:
  """The traces that an equation's parameters hold."""
  leaves = jax.tree.leaves(
    list(params.values()), is_leaf=lambda x: hasattr(x, "eqns")
  )
  closed = (getattr(leaf, "jaxpr", leaf) for leaf in leaves)
  return [jaxpr for jaxpr in closed if hasattr(jaxpr, "eqns")]


def kept_bytes(
  function: Callable[..., Any],
  params: Any,
  batch: Any,
  doubled: Any,
  *others: Any,
) -> int:
  """Bytes kept for the backward pass that grow with the batch: activations.

  Weights that the backward pass reads again do not grow, and are left out.

  Args:
    function: (params, batch, *others) -> scalar.
    params: what it is differentiated in; shapes will do, here and below.
    batch: shapes of a batch.
    doubled: the shapes of one twice as large.
    others: further arguments.
  """

  def kept(batch: Any) -> int:
    residuals = jax.eval_shape(
      lambda p, *rest: jax.vjp(lambda p: function(p, *rest), p)[1],
      params,
      batch,
      *others,
    )
    return sum(
      int(np.prod(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(residuals)
    )

  return kept(doubled) - kept(batch)
