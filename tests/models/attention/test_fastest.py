"""The choice of a backend by measuring: who is wrong takes no part."""

import json

import jax.numpy as jnp
import pytest

import sft_jax
from sft_jax.common import sharding
from sft_jax.models.attention import attention as attention_lib
from sft_jax.models.attention import fastest
from sft_jax.training.build import model as setup_model

SHAPE = fastest.Shape(1, 64, 2, 1, 16, "float32")


@pytest.fixture
def odd_backends(monkeypatch):
  """Under the names of kernels that no CPU has: one leaks, one is imprecise."""
  real = attention_lib.attention

  def attention(q, k, v, *, backend, q_segment_ids, kv_segment_ids, **others):
    if backend == "triton":  # Everything is one document.
      q_segment_ids = kv_segment_ids = jnp.ones_like(q_segment_ids)
      others["q_positions"] = others["kv_positions"] = jnp.arange(64)[None]
    out = real(
      *(q, k, v),
      backend={"triton": "xla", "tokamax": "xla"}.get(backend, backend),
      q_segment_ids=q_segment_ids,
      kv_segment_ids=kv_segment_ids,
      **others,
    )
    return out * 1.5 if backend == "tokamax" else out

  monkeypatch.setattr(attention_lib, "attention", attention)
  fastest.fastest.cache_clear()
  fastest._run.clear_cache()


def test_only_what_keeps_the_laws_is_timed(odd_backends, tmp_path):
  found = fastest.fastest(
    SHAPE,
    "some card",
    ("triton", "tokamax", "splash", "blocks", "xla"),
    tmp_path,
  )
  assert found.name in found.seconds
  assert found.seconds.keys() == {"blocks", "xla"}
  assert found.left_out["triton"] == "a document sees another"
  assert found.left_out["tokamax"].startswith("differs from blocks by")
  assert "expected 'tpu'" in found.left_out["splash"]
  assert min(found.seconds, key=found.seconds.get) == found.name
  # Kept, and read in place of measuring.
  (file,) = tmp_path.iterdir()
  kept = json.loads(file.read_text())
  assert kept[0] == found.name
  file.write_text(json.dumps(["xla", {"xla": 0.5}, {}]))
  fastest.fastest.cache_clear()
  candidates = ("triton", "tokamax", "splash", "blocks", "xla")
  again = fastest.fastest(SHAPE, "some card", candidates, tmp_path)
  assert str(again) == "xla, measured here: xla 500.00 ms"
  assert fastest.fastest(SHAPE, "another", ("blocks",), tmp_path) != again


def test_a_cpu_is_not_measured():
  """The rule of `attention.choose` stands there."""
  config = sft_jax.default_config()
  mesh = sharding.make_mesh(**config.mesh)
  assert setup_model.measure_attention(config, None, mesh) is None
