"""Attention over the slots of a row that several devices hold, by a ring.

Each device keeps its queries; keys and values go round (Liu, Zaharia and Abbeel
2023, arXiv:2310.01889), and what each stop gives is added by its log-sum-exp.
Of four devices, with the shards of keys that each sees and in what order:

    device 0   0 . . .        '.': later slots, which nobody computes
    device 1   1 0 . .
    device 2   2 1 0 .
    device 3   3 2 1 0

A query knows the first slot that it sees, and shards before that cost nothing.
Memory is O(T / devices); keys, values and their gradients are sent. A row of
one document waits for its last device, which does twice the mean.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

from sft_jax.models.attention import blockwise
from sft_jax.models.remat import ATTENTION


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  starts: Int[Array, "B T"],
  sinks: Float[Array, " N"] | None = None,
  *,
  scale: float,
  softcap: float | None = None,
  axis: str = "context",
) -> Float[Array, "B T N H"]:
  """`blockwise.attend` of whole rows; here T slots of one device of `axis`.
  `starts` count in the whole row. `axis` is one of a mesh, by hand, whose
  devices hold slots in order."""
  layout = blockwise.Layout.of(q, k, blockwise.BLOCK)
  if sinks is not None:
    sinks = sinks.astype(jnp.float32).reshape(k.shape[2], -1)
  rows = layout.rows
  arrays = (rows(q * scale), rows(k), rows(v), starts, sinks)
  return layout.back(_ring(*arrays, (layout, softcap, axis)))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ring(q, k, v, starts, sinks, static):
  return _forward(q, k, v, starts, sinks, static)[0]


def _runs(
  starts: Array, layout: blockwise.Layout, axis: str, stop: Array | int
):
  """What each query sees of the shard that is here at this stop."""
  T, n = layout.T, lax.axis_size(axis)
  me = lax.axis_index(axis)
  begin = (me - stop) % n * T
  own = me * T + jnp.arange(T, dtype=starts.dtype)
  last = jnp.minimum(jnp.broadcast_to(own, starts.shape) - begin, T - 1)
  # Nothing of a later shard: from its first slot to the one before.
  return layout.runs(jnp.maximum(starts - begin, 0), jnp.maximum(last, -1))


def _pass_on(tree, axis: str):
  n = lax.axis_size(axis)
  to = [(i, (i + 1) % n) for i in range(n)]
  return jax.tree.map(lambda x: lax.ppermute(x, axis, to), tree)


def _forward(q, k, v, starts, sinks, static):
  layout, softcap, axis = static

  def stop(i, keys, sinks=None) -> tuple[Array, Float32[Array, "M K X"]]:
    (k, v), runs = keys, _runs(starts, layout, axis, i)
    out, lse = blockwise.forward(q, k, v, runs, sinks, softcap)
    return out.astype(jnp.float32), lse

  def add(carry, i):
    keys, out, lse = carry
    keys = _pass_on(keys, axis)
    more, its = stop(i, keys)
    total = jnp.logaddexp(lse, its)
    before, now = (jnp.exp(x - total)[..., None] for x in (lse, its))
    out = before * out + now * more
    return (keys, out, total), None

  # At the first stop, their own shard, each query sees itself.
  start = ((k, v), *stop(0, (k, v), sinks))
  (_, out, lse), _ = lax.scan(add, start, jnp.arange(1, lax.axis_size(axis)))
  out = checkpoint_name(out.astype(v.dtype), ATTENTION[0])
  lse = checkpoint_name(lse, ATTENTION[1])
  return out, (q, k, v, starts, sinks, out, lse)


def _backward(static, kept, d_out):
  layout, softcap, axis = static
  q, k, v, starts, sinks, out, lse = kept
  common = jnp.sum(out.astype(jnp.float32) * d_out, axis=-1)

  def add(carry, i):
    """Keys go on with their gradients, which are home after the last stop."""
    (k, v, *into), dq = carry
    runs = _runs(starts, layout, axis, i)
    more, *into = blockwise.backward(
      *(q, k, v, runs, d_out, lse, common, tuple(into), softcap)
    )
    return (_pass_on((k, v, *into), axis), dq + more), None

  zeros = jnp.zeros(k.shape), jnp.zeros(v.shape)
  start = (k, v, *zeros), jnp.zeros(q.shape)
  stops = jnp.arange(lax.axis_size(axis))
  ((_, _, dk, dv), dq), _ = lax.scan(add, start, stops)
  d_sinks = None
  if sinks is not None:
    d_sinks = blockwise.to_sinks(sinks, lse, common)
  grads = dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
  return *grads, None, d_sinks


_ring.defvjp(_forward, _backward)
