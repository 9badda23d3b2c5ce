"""Decoding on the device: rows that prompts enter and replies leave.

Four programs: `start` makes a batch of empty rows, `admit` reads a group of
prompts into some of them (a prefill), `advance` decodes all rows together,
`lengthen` gives them a longer cache. The model arrives as functions.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int32, Key

from sft_jax.common import sharding
from sft_jax.common.batch import AnyArray
from sft_jax.inference.sampling import Rule, choose

EMPTY = -1  # Position of a slot that holds nothing; see `decode`.
STEPS = 64  # Most tokens of a row between two looks of the host.


class How(NamedTuple):
  """What shapes the programs; hashable, and compared by identity."""

  decode: Callable
  logits: Callable
  init_cache: Callable
  int8_cache: bool
  rule: Rule
  mesh: Mesh | None

  def empty(self, batch: int, length: int) -> Any:
    # Only models know of int8.
    choice = {"int8": True} if self.int8_cache else {}
    return self.init_cache(batch, length, **choice)

  def row_axes(self) -> Any:
    """Of each array of a cache, the axis that has the batch's size."""

    def differs(two: Any, three: Any) -> int:
      sizes = zip(two.shape, three.shape, strict=True)
      return [a == b for a, b in sizes].index(False)

    sizes = (jax.eval_shape(lambda n=n: self.empty(n, 1)) for n in (2, 3))
    return jax.tree.map(differs, *sizes)

  @property
  def shards(self) -> int:
    return 1 if self.mesh is None else sharding.size(self.mesh)

  def place(self, x: Array, *spec: Any) -> Array:
    """The array, so divided over the mesh; without a `spec` on every device,
    for each process to read."""
    if self.mesh is None:
      return x
    at = NamedSharding(self.mesh, PartitionSpec(*spec))
    return jax.lax.with_sharding_constraint(x, at)

  def over_rows(self, tree: Any, axes: Any) -> Any:
    """The tree with each array's axis of rows divided over the mesh."""
    put = lambda x, axis: self.place(x, *[None] * axis, sharding.ROWS)
    return jax.tree.map(put, tree, axes)


class Rows(NamedTuple):
  token: Int32[Array, "B"]  # The newest; not in the cache yet.
  position: Int32[Array, "B"]  # Of `token`.
  left: Int32[Array, "B"]  # Tokens it may still emit.
  done: Bool[Array, "B"]  # So is a row that holds no prompt.
  stopped: Bool[Array, "B"]
  step: Int32[Array, "B"]  # Tokens emitted; with `key`, the randomness.
  key: Key[Array, "B"]
  cache: Any


# Functions and numbers that shape the program are static: JAX's own cache then
# keeps one program per model, rule and bucket.
@functools.partial(jax.jit, static_argnames=("model", "B", "S"))
def start(*, model: How, B: int, S: int) -> Rows:
  """Rows without prompts."""
  no, zero = jnp.zeros(B, bool), jnp.zeros(B, jnp.int32)
  keys = jax.random.split(jax.random.key(0), B)
  cache = model.over_rows(model.empty(B, S), model.row_axes())
  return Rows(zero, zero, zero, ~no, no, zero, keys, cache)


@functools.partial(
  jax.jit, static_argnames=("model", "S"), donate_argnames=("state",)
)
def admit(
  params: Any,
  state: Rows,
  tokens: Int32[AnyArray, "R T"],
  lengths: Int32[AnyArray, "R"],
  rows: Int32[AnyArray, "R"],
  seeds: Any,
  stop_ids: Int32[AnyArray, "stops"],
  max_new_tokens: Any,
  *,
  model: How,
  S: int,
) -> tuple[Rows, tuple[Int32[Array, "R"], Bool[Array, "R"]]]:
  """Reads R prompts, each at the left of its row, into rows of the batch.

  `rows` is where each goes, B for a filler; `seeds` (uint32 [R], number int32
  [R]) are the randomness. Returns the rows; each prompt's first token, EMPTY if
  it is a stop token; if so.
  """
  T = tokens.shape[1]
  slots = jnp.arange(T, dtype=jnp.int32)
  positions = jnp.where(slots < lengths[:, None], slots, EMPTY)
  fold = lambda seed, n: jax.random.fold_in(jax.random.key(seed), n)
  key = jax.vmap(fold)(*map(jnp.asarray, seeds))
  by_row = model.row_axes()
  tokens, positions = model.over_rows((jnp.asarray(tokens), positions), (0, 0))
  cache = model.over_rows(model.empty(tokens.shape[0], T), by_row)
  hidden, cache = model.decode(params, tokens, positions, cache)
  # All prompt tokens at once; only the last of each needs logits.
  last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
  keys = jax.vmap(jax.random.fold_in, (0, None))(key, 0)
  token = choose(keys, model.logits(params, last)[:, 0], model.rule)
  stopped = jnp.isin(token, stop_ids)
  left = jnp.full(token.shape, max_new_tokens - 1, jnp.int32)
  done, step = stopped | (left == 0), jnp.ones_like(token)
  at = jnp.asarray(lengths)
  new = Rows(token, at, left, done, stopped, step, key, cache=None)

  def place(old: Array, new: Array, axis: int) -> Array:
    at = (*[slice(None)] * axis, rows)
    return old.at[at].set(new, mode="drop")

  # In the corner of an empty cache, so that nothing is left of the replies
  # that were in these rows before.
  longer = _in_corner(model.empty(tokens.shape[0], S), cache)
  cache = jax.tree.map(place, state.cache, longer, by_row)
  first = functools.partial(place, axis=0)
  state = jax.tree.map(first, state._replace(cache=None), new)
  state = state._replace(cache=model.over_rows(cache, by_row))
  seen = (jnp.where(stopped, EMPTY, token), stopped)
  return state, jax.tree.map(model.place, seen)


def _in_corner(large: Any, small: Any) -> Any:
  """Trees of arrays: the small ones in the corner of the large ones."""

  def put(large: Array, small: Array) -> Array:
    return jax.lax.dynamic_update_slice(large, small, (0,) * small.ndim)

  return jax.tree.map(put, large, small)


@functools.partial(jax.jit, static_argnames=("model", "S"))
def lengthen(state: Rows, *, model: How, S: int) -> Rows:
  """The same rows with S slots each, no fewer than they have."""
  longer = _in_corner(model.empty(state.token.shape[0], S), state.cache)
  return state._replace(cache=model.over_rows(longer, model.row_axes()))


@functools.partial(
  jax.jit, static_argnames=("model",), donate_argnames=("state",)
)
def advance(
  params: Any,
  state: Rows,
  halt: Bool[AnyArray, "B"],
  enough: Any,
  steps: Any,
  stop_ids: Int32[AnyArray, "stops"],
  *,
  model: How,
) -> tuple[Rows, tuple[Array, Array, Array]]:
  """Decodes until `enough` rows are done, at most `steps` tokens each. `halt`:
  rows that the host has found done. Returns the rows; what they emitted [B,
  STEPS], EMPTY where nothing; who is done; who stopped."""
  state = state._replace(done=state.done | halt)

  def more(carry: tuple[Array, Rows, Array]) -> Array:
    i, state, _ = carry
    return (i < steps) & (jnp.sum(state.done) < enough)

  def step(carry: tuple[Array, Rows, Array]) -> tuple[Array, Rows, Array]:
    i, state, out = carry
    # A row that is done writes nothing, so that it cannot disturb its cache.
    position = jnp.where(state.done, EMPTY, state.position)[:, None]
    token = state.token[:, None]
    hidden, cache = model.decode(params, token, position, state.cache)
    keys = jax.vmap(jax.random.fold_in)(state.key, state.step)
    token = choose(keys, model.logits(params, hidden)[:, 0], model.rule)
    stop = jnp.isin(token, stop_ids) & ~state.done
    out = out.at[:, i].set(jnp.where(state.done | stop, EMPTY, token))
    left = state.left - 1
    done, stopped = state.done | stop | (left <= 0), state.stopped | stop
    at, steps = state.position + 1, state.step + 1
    new = Rows(token, at, left, done, stopped, steps, state.key, cache)
    return i + 1, new, out

  out = jnp.full((halt.shape[0], STEPS), EMPTY, jnp.int32)
  _, state, out = jax.lax.while_loop(more, step, (jnp.int32(0), state, out))
  cache = model.over_rows(state.cache, model.row_axes())
  seen = (out, state.done, state.stopped)
  return state._replace(cache=cache), jax.tree.map(model.place, seen)
