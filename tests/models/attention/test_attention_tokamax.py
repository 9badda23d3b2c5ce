"""The mask given to tokamax: on its own reference operator, and on a GPU.

JAX_PLATFORMS=cuda python -m pytest \\
      tests/models/attention/test_attention_tokamax.py
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import attention_laws as laws
from sft_jax.models.attention import attention_tokamax
from sft_jax.models.attention.attention import first_seen

CASES = [
  laws.Case((9, 1, 7), 22),
  laws.Case((4, 4, 8, 6), 22, K=1, window=3, softcap=0.7),
]


def attend(q, k, v, segments, sinks, *, window, softcap, dtype, operator):
  q, k, v = (x.astype(dtype) for x in (q, k, v))
  out = attention_tokamax.attend(
    *(q, k, v, first_seen(segments, window), sinks),
    scale=q.shape[-1] ** -0.5,
    softcap=softcap,
    operator=operator,
  )
  return out.astype(jnp.float32)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
  "law", [laws.check_values, laws.check_isolation, laws.check_packing]
)
def test_the_mask_keeps_the_laws(law, case):
  pytest.importorskip("tokamax", reason="needs tokamax (Python 3.12)")
  law(functools.partial(attend, dtype="float32", operator="reference"), case)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("changes", [{}, {"window": 5, "softcap": 2.0, "K": 1}])
def test_the_kernels_keep_the_laws(changes):
  """In bfloat16, whose rounding is in the tolerance; isolation has none."""
  case = laws.Case((5, 8, 3, 7, 8, 2) * 8, 300, H=64)._replace(**changes)
  kernel = functools.partial(attend, dtype="bfloat16", operator="gpu")
  laws.check_values(kernel, case, atol=0.1)
  laws.check_isolation(kernel, case, range(0, 300, 17))


def test_sinks_are_refused():
  x = jnp.zeros((1, 4, 2, 8))
  with pytest.raises(ValueError, match="backend 'tokamax' got attention sinks"):
    attention_tokamax.attend(
      *(x, x, x, jnp.zeros((1, 4), jnp.int32), jnp.zeros(2)), scale=1.0
    )
