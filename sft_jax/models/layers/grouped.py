"""One product per group of rows: rows sorted by group, a matrix each."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int


@jax.custom_vjp
def permute(
  x: Float[Array, "M C"], order: Int[Array, " M"], inverse: Int[Array, " M"]
) -> Float[Array, "M C"]:
  """x[order]; its gradient is a gather too, where JAX would scatter. `inverse`
  is that of the permutation `order`, `jnp.argsort(order)`."""
  del inverse
  return x[order]


permute.defvjp(
  lambda x, order, inverse: (x[order], (order, inverse)),
  lambda orders, gradient: (gradient[orders[1]], None, None),
)


@jax.custom_vjp
def grouped_matmul(
  x: Float[Array, "M I"], kernel: Float[Array, "E I O"], sizes: Int[Array, " E"]
) -> Float[Array, "M O"]:
  """Multiplies the first sizes[0] rows by kernel[0], the next by kernel[1], ...

  Walks over blocks of rows of one group each; `jax.lax.ragged_dot` takes 30
  times the time and 50 times the memory on a CPU at E = 64 (docs/log.md). Rows
  past the sum of `sizes` come out as anything.
  """
  return _rows_times_group(x, kernel, sizes, transpose=False)


def _forward(x, kernel, sizes):
  return grouped_matmul(x, kernel, sizes), (x, kernel, sizes)


def _backward(residuals, gradient):
  x, kernel, sizes = residuals
  # Two loops, not one: the compiler drops the second for a frozen kernel.
  to_x = _rows_times_group(gradient, kernel, sizes, transpose=True)
  to_kernel = _group_products(x, gradient, sizes).astype(kernel.dtype)
  return to_x, to_kernel, None


grouped_matmul.defvjp(_forward, _backward)


class _Blocks(NamedTuple):
  """Where the walk goes: `count` blocks of `size` rows, each in one group. The
  last block of a group reads into the next one; `stop` is its true end."""

  group: jax.Array
  start: jax.Array
  stop: jax.Array
  count: jax.Array
  size: int


def _blocks(rows: int, sizes: jax.Array) -> _Blocks:
  E = len(sizes)
  # A quarter of the mean group wastes little at the groups' ends; the CPU is
  # as fast at 64 rows as at 512.
  size = 8
  while size < min(256, rows // (4 * E)):
    size *= 2
  per_group = -(-sizes // size)
  last = jnp.cumsum(per_group)
  index = jnp.arange(rows // size + E)
  group = jnp.searchsorted(last, index, side="right").clip(max=E - 1)
  stop = jnp.cumsum(sizes)[group]
  nth = index - (last - per_group)[group]
  return _Blocks(group, stop - sizes[group] + nth * size, stop, last[-1], size)


def _rows_times_group(
  x: jax.Array, kernel: jax.Array, sizes: jax.Array, *, transpose: bool
) -> jax.Array:
  """Each row times its group's kernel, or times its transpose."""
  M, blocks = len(x), _blocks(len(x), sizes)
  features = kernel.shape[1 if transpose else 2]
  # The last block may read and write past the end.
  x = jnp.pad(x, ((0, blocks.size), (0, 0)))

  def step(i, out):
    start = blocks.start[i]
    rows = jax.lax.dynamic_slice_in_dim(x, start, blocks.size)
    matrix = kernel[blocks.group[i]]
    y = rows @ (matrix.T if transpose else matrix)
    # What is written past the group's end the next group's block overwrites.
    return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)

  out = jnp.zeros((len(x), features), x.dtype)
  return jax.lax.fori_loop(0, blocks.count, step, out)[:M]


def _group_products(
  x: jax.Array, y: jax.Array, sizes: jax.Array
) -> Float32[Array, "E I O"]:
  """The sum over each group's rows of x' y."""
  blocks = _blocks(len(x), sizes)
  x, y = (jnp.pad(a, ((0, blocks.size), (0, 0))) for a in (x, y))

  def step(i, out):
    start = blocks.start[i]
    inside = start + jnp.arange(blocks.size) < blocks.stop[i]
    rows = jax.lax.dynamic_slice_in_dim(x, start, blocks.size)
    others = jax.lax.dynamic_slice_in_dim(y, start, blocks.size)
    others = jnp.where(inside[:, None], others, 0)
    product = jnp.matmul(rows.T, others, preferred_element_type=jnp.float32)
    return out.at[blocks.group[i]].add(product)

  shape = (len(sizes), x.shape[1], y.shape[1])
  out = jnp.zeros(shape, jnp.float32)
  return jax.lax.fori_loop(0, blocks.count, step, out)
