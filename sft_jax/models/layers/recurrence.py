"""Linear recurrences over documents: a state that decays and is written to.

Per head, with a state S [H, P] that is 0 where a document starts,

    S <- exp(g_t) S                                   it decays
    S <- S + k_t (v_t - beta_t S' k_t)'               the delta rule, or
    S <- S + k_t v_t'                                 without `beta`
    y_t = S' q_t

where v_t of the delta rule is beta_t times the value. Gated delta nets (Yang et
al. 2024, arXiv:2412.06464) are the first, Mamba-2 (Dao and Gu 2024,
arXiv:2405.21060) the second.

`chunked` is for training: a scan over chunks of C tokens, inside of which all
are products. What the delta rule subtracts depends on what it wrote before in
the chunk: a triangular system, whose inverse is made of products as well.
`stepped`, token by token, is for decoding. Between documents decays are exactly
0.

Axes: K heads of q and k, G heads of v for each, H and P their widths.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32

from sft_jax.models.attention.parallel import whole_rows
from sft_jax.models.remat import ATTENTION

CHUNK = 64

State = Float32[Array, "B K G H P"]


def chunked(
  q: Float[Array, "B T K H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K G P"],
  g: Float32[Array, "B T K G"],
  beta: Float32[Array, "B T K G"] | None,
  starts: Bool[Array, "B T"],
  state: State | None = None,
  *,
  size: int = CHUNK,
) -> tuple[Float32[Array, "B T K G P"], State]:
  """The outputs of whole rows and the state after them, in float32.

  Args:
    g: logarithm of the decay, at most 0.
    beta: of the delta rule; None: nothing is subtracted.
    starts: the first token of each document.
    state: before the row; None: 0.
    size: C, tokens of a chunk; memory grows with T C.
  """
  (B, T, K, H), (G, P) = q.shape, v.shape[3:]
  if state is None:
    state = jnp.zeros((B, K, G, H, P), jnp.float32)
  size = min(size, T)
  pad = -T % size

  def cut(x):
    """[B, T, ...] -> [chunks, B, ..., C], or [chunks, B, K, (G,) C, H]."""
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(B, -1, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def chunk(state, x):
    q, k, v, g, beta, starts = x
    document = jnp.cumsum(starts, axis=1)
    own = document[:, :, None] == document[:, None, :]
    own = own & np.tri(size, dtype=bool)
    # Sums of g from the start of the token's document, or of the chunk.
    g, v = jnp.moveaxis(g, 1, -1), jnp.moveaxis(v, 1, 3)
    total = jnp.sum(jnp.where(own[:, None, None], g[..., None, :], 0), -1)
    between = _decay(
      own[:, None, None], total[..., :, None] - total[..., None, :]
    )
    inwards = _decay((document == 0)[:, None, None], total)
    last = (document == document[:, -1:])[:, None, None]
    outwards = _decay(last, total[..., -1:] - total)
    if beta is not None:
      beta = jnp.moveaxis(beta, 1, -1)
      system = jnp.einsum("bikh,bjkh->bkij", k, k)[:, :, None] * between
      system = jnp.tril(system * beta[..., None], -1)
      inverse = _inverse(system)
      seen = jnp.einsum("bkghp,bikh->bkgip", state, k)
      v = jnp.matmul(inverse, v - (beta * inwards)[..., None] * seen)
    scores = jnp.einsum("bikh,bjkh->bkij", q, k)[:, :, None] * between
    read = jnp.einsum("bkghp,bikh->bkgip", state, q)
    y = jnp.matmul(scores, v) + inwards[..., None] * read
    written = jnp.einsum("bjkh,bkgjp->bkghp", k, outwards[..., None] * v)
    state = inwards[..., -1:, None] * state + written
    return state, jnp.moveaxis(y, 3, 1)

  wide = (x.astype(jnp.float32) for x in (q, k, v, g))
  parts = jax.tree.map(cut, (*wide, beta, starts))
  state, y = jax.lax.scan(jax.checkpoint(chunk), state, parts)
  y = jnp.moveaxis(y, 0, 1).reshape(B, -1, K, G, P)
  return y[:, :T], state


def _decay(own: Bool[Array, "..."], total: Float32[Array, "..."]) -> Array:
  """exp(total) within a document, 0 between two."""
  return jnp.exp(jnp.where(own, total, -jnp.inf))


def _inverse(system: Float32[Array, "... C C"]) -> Float32[Array, "... C C"]:
  """(I + L)^-1 of a strictly lower triangular L.

  Of two neighboring blocks with inverses X, that of both is X - X L X:
  substitution by blocks, all of one size at once.
  """
  C = system.shape[-1]
  row, column = np.indices((C, C))
  inverse = jnp.broadcast_to(jnp.eye(C), system.shape)
  width = 1
  while width < C:
    pair = row // (2 * width) == column // (2 * width)
    block = pair & (row // width != column // width)
    part = jnp.where(block, system, 0)
    product = partial(jnp.matmul, precision="highest")
    inverse = inverse - product(product(inverse, part), inverse)
    width *= 2
  return inverse


def stepped(
  q, k, v, g, beta, starts, state: State
) -> tuple[Float32[Array, "B T K G P"], State]:
  """The same as `chunked`, token by token."""

  def step(state, x):
    q, k, v, g, beta, starts = x
    state = jnp.where(starts[:, None, None, None, None], 0, state)
    state = state * jnp.exp(g)[..., None, None]
    if beta is not None:
      seen = jnp.einsum("bkghp,bkh->bkgp", state, k)
      v = v - beta[..., None] * seen
    state = state + jnp.einsum("bkh,bkgp->bkghp", k, v)
    return state, jnp.einsum("bkghp,bkh->bkgp", state, q)

  wide = (x.astype(jnp.float32) for x in (q, k, v, g))
  parts = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (*wide, beta, starts))
  state, y = jax.lax.scan(step, state, parts)
  return jnp.moveaxis(y, 0, 1), state


def recur(q, k, v, g, beta, context, kv, slot, mesh):
  """`chunked` of whole rows, or more tokens of those whose state is in `kv`;
  returns y, and `kv` with the states after them."""
  if kv is None:
    parts = (q, k, v, g, beta)
    q, k, v, g, beta = jax.tree.map(lambda x: whole_rows(x, mesh), parts)
    whole = jax.checkpoint(lambda *x: chunked(*x)[0])
    y = whole(q, k, v, g, beta, context.starts)
    return checkpoint_name(y, ATTENTION[0]), None
  # What is written of padding is 0, and nothing decays at it.
  held = lambda x: jnp.where(context.valid[:, :, None, None], x, 0)
  v = jnp.where(context.valid[:, :, None, None, None], v, 0)
  g, beta = held(g), beta if beta is None else held(beta)
  form = stepped if q.shape[1] == 1 else chunked
  y, state = form(q, k, v, g, beta, context.starts, kv["state"][slot])
  return y, kv | {"state": kv["state"].at[slot].set(state)}


class GatedNorm(nn.Module):
  """RMSNorm(y) * silu(z), or RMSNorm(y * silu(z)) if the gate is `first`. The
  mean is over the last axis; the scale over the last ones, `shape`."""

  eps: float
  shape: tuple[int, ...]
  first: bool
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(
    self, y: Float[Array, "B T *heads P"], z: Float[Array, "B T *heads P"]
  ) -> Float[Array, "B T *heads P"]:
    size = (int(np.prod(self.shape)),)
    scale = self.param("scale", nn.initializers.ones, size, self.param_dtype)
    return jax.checkpoint(self._norm)(y, z, scale.reshape(self.shape))

  def _norm(self, y, z, scale):
    y, gate = y.astype(jnp.float32), nn.silu(z.astype(jnp.float32))
    y = y * gate if self.first else y
    mean = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(mean + self.eps) * scale.astype(jnp.float32)
    return (y if self.first else y * gate).astype(self.dtype)
