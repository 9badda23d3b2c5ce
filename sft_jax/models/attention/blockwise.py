"""Attention in blocks of queries and keys: O(T) memory and no needless work.

The documents of a row are in order, so the keys that a query sees are a run of
slots that ends at its own, [start, own]. Queries of one block need the blocks
of keys from their earliest start up to their own. In blocks of 4 slots, with
documents a, b, c and padding (a slot of padding sees itself):

    slots     a a a a   a b b b   b b c c   c c . .
    starts    0 0 0 0   0 5 5 5   5 5 a a   a a e f      (a, e, f: 10, 14, 15)
    reads     block 0   0 and 1   1 and 2   2 and 3

How many blocks that is, is read from the data while the program runs, so the
cost of a document does not depend on the row that it is in. Softmax is
gathered block by block (Milakov and Gimelshein 2018, Rabe and Staats 2021);
the backward pass computes the scores again from the log-sum-exp, as
FlashAttention does (Dao et al. 2022).

A batch is laid out as one row of blocks: no document reaches back over the
start of its row, so rows need no axis of their own.
"""

from functools import partial

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

  Scores and softmax are float32; products take and give the dtype of their
  inputs. Kept for the backward pass: q, k, v, the output and its log-sum-exp,
  the last two by the names 'attention_out' and 'attention_lse'.

  Args:
    q: queries; N is a multiple of K.
    k: keys.
    v: values.
    starts: first slot that each query sees, at most its own.
    sinks: see `attention.attention`.
    scale: of the scores.
    softcap: see `attention.attention`.
    block: slots in a block, at most.
  """
  B, T, N, H = q.shape
  K = k.shape[2]
  G = N // K
  count = -(-T // block)
  size = -(-T // count)
  pad = count * size - T
  own = jnp.arange(T, T + pad)
  starts = jnp.concatenate(
    [starts, jnp.broadcast_to(own, (B, pad)).astype(starts.dtype)], axis=1
  )
  starts = starts + jnp.arange(B, dtype=starts.dtype)[:, None] * (T + pad)
  M, X = B * count, G * size

  def rows(x: Array) -> Array:
    """[B, T, heads, H] -> [M, K, heads / K * size, H]."""
    x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
    x = x.reshape(M, size, K, -1, H).transpose(0, 2, 3, 1, 4)
    return x.reshape(M, K, -1, H)

  if sinks is not None:
    sinks = sinks.astype(jnp.float32).reshape(K, G)
  out: Array = _blocks(
    rows(q * scale), rows(k), rows(v), starts.reshape(M, size), sinks, softcap
  )
  assert out.shape == (M, K, X, H)
  out = out.reshape(M, K, G, size, H).transpose(0, 3, 1, 2, 4)
  return out.reshape(B, T + pad, N, H)[:, :T]


# Inside, X = G * block: the queries of a block, of all heads that share keys.


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocks(q, k, v, starts, sinks, softcap):
  return _forward(q, k, v, starts, sinks, softcap)[0]


def _forward(
  q: Float[Array, "M K X H"],
  k: Float[Array, "M K block H"],
  v: Float[Array, "M K block H"],
  starts: Int[Array, "M block"],
  sinks: Float32[Array, "K G"] | None,
  softcap: float | None,
):
  """The output, and what the backward pass needs."""
  _, K, X, H = q.shape

  def of_queries(_, mine):
    m, q, starts = mine

    def add_keys(i, carry):
      """Their own block first: there each query sees a key, so `top` is of a
      key that is seen from then on and hidden ones weigh exactly 0."""
      top, total, sums = carry
      scores = _scores(q, k[m - i], softcap)
      scores = jnp.where(_seen(starts, m, m - i, X), scores, _HIDDEN)
      new = jnp.maximum(top, jnp.max(scores, axis=-1))
      weights = jnp.exp(scores - new[..., None])
      shrink = jnp.exp(top - new)
      total = total * shrink + jnp.sum(weights, axis=-1)
      values = _dot("kxs,ksh->kxh", weights.astype(v.dtype), v[m - i])
      return new, total, sums * shrink[..., None] + values

    if sinks is None:
      top, total = jnp.full((K, X), _HIDDEN), jnp.zeros((K, X))
    else:
      # A key without a value, whose score is known.
      top = jnp.repeat(sinks, X // sinks.shape[1], axis=1)
      total = jnp.ones((K, X))
    carry = (top, total, jnp.zeros((K, X, H)))
    top, total, sums = lax.fori_loop(0, _reach(m, starts), add_keys, carry)
    out = (sums / total[..., None]).astype(v.dtype)
    return None, (out, top + jnp.log(total))

  every = (jnp.arange(len(q)), q, starts)
  _, (out, lse) = lax.scan(of_queries, None, every)
  out = checkpoint_name(out, "attention_out")
  lse = checkpoint_name(lse, "attention_lse")
  return out, (q, k, v, starts, sinks, out, lse)


def _backward(softcap: float | None, kept, d_out: Float[Array, "M K X H"]):
  """The gradients of q, k, v and the sinks."""
  q, k, v, starts, sinks, out, lse = kept
  _, K, X, H = q.shape
  # sum over s of weight_s d_weight_s, which softmax takes from each d_weight.
  common = jnp.sum(out.astype(jnp.float32) * d_out, axis=-1)

  def of_queries(carry, mine):
    m, q, starts, d_out, lse, common = mine

    def add_keys(i, carry):
      dq, dk, dv = carry
      j = m - i
      scores = _scores(q, k[j], softcap)
      seen = _seen(starts, m, j, X)
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
    dq, dk, dv = lax.fori_loop(0, _reach(m, starts), add_keys, carry)
    return (dk, dv), dq.astype(q.dtype)

  every = (jnp.arange(len(q)), q, starts, d_out, lse, common)
  zeros = (jnp.zeros(k.shape), jnp.zeros(v.shape))
  (dk, dv), dq = lax.scan(of_queries, zeros, every)
  d_sinks = None
  if sinks is not None:
    G = sinks.shape[1]
    lse, common = (x.reshape(-1, K, G, X // G) for x in (lse, common))
    shares = jnp.exp(sinks[..., None] - lse)
    d_sinks = -jnp.sum(shares * common, axis=(0, 3))
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, d_sinks


_blocks.defvjp(_forward, _backward)


def _dot(how: str, x: Array, y: Array) -> Array:
  return jnp.einsum(how, x, y, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, softcap: float | None) -> Array:
  scores = _dot("kxh,ksh->kxs", q, k)
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  return scores


def _seen(starts: Array, m: Array, j: Array, X: int) -> Array:
  """[X, block]: which keys of block j each query of block m sees."""
  size = len(starts)
  slots = jnp.arange(size)
  own, keys = m * size + slots, j * size + slots
  seen = (keys >= starts[:, None]) & (keys <= own[:, None])
  return jnp.tile(seen, (X // size, 1))


def _reach(m: Array, starts: Array) -> Array:
  """How many blocks of keys, from its own back, queries of block m read."""
  return m - jnp.min(starts) // len(starts) + 1
