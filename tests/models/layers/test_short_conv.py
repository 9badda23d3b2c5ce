"""The short convolution: against a loop, at every boundary, token by token."""

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.models.layers.short_conv import short_conv, short_conv_step

W, C, T = 4, 3, 9


def draw(rows):
  rng = np.random.default_rng(0)
  x, taps = rng.normal(size=(rows, T, C)), rng.normal(size=(W, 1, C))
  return [jnp.asarray(a, jnp.float32) for a in (x, taps, rng.normal(size=C))]


def loop(x, taps, bias, starts):
  y = np.zeros(x.shape)
  for b, t in np.ndindex(x.shape[:2]):
    y[b, t] = bias
    for back in range(min(W, t + 1)):
      if back and starts[b, t - back + 1 : t + 1].any():
        break
      y[b, t] += taps[W - 1 - back, 0] * x[b, t - back]
  return y


def test_windows_end_at_every_boundary():
  """A second document at each slot: the loop's sums; a change before it is an
  exact zero after it."""
  starts = np.eye(T, dtype=bool) | (np.arange(T) == 0)
  x, taps, bias = draw(T)
  conv = jax.jit(short_conv)
  got = conv(x, taps, bias, starts)
  np.testing.assert_allclose(
    got, loop(*map(np.asarray, (x, taps, bias)), starts), atol=1e-5
  )
  first = np.arange(T) < np.arange(T)[:, None]
  moved = conv(x + first[..., None], taps, bias, starts)
  np.testing.assert_array_equal(got[~first], moved[~first])
  assert np.all(np.abs(got - moved)[first] > 0)


def test_steps_with_padding_anywhere_are_the_whole_row():
  """Rows in three parts of 1, 5 and 3 slots, of which some are padding."""
  rows = 6
  x, taps, bias = draw(rows)
  valid = np.random.default_rng(1).random((rows, T)) < 0.7
  valid[0], valid[1] = True, np.arange(T) > 4  # None; at the left.
  starts = valid & (np.cumsum(valid, axis=1) == 1)
  starts[2:, 5] = valid[2:, 5]  # And one at the end of a part.
  before, parts = jnp.zeros((rows, W - 1, C)), []
  for at in (slice(0, 1), slice(1, 6), slice(6, T)):
    y, before = short_conv_step(
      x[:, at],
      taps,
      bias,
      *map(jnp.asarray, (starts[:, at], valid[:, at])),
      before,
    )
    parts.append(y)
  got = np.concatenate(parts, axis=1)
  for b in range(rows):
    own = np.flatnonzero(valid[b])
    want = loop(
      *(np.asarray(a) for a in (x[b : b + 1, own], taps, bias)),
      starts[b : b + 1, own],
    )
    np.testing.assert_allclose(got[b, own], want[0], atol=1e-5)
