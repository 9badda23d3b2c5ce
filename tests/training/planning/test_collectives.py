"""Collectives of programs whose traffic is known."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sft_jax.training.planning.cost_model import Traffic, collectives


def text_of(f, *shapes, sizes=(8,), specs=None) -> str:
  """The compiled text of f, run by each device on its part of axis 0."""
  names = ("a", "b")[: len(sizes)]
  mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))
  rows = PartitionSpec(names)
  local = jax.shard_map(
    f, mesh=mesh, in_specs=rows, out_specs=specs or rows, check_vma=False
  )
  inputs = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, rows))
    for shape in shapes
  ]
  return jax.jit(local).lower(*inputs).compile().as_text()


@pytest.mark.parametrize(
  ("f", "expected"),
  [
    # Each device has 1,000 of 8,000 float32 numbers.
    (lambda x: jax.lax.psum(x, "a"), {"all-reduce": (1, 2 * 4000 * 7 // 8)}),
    (
      lambda x: jax.lax.all_gather(x, "a", tiled=True),
      {"all-gather": (1, 32000 * 7 // 8)},
    ),
    (
      lambda x: jax.lax.psum_scatter(x, "a", tiled=True),
      {"reduce-scatter": (1, 4000 * 7 // 8)},
    ),
    (
      lambda x: jax.lax.all_to_all(x, "a", 0, 0, tiled=True),
      {"all-to-all": (1, 4000 * 7 // 8)},
    ),
    (
      lambda x: jax.lax.ppermute(x, "a", [(i, (i + 1) % 8) for i in range(8)]),
      {"collective-permute": (1, 4000)},
    ),
    (lambda x: 2 * x, {}),
  ],
)
def test_each_kind(f, expected):
  found = collectives(text_of(f, (8000,)))
  assert found == {kind: Traffic(*of, True) for kind, of in expected.items()}


def test_groups_are_of_one_axis():
  """Over 2 x 4 devices a sum along an axis has groups of 2, and of 4."""
  sums = lambda axis: lambda x: jax.lax.psum(x, axis)
  for axis, size in (("a", 2), ("b", 4), (("a", "b"), 8)):
    found = collectives(text_of(sums(axis), (8000,), sizes=(2, 4)))
    moved = 2 * 4000 * (size - 1) // size
    assert found == {"all-reduce": Traffic(1, moved, True)}, axis


def test_loops_are_multiplied_out():
  def body(x, _):
    inner = lambda i, x: jnp.sin(jax.lax.psum(x, "a") + i)
    return jax.lax.fori_loop(0, 3, inner, x), None

  found = collectives(
    text_of(lambda x: jax.lax.scan(body, x, None, length=5)[0], (8000,))
  )
  assert found == {"all-reduce": Traffic(15, 15 * 7000, True)}


def test_a_loop_of_unknown_length_is_said():
  def until_large(x):
    grow = lambda x: jax.lax.psum(x, "a") + 1
    return jax.lax.while_loop(lambda x: x[0] < 100, grow, x)

  found = collectives(text_of(until_large, (8000,)))
  assert not found["all-reduce"].exact
  assert found["all-reduce"].count >= 1


HEAD = (
  "HloModule step, num_partitions=8\n\nENTRY %main (p: f32[8]) -> f32[8] {\n"
)


@pytest.mark.parametrize(
  ("line", "expected"),
  [
    (
      "%a = (bf16[100]{0}, bf16[400]{0}) all-gather-start(%p), "
      "replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}",
      ("all-gather", 800 * 3 // 4),
    ),
    (
      "%r = (f32[100]{0:T(128)}, s8[4]{0}) all-reduce(%p, %q), "
      "replica_groups=[4,2]<=[8], to_apply=%add",
      ("all-reduce", 404),
    ),
    (
      "%c = (f32[10]{0}, f32[10]{0}, u32[], u32[]) "
      "collective-permute-start(%p), source_target_pairs={{0,1}}",
      ("collective-permute", 40),
    ),
    (
      "%s = f32[10]{0} reduce-scatter(%p), replica_groups={}, to_apply=%add",
      ("reduce-scatter", 280),
    ),
    (
      "%m = f32[8]{0} all-reduce(%p), replica_groups=mesh['x'=4,'y'=2], "
      "device_ids=([2,4]T(1,0)) {'x':(2)2,'y'}, to_apply=%add",
      ("all-reduce", 48),
    ),
    (
      "%r = (f32[256,8]{1,0}, u32[], token[]) recv(%after-all), "
      "channel_id=1, is_host_transfer=true, frontend_attributes={"
      '_xla_host_transfer_handler_name="xla_megascale_runtime",'
      '_xla_megascale_transfer_type="ALL_REDUCE"}',
      ("across slices", 256 * 8 * 4),
    ),
  ],
)
def test_the_forms_that_xla_writes(line, expected):
  kind, size = expected
  done = "\n  %d = f32[8]{0} all-gather-done(%a)\n}\n"
  found = collectives(f"{HEAD}  {line}{done}")
  assert found == {kind: Traffic(1, size, True)}


_SLICES = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from sft_jax.common import machines, sharding
from sft_jax.training.planning.cost_model import collectives
two = machines.find_machine("v5p:2x2x1*2").devices
mesh = sharding.make_mesh(2, 4, 1, devices=two)
lies = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
w = jax.ShapeDtypeStruct((1024, 256), jnp.float32, sharding=lies("fsdp"))
x = jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=lies(sharding.ROWS))
loss = lambda w, x: ((x @ w) ** 2).sum()
gradient = jax.jit(jax.grad(loss), out_shardings=lies("fsdp"))
print(collectives(gradient.lower(w, x).compile().as_text())["across slices"])
"""


def test_a_sum_over_two_slices_is_counted_apart():
  pytest.importorskip("libtpu", reason="needs the [tpu] extra")
  # The flags that tests compile with are unknown to a TPU's compiler.
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, "-c", _SLICES],
    cwd=Path(__file__).parents[3],
    env={"PYTHONPATH": ".", **environment},
    capture_output=True,
    text=True,
    check=True,
  )
  # Each device's share of the gradient, once.
  assert done.stdout.strip() == str(Traffic(1, 1024 * 256 * 4 // 4, True))


def test_an_asynchronous_computation_counts_once():
  text = (
    "HloModule step, num_partitions=4\n\n"
    "%inner (p: f32[400]) -> f32[100] {\n"
    "  ROOT %rs = f32[100]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, "
    "to_apply=%add\n}\n\n"
    "ENTRY %main (p: f32[400]) -> f32[100] {\n"
    "  %start = ((f32[400]), f32[100], s32[]) async-start(%p), calls=%inner\n"
    "  ROOT %done = f32[100]{0} async-done(%start), calls=%inner\n}\n"
  )
  assert collectives(text) == {"reduce-scatter": Traffic(1, 1200, True)}


def test_a_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY computation"):
    collectives("module @jit_f { }")


def test_gradients_of_sharded_parameters():
  """Three layers gathered forward and backward; gradients summed over rows."""
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
  lies = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))

  @partial(jax.jit, out_shardings=lies(None, "fsdp"))
  def gradient(w, x):
    step = lambda x, w: (jnp.tanh(x @ w), None)
    return jax.grad(lambda w: jax.lax.scan(step, x, w)[0].sum())(w)

  w = jax.ShapeDtypeStruct(
    (3, 64, 64), jnp.float32, sharding=lies(None, "fsdp")
  )
  x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=lies("fsdp"))
  found = collectives(gradient.lower(w, x).compile().as_text())
  layer = 64 * 64 * 4
  assert found["all-gather"] == Traffic(6, 6 * layer * 7 // 8, True)
  summed = found.get("reduce-scatter") or found["all-reduce"]
  assert summed.count == 3
  assert summed.bytes in (3 * layer * 7 // 8, 2 * 3 * layer * 7 // 8)
