"""Attention by a ring of devices: the laws of every attention, and at 16k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_laws as laws
from sft_jax.common import sharding
from sft_jax.models.attention import blockwise, parallel
from sft_jax.models.attention.attention import attention, first_visible


def on_mesh(context, tensor=1, backend="blocks"):
  """As training calls it; of 4 heads, which the devices do not divide."""
  devices = jax.devices()[: context * tensor]
  mesh = sharding.make_mesh(1, 1, tensor, context, devices=devices)
  assert parallel.is_ring(mesh, 4) == (context > 1)

  def attend(q, k, v, segments, sinks, *, window, softcap):
    starts = first_visible(segments, window)
    own = jnp.arange(segments.shape[1]) - first_visible(segments)
    return parallel.attention(
      *(attention, mesh, q, k, v),
      **{"q_positions": own, "kv_positions": own, "window": window},
      **{"q_segment_ids": segments, "kv_segment_ids": segments},
      **{"softcap": softcap, "sinks": sinks, "backend": backend},
      mask=starts if backend == "blocks" else None,
      in_order=True,
    )

  return attend


# Documents begin and end within shards and at their ends; one is longer than a
# shard, some devices have padding alone.
CASES = [
  (laws.Case((9, 1, 8), 24), (8, 1)),
  (laws.Case((3, 15, 3), 24, K=1, window=5, softcap=0.7, sinks=True), (4, 2)),
]


@pytest.mark.parametrize(("case", "sizes"), CASES)
def test_a_ring_keeps_the_laws(case, sizes, monkeypatch):
  monkeypatch.setattr(blockwise, "BLOCK", 4)
  laws.check_values(on_mesh(*sizes), case)
  laws.check_isolation(on_mesh(*sizes), case, slots=(2, 3, 11, 17))


@pytest.mark.slow
def test_rows_of_16k_equal_the_reference():
  """Values: all scores at once. Gradients: blocks on one device."""
  case = laws.Case((5000, 9000, 300, 1), 16384, K=1, H=8)
  *inputs, d_out = case.draw()
  kept = case.segments > 0
  got, backward = jax.vjp(laws.bind(on_mesh(8), case), *inputs)
  one, alone = jax.vjp(laws.bind(on_mesh(1), case), *inputs)
  for x, y in zip(backward(d_out)[:3], alone(d_out)[:3], strict=True):
    np.testing.assert_allclose(x, y, atol=2e-5)
  np.testing.assert_allclose(got[kept], one[kept], atol=1e-5)
  want = laws.bind(on_mesh(1, backend="xla"), case)(*inputs)
  np.testing.assert_allclose(got[kept], want[kept], atol=1e-5)
