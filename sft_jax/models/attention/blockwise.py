"""Attention in blocks of queries and keys: O(T) memory and no needless work.

The keys that a query sees are a run of slots that ends at its own, [start,
own]. Queries of one block need the blocks of keys from their earliest start up
to their own. In blocks of 4 slots, with documents a, b, c and padding (which
sees itself):

    slots     a a a a   a b b b   b b c c   c c . .
    starts    0 0 0 0   0 5 5 5   5 5 a a   a a e f      (a, e, f: 10, 14, 15)
    reads     block 0   0 and 1   1 and 2   2 and 3

How many is read from the data while the program runs. Softmax is gathered block
by block (Milakov and Gimelshein 2018, Rabe and Staats 2021); the backward pass
computes the scores again from the log-sum-exp, as FlashAttention does (Dao et
al. 2022). A batch is laid out as one row of blocks, as no document reaches back
over the start of its row.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

# The best of 64, 128 and 256 on CPU, at documents of 160 tokens and heads of
# 48: forward and backward of 4,096 tokens take 195, 152 and 248 ms.
BLOCK = 128

_HIDDEN = -1e30


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  starts: Int[Array, "B T"],
  sinks: Float[Array, " N"] | None = None,
  *,
  scale: float,
  softcap: float | None = None,
  block: int,
) -> Float[Array, "B T N H"]:
  """softmax(q k' scale) v over the keys in slots [starts[b, t], t].

  As `attention.attention`; `block`: slots in one, at most. Kept for the
  backward pass: q, k, v, the output ('attention_out') and its log-sum-exp
  ('attention_lse').
  """
  layout = Layout.of(q, k, block)
  T, rows = q.shape[1], layout.rows
  own = jnp.broadcast_to(jnp.arange(T, dtype=starts.dtype), starts.shape)
  if sinks is not None:
    sinks = sinks.astype(jnp.float32).reshape(k.shape[2], -1)
  seen = layout.runs(starts, own)
  out: Array = _blocks(rows(q * scale), rows(k), rows(v), seen, sinks, softcap)
  return layout.back(out)


class Layout(NamedTuple):
  """How a batch lies in one row of M blocks of `size` slots. Inside, X = G *
  size: the queries of a block, of all heads that share keys."""

  B: int
  T: int
  N: int
  H: int
  K: int
  size: int

  @classmethod
  def of(cls, q: Array, k: Array, block: int) -> "Layout":
    B, T, N, H = q.shape
    return cls(B, T, N, H, k.shape[2], -(-T // -(-T // block)))

  @property
  def pad(self) -> int:
    return -self.T % self.size

  def rows(self, x: Array) -> Array:
    """[B, T, heads, H] -> [M, K, heads / K * size, H]."""
    x = jnp.pad(x, ((0, 0), (0, self.pad), (0, 0), (0, 0)))
    x = x.reshape(-1, self.size, self.K, x.shape[2] // self.K, self.H)
    x = x.transpose(0, 2, 3, 1, 4)
    return x.reshape(len(x), self.K, -1, self.H)

  def back(self, x: Array) -> Array:
    """[M, K, X, H] -> [B, T, N, H]."""
    x = x.reshape(len(x), self.K, -1, self.size, self.H)
    x = x.transpose(0, 3, 1, 2, 4)
    return x.reshape(self.B, -1, self.N, self.H)[:, : self.T]

  def runs(
    self, first: Int[Array, "B T"], last: Int[Array, "B T"]
  ) -> Int[Array, "M 2 size"]:
    """The first and the last slot that each query sees, in that one row; the
    slots that fill up the last block see none."""
    far = jnp.iinfo(first.dtype).max // 2
    pairs = (
      jnp.pad(x, ((0, 0), (0, self.pad)), constant_values=value)
      for x, value in ((first, far), (last, -1))
    )
    row = jnp.arange(self.B, dtype=first.dtype)[:, None] * (self.T + self.pad)
    return jnp.stack([(x + row).reshape(-1, self.size) for x in pairs], axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocks(q, k, v, runs, sinks, softcap):
  return _forward(q, k, v, runs, sinks, softcap)[0]


def _forward(
  q: Float[Array, "M K X H"],
  k: Float[Array, "M K size H"],
  v: Float[Array, "M K size H"],
  runs: Int[Array, "M 2 size"],
  sinks: Float32[Array, "K G"] | None,
  softcap: float | None,
):
  out, lse = forward(q, k, v, runs, sinks, softcap)
  out = checkpoint_name(out, "attention_out")
  lse = checkpoint_name(lse, "attention_lse")
  return out, (q, k, v, runs, sinks, out, lse)


def forward(q, k, v, runs, sinks, softcap) -> tuple[Array, Array]:
  """(output in the dtype of v, log-sum-exp [M, K, X]); without a key to see
  that is about -1e30, and the output is anything finite."""
  _, K, X, H = q.shape

  def of_queries(_, mine):
    q, runs = mine
    last, reach = _reach(runs)

    def add_keys(i, carry):
      """The last block first, where as a rule each query sees a key: from then
      on `top` is of a key that is seen, and hidden ones weigh exactly 0."""
      top, total, sums = carry
      scores = _scores(q, k[last - i], softcap)
      scores = jnp.where(_seen(runs, last - i, X), scores, _HIDDEN)
      new = jnp.maximum(top, jnp.max(scores, axis=-1))
      weights = jnp.exp(scores - new[..., None])
      shrink = jnp.exp(top - new)
      total = total * shrink + jnp.sum(weights, axis=-1)
      values = _dot("kxs,ksh->kxh", weights.astype(v.dtype), v[last - i])
      return new, total, sums * shrink[..., None] + values

    if sinks is None:
      top, total = jnp.full((K, X), _HIDDEN), jnp.zeros((K, X))
    else:
      # A key without a value, whose score is known.
      top = jnp.repeat(sinks, X // sinks.shape[1], axis=1)
      total = jnp.ones((K, X))
    carry = (top, total, jnp.zeros((K, X, H)))
    top, total, sums = lax.fori_loop(0, reach, add_keys, carry)
    total = jnp.maximum(total, 1e-30)  # 0 where there is no block to read.
    out = (sums / total[..., None]).astype(v.dtype)
    return None, (out, top + jnp.log(total))

  return lax.scan(of_queries, None, (q, runs))[1]


def _backward(softcap: float | None, kept, d_out: Float[Array, "M K X H"]):
  q, k, v, runs, sinks, out, lse = kept
  # sum over s of weight_s d_weight_s, which softmax takes from each d_weight.
  common = jnp.sum(out.astype(jnp.float32) * d_out, axis=-1)
  into = (jnp.zeros(k.shape), jnp.zeros(v.shape))
  dq, dk, dv = backward(q, k, v, runs, d_out, lse, common, into, softcap)
  d_sinks = None if sinks is None else to_sinks(sinks, lse, common)
  return (
    *(dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)),
    *(None, d_sinks),
  )


_blocks.defvjp(_forward, _backward)


def to_sinks(
  sinks: Float32[Array, "K G"],
  lse: Float32[Array, "M K X"],
  common: Float32[Array, "M K X"],
) -> Float32[Array, "K G"]:
  lse, common = (x.reshape(len(x), *sinks.shape, -1) for x in (lse, common))
  return -jnp.sum(jnp.exp(sinks[..., None] - lse) * common, axis=(0, 3))


def backward(
  q, k, v, runs, d_out, lse, common, into, softcap
) -> tuple[Array, Array, Array]:
  """The gradients of q, k and v, those of k and v added to `into`; float32."""
  _, K, X, H = q.shape

  def of_queries(carry, mine):
    q, runs, d_out, lse, common = mine
    last, reach = _reach(runs)

    def add_keys(i, carry):
      dq, dk, dv = carry
      j = last - i
      scores = _scores(q, k[j], softcap)
      seen = _seen(runs, j, X)
      weights = jnp.where(seen, jnp.exp(scores - lse[..., None]), 0)
      d_scores = weights * (
        _dot("kxh,ksh->kxs", d_out, v[j]) - common[..., None]
      )
      if softcap is not None:
        d_scores = d_scores * (1 - jnp.square(scores / softcap))
      d_scores = d_scores.astype(q.dtype)
      dv = dv.at[j].add(_dot("kxs,kxh->ksh", weights.astype(v.dtype), d_out))
      dk = dk.at[j].add(_dot("kxs,kxh->ksh", d_scores, q))
      return dq + _dot("kxs,ksh->kxh", d_scores, k[j]), dk, dv

    carry = (jnp.zeros((K, X, H)), *carry)
    dq, dk, dv = lax.fori_loop(0, reach, add_keys, carry)
    return (dk, dv), dq

  every = (q, runs, d_out, lse, common)
  (dk, dv), dq = lax.scan(of_queries, into, every)
  return dq, dk, dv


def _dot(how: str, x: Array, y: Array) -> Array:
  return jnp.einsum(how, x, y, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, softcap: float | None) -> Array:
  scores = _dot("kxh,ksh->kxs", q, k)
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  return scores


def _seen(runs: Array, j: Array, X: int) -> Array:
  """[X, size]: which keys of block j each query of a block sees."""
  (first, last), size = runs, runs.shape[1]
  keys = j * size + jnp.arange(size)
  seen = (keys >= first[:, None]) & (keys <= last[:, None])
  return jnp.tile(seen, (X // size, 1))


def _reach(runs: Array) -> tuple[Array, Array]:
  """The last block that queries of a block read, and how many from there."""
  (first, last), size = runs, runs.shape[1]
  end = jnp.max(last) // size
  return end, end - jnp.min(first) // size + 1
