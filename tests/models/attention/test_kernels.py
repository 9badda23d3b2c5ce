"""The TPU kernel: interpreted on CPU, and compiled for a TPU that is not here.
The mask given to tokamax: on its own reference operator, and on a GPU.

    JAX_PLATFORMS=cuda python -m pytest tests/models/attention/test_kernels.py

Rows of 200 slots are two blocks of 128.
"""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_laws as laws
from sft_jax.models import transformer
from sft_jax.models.attention import attention as attention_lib
from sft_jax.models.attention import kernels
from sft_jax.models.attention.attention import first_visible
from sft_jax.models.config import LayerKind, config_from_fields
from sft_jax.models.rope import Rope

CASES = [
  laws.Case((70, 81, 23), 200),
  laws.Case((130, 60), 200, K=1, window=40, softcap=0.7, sinks=True),
]


def attend(q, k, v, segments, sinks, *, window, softcap):
  return kernels.splash_attention(
    *(q, k, v, first_visible(segments), sinks),
    scale=q.shape[-1] ** -0.5,
    softcap=softcap,
    window=window,
    interpret=True,
  )


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_plain_loop(case):
  laws.check_values(attend, case)


@pytest.mark.parametrize("case", CASES)
def test_a_token_moves_only_what_sees_it(case):
  ends = np.cumsum(case.lengths)
  laws.check_isolation(attend, case, [0, *ends, *(ends - 1), 60, 195])


def triton(q, k, v, segments, sinks, *, window, softcap):
  return kernels.triton_attention(
    *(q, k, v, first_visible(segments), sinks),
    scale=q.shape[-1] ** -0.5,
    softcap=softcap,
    window=window,
    interpret=True,
  )


def test_the_kernel_for_gpus_keeps_the_laws():
  case = laws.Case((70, 81, 23), 200, K=1, H=16)
  laws.check_values(triton, case)
  laws.check_isolation(triton, case, [0, 69, 70, 150, 195])


@pytest.mark.parametrize(
  "odd", [{"window": 3}, {"softcap": 1.0}, {"sinks": True}]
)
def test_the_kernel_for_gpus_refuses_what_it_has_not(odd):
  with pytest.raises(ValueError, match="backend 'triton' got"):
    laws.check_values(triton, laws.Case((5, 3), 8, H=16, **odd))


@pytest.mark.parametrize("scan", [True, False])
def test_layers_with_and_without_a_window(scan, monkeypatch):
  """Windows are part of the kernel, and scanned layers choose theirs."""
  rope = Rope(theta=1e4)
  config = config_from_fields(
    "mistral",
    vocab_size=31,
    num_layers=3,
    d_model=16,
    d_ff=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=256,
    init_std=0.3,
  )
  layers = tuple(LayerKind(window, rope) for window in (20, None, 20))
  config = dataclasses.replace(config, layers=layers)
  tokens = np.random.default_rng(0).integers(1, 31, (1, 140))
  segments = np.repeat([[1, 2, 0]], (50, 84, 6), axis=1)

  def run(backend):
    model = transformer.build(config, attention=backend, scan=scan)
    params = jax.jit(model.init)(jax.random.key(0))

    def loss(params):
      x = model.hidden(params, tokens, segment_ids=segments)
      return jnp.sum(jnp.sin(x) * (segments > 0)[..., None])

    return jax.jit(jax.value_and_grad(loss))(params)

  want = run("xla")
  interpreted = functools.partial(kernels.splash_attention, interpret=True)
  monkeypatch.setattr(kernels, "splash_attention", interpreted)
  monkeypatch.setattr(attention_lib, "_platform", lambda mesh: "tpu")
  for x, y in zip(*map(jax.tree.leaves, (run("auto"), want)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


# Its compiler ends the process at the flags that tests give to the CPU's.
_COMPILE = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jax.experimental import topologies
from sft_jax.models.attention import parallel
from sft_jax.models.attention.attention import attention

chips = np.array(topologies.get_topology_desc("v5e:2x2", "tpu").devices)
axes = ("data", "fsdp", "expert", "context", "tensor")
mesh = Mesh(chips.reshape(2, 1, 1, 1, 2), axes)

def loss(q, k, v, positions, segments, sinks):
  out = parallel.attention(
    attention, mesh, q, k, v,
    q_positions=positions, kv_positions=positions,
    q_segment_ids=segments, kv_segment_ids=segments,
    sinks=sinks, window=300, softcap=30.0, in_order=True,
  )
  return jnp.sum(out.astype(jnp.float32))

def shape(dtype, *sizes, spec):
  place = NamedSharding(mesh, P(*spec))
  return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

heads = ("data", None, "tensor")
q = shape(jnp.bfloat16, 4, 520, 8, 64, spec=heads)
kv = shape(jnp.bfloat16, 4, 520, 2, 64, spec=heads)
ids = shape(jnp.int32, 4, 520, spec=("data",))
sinks = shape(jnp.float32, 8, spec=("tensor",))
step = jax.jit(jax.grad(loss, (0, 1, 2, 5)))
program = step.lower(q, kv, kv, ids, ids, sinks).compile().as_text()
print(program.count('custom_call_target="tpu_custom_call"'), "kernels")
"""


@pytest.mark.slow
def test_auto_compiles_the_kernel_for_a_tpu():
  """One forward and two backward kernels, rows and heads over four chips."""
  pytest.importorskip("libtpu", reason="needs libtpu (sft_jax[tpu])")
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  env |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
  done = subprocess.run(
    [sys.executable, "-c", _COMPILE], env=env, capture_output=True, text=True
  )
  assert done.stdout.strip() == "3 kernels", done.stderr


# -- tokamax ------------------------------------------------------------

TOKAMAX_CASES = [
  laws.Case((9, 1, 7), 22),
  laws.Case((4, 4, 8, 6), 22, K=1, window=3, softcap=0.7),
]


def tokamax(q, k, v, segments, sinks, *, window, softcap, dtype, operator):
  q, k, v = (x.astype(dtype) for x in (q, k, v))
  out = kernels.tokamax_attention(
    *(q, k, v, first_visible(segments, window), sinks),
    scale=q.shape[-1] ** -0.5,
    softcap=softcap,
    operator=operator,
  )
  return out.astype(jnp.float32)


@pytest.mark.parametrize("case", TOKAMAX_CASES)
@pytest.mark.parametrize(
  "law", [laws.check_values, laws.check_isolation, laws.check_packing]
)
def test_tokamax_mask_keeps_the_laws(law, case):
  pytest.importorskip("tokamax", reason="needs tokamax (Python 3.12)")
  law(functools.partial(tokamax, dtype="float32", operator="reference"), case)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("changes", [{}, {"window": 5, "softcap": 2.0, "K": 1}])
def test_tokamax_kernels_keep_the_laws(changes):
  """In bfloat16, whose rounding is in the tolerance; isolation has none."""
  case = laws.Case((5, 8, 3, 7, 8, 2) * 8, 300, H=64)._replace(**changes)
  kernel = functools.partial(tokamax, dtype="bfloat16", operator="gpu")
  laws.check_values(kernel, case, atol=0.1)
  laws.check_isolation(kernel, case, range(0, 300, 17))


def test_tokamax_refuses_sinks():
  x = jnp.zeros((1, 4, 2, 8))
  with pytest.raises(
    ValueError, match="backend 'tokamax' got a model with sinks"
  ):
    kernels.tokamax_attention(
      *(x, x, x, jnp.zeros((1, 4), jnp.int32), jnp.zeros(2)), scale=1.0
    )
