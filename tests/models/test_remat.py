"""Each rung of the ladder keeps less memory; offloading moves it to the host.

That values and gradients stay the same: `test_transformer.py`.
"""

import jax
import numpy as np
import pytest

from sft_jax.common import flops
from sft_jax.models import remat, transformer
from sft_jax.models.config import config_from_fields

CONFIG = config_from_fields(
  "llama",
  vocab_size=64,
  num_layers=6,
  d_model=32,
  d_ff=128,
  num_heads=2,
  num_kv_heads=2,
  head_dim=16,
  max_positions=128,
)
TOKENS = np.ones((2, 128), np.int32)


def gradient(level):
  model = transformer.build(CONFIG, remat=level, attention="xla")
  params = jax.eval_shape(model.init, jax.random.key(0))
  loss = lambda params: model.hidden(params, TOKENS).sum()
  return jax.grad(loss), params


def test_memory_falls_down_the_ladder():
  found = {}
  for level in ("none", "norms", "attention", "full"):
    run, params = gradient(level)
    compiled = jax.jit(run).lower(params).compile()
    found[level] = flops.program(compiled).temporaries
  none, norms, attention, full = found.values()
  assert norms < 0.8 * none
  assert attention < 0.8 * norms
  assert full < attention


def test_offload_keeps_on_the_host_what_attention_keeps():
  run, params = gradient("offload")
  text = str(jax.make_jaxpr(run)(params))
  assert "pinned_host" in text or "<host>" in text
  run, params = gradient("attention")
  text = str(jax.make_jaxpr(run)(params))
  assert "pinned_host" not in text
  assert "<host>" not in text


def test_offload_is_refused_where_the_host_has_no_such_memory(monkeypatch):
  class Memory:
    kind = "device"

  class Device:
    device_kind = "Old TPU"

    def addressable_memories(self):
      return [Memory()]

  monkeypatch.setattr(remat.jax, "devices", lambda: [Device()])
  with pytest.raises(ValueError, match=r"'offload' on Old TPU.*\['device'\]"):
    transformer.build(CONFIG, remat="offload")
