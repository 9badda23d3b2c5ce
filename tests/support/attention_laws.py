"""What every attention of packed rows must do: a float64 oracle and laws.

An attention under test is attend(q, k, v, segments, sinks, window, softcap).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
  """One row: documents laid in order, then padding."""

  lengths: tuple[int, ...]
  T: int
  K: int = 2  # Of 4 query heads.
  H: int = 6
  window: int | None = None
  softcap: float | None = None
  sinks: bool = False

  @property
  def segments(self):
    ids = np.zeros(self.T, np.int32)
    ends = np.cumsum(self.lengths)
    for i, (n, end) in enumerate(zip(self.lengths, ends, strict=True)):
      ids[end - n : end] = i + 1
    return ids

  def sees(self):
    """[T, T]: whether a query sees a key; nothing is said of padding."""
    own = np.arange(self.T)
    ago = own[:, None] - own
    same = self.segments[:, None] == self.segments
    seen = same & (ago >= 0) & (self.segments > 0)
    return seen if self.window is None else seen & (ago < self.window)

  def draw(self, dtype=np.float32):
    """q, k, v, sinks and the gradient of the output, which padding has not."""
    random = np.random.default_rng(sum(self.lengths) + self.T)
    normal = lambda *shape: random.normal(size=shape).astype(dtype)
    q, d_out = normal(self.T, 4, self.H), normal(self.T, 4, self.H)
    k, v = normal(self.T, self.K, self.H), normal(self.T, self.K, self.H)
    sinks = normal(4) if self.sinks else None
    return q, k, v, sinks, d_out * (self.segments > 0)[:, None, None]


def by_hand(case, q, k, v, sinks, d_out):
  """Output and gradients of q, k, v and sinks, query by query in float64."""
  q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
  out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
  d_sinks, seen = np.zeros(4), case.sees()
  scale = case.H**-0.5
  for t, n in np.ndindex(case.T, 4):
    keys, m = np.flatnonzero(seen[t]), n // (4 // case.K)
    if not len(keys):
      continue
    scores = k[keys, m] @ q[t, n] * scale
    slope = np.ones_like(scores)
    if case.softcap:
      bent = np.tanh(scores / case.softcap)
      scores, slope = case.softcap * bent, 1 - bent**2
    sink = -np.inf if sinks is None else np.float64(sinks[n])
    top = max(scores.max(), sink)
    total = np.exp(scores - top).sum() + np.exp(sink - top)
    weights = np.exp(scores - top) / total
    out[t, n] = weights @ v[keys, m]
    d_weights = v[keys, m] @ d_out[t, n]
    common = weights @ d_weights
    d_scores = weights * (d_weights - common) * slope * scale
    dq[t, n] = d_scores @ k[keys, m]
    dk[keys, m] += d_scores[:, None] * q[t, n]
    dv[keys, m] += weights[:, None] * d_out[t, n]
    d_sinks[n] -= np.exp(sink - top) / total * common
  return out, (dq, dk, dv, d_sinks if sinks is not None else None)


def bind(attend, case):
  """attend of one row, compiled: (q, k, v, sinks) -> out [T, 4, H]."""

  @jax.jit
  def one(q, k, v, sinks):
    segments = jnp.asarray(case.segments)[None]
    how = {"window": case.window, "softcap": case.softcap}
    return attend(q[None], k[None], v[None], segments, sinks, **how)[0]

  return one


def check_values(attend, case, atol=1e-5):
  """Output and gradients are those of the oracle; all are finite."""
  *inputs, d_out = case.draw()
  got, backward = jax.vjp(bind(attend, case), *inputs)
  want, wanted = by_hand(case, *inputs, d_out)
  kept = case.segments > 0
  np.testing.assert_allclose(got[kept], want[kept], atol=atol)
  assert np.all(np.isfinite(got))
  for x, y in zip(backward(jnp.asarray(d_out)), wanted, strict=True):
    if y is not None:
      np.testing.assert_allclose(x, y, atol=atol)


def check_isolation(attend, case, slots=None):
  """A token moves what sees it and nothing else, and so do gradients.

  Nothing else: by exactly 0. Padding moves no document. All slots are moved,
  or a few of a long row.
  """
  *inputs, _ = case.draw()
  run, seen, T = bind(attend, case), case.sees(), case.T
  before = np.asarray(run(*inputs))
  real = case.segments > 0
  slots = np.arange(T) if slots is None else np.asarray(slots)
  for j in slots:
    moved = [x if x is None else x.copy() for x in inputs]
    for x in moved[:3]:
      x[j] += 3
    change = np.abs(np.asarray(run(*moved)) - before).max(axis=(1, 2))
    assert np.all(change[real & ~seen[:, j] & (np.arange(T) != j)] == 0), j
    assert np.all(change[seen[:, j]] > 0), j

  @jax.jit
  def pulled(i):
    """How far the output of slot i pulls each slot's q, k and v."""
    _, backward = jax.vjp(run, *inputs)
    d_out = jnp.zeros((T, 4, case.H)).at[i].set(1.0)
    return [jnp.abs(x).max((1, 2)) for x in backward(d_out)[:3]]

  for i in slots[real[slots]]:
    dq, dk, dv = pulled(i)
    assert np.all(np.delete(dq, i) == 0), i
    assert np.all(np.asarray(dk)[~seen[i]] == 0), i
    np.testing.assert_array_equal(np.asarray(dv) > 0, seen[i])


def check_packing(attend, case, atol=1e-6):
  """Law 3: documents in one row are what they are alone, gradients too."""
  *inputs, d_out = case.draw()
  out, backward = jax.vjp(bind(attend, case), *inputs)
  gradients = backward(jnp.asarray(d_out))
  sinks, d_sinks = inputs[3], 0.0
  for n, end in zip(case.lengths, np.cumsum(case.lengths), strict=True):
    mine = slice(end - n, end)
    alone = case._replace(lengths=(n,), T=n)
    of_mine = [x[mine] for x in inputs[:3]]
    out_alone, backward = jax.vjp(bind(attend, alone), *of_mine, sinks)
    np.testing.assert_allclose(out[mine], out_alone, atol=atol)
    *alone, d_sink = backward(jnp.asarray(d_out[mine]))
    for x, y in zip(gradients, alone, strict=False):
      np.testing.assert_allclose(x[mine], y, atol=10 * atol)
    d_sinks = d_sinks + (0 if d_sink is None else d_sink)
  if sinks is not None:
    np.testing.assert_allclose(gradients[3], d_sinks, atol=10 * atol)
