"""Schedules by their tables; AdamW by its formula, leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax import optim

ADAMW = {
  "b1": 0.9,
  "b2": 0.99,
  "eps": 1e-8,
  "weight_decay": 0.1,
  "decay_patterns": ("kernel$",),
}


@pytest.mark.parametrize(
  ("name", "want"),
  [
    ("constant", [0.5, 1, 1, 1, 1, 1, 1]),
    ("linear", [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2]),
    (
      "cosine",
      [0.5, 1]
      + [0.2 + 0.8 * (1 + np.cos(np.pi * s / 4)) / 2 for s in range(5)],
    ),
  ],
)
def test_schedules(name, want):
  rate = optim.schedule(
    name, peak=1.0, warmup_steps=2, num_steps=6, final_fraction=0.2
  )
  np.testing.assert_allclose([rate(s) for s in range(7)], want, rtol=1e-6)


def test_schedule_refuses_what_cannot_be():
  known = {"peak": 1.0, "num_steps": 6, "final_fraction": 0.0}
  with pytest.raises(ValueError, match=r"optim\.schedule: got 'cosin'"):
    optim.schedule("cosin", warmup_steps=2, **known)
  with pytest.raises(ValueError, match=r"optim\.warmup_steps: got 6"):
    optim.schedule("linear", warmup_steps=6, **known)


def test_adamw_equals_its_formula():
  rng = np.random.default_rng(0)
  params = {"kernel": rng.normal(size=5), "scale": rng.normal(size=3)}
  params = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
  tx = optim.adamw(lambda step: 0.1 / (step + 1), clip_norm=1.0, **ADAMW)
  state = tx.init(params)
  want = {k: np.asarray(v, np.float64) for k, v in params.items()}
  m = {k: np.zeros_like(v) for k, v in want.items()}
  v = {k: np.zeros_like(v) for k, v in want.items()}
  for step in range(4):
    grads = {k: 3 * rng.normal(size=p.shape) for k, p in want.items()}
    updates, state = tx.update(
      {k: jnp.asarray(g, jnp.float32) for k, g in grads.items()},
      state,
      params,
    )
    params = jax.tree.map(jnp.add, params, updates)
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    for k, g in grads.items():
      g = g / max(norm, 1.0)
      m[k] = 0.9 * m[k] + 0.1 * g
      v[k] = 0.99 * v[k] + 0.01 * g**2
      m_hat, v_hat = (
        m[k] / (1 - 0.9 ** (step + 1)),
        v[k] / (1 - 0.99 ** (step + 1)),
      )
      decay = 0.1 if k == "kernel" else 0.0
      want[k] -= (
        0.1 / (step + 1) * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * want[k])
      )
  for k in want:
    np.testing.assert_allclose(params[k], want[k], rtol=2e-5)


def test_without_gradients_only_the_named_leaves_decay():
  params = {"kernel": jnp.ones(2), "bias": jnp.ones(2), "scale": jnp.ones(2)}
  tx = optim.adamw(lambda step: 0.5, clip_norm=0.0, **ADAMW)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
  assert not updates["bias"].any()
  assert not updates["scale"].any()
