"""FLOPs and kept bytes of traces, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from sft_jax.training.planning import cost_model


def shape(*dims, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(dims, dtype)


def test_a_product_and_its_gradients():
  """2 M K N forward, and as much for each of the two gradients."""
  product = lambda a, b: (a @ b).sum()
  one = 2 * 3 * 5 * 7
  arguments = shape(3, 5), shape(5, 7)
  assert cost_model.matmul_flops(product, *arguments) == one
  # The product itself is not needed for its gradients, and is traced.
  gradients = jax.grad(product, (0, 1))
  assert cost_model.matmul_flops(gradients, *arguments) == 3 * one


def test_batched():
  scores = lambda q, k: jnp.einsum("btnh,bsnh->bnts", q, k)
  got = cost_model.matmul_flops(scores, shape(2, 5, 3, 4), shape(2, 7, 3, 4))
  assert got == 2 * (2 * 3) * 5 * 7 * 4


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_counts_as_often_as_it_runs(remat):
  def layers(kernels, x):
    step = lambda x, kernel: (jnp.tanh(x @ kernel), None)
    step = jax.checkpoint(step, prevent_cse=False) if remat else step
    return jax.lax.scan(step, x, kernels)[0].sum()

  got = cost_model.matmul_flops(jax.grad(layers), shape(6, 8, 8), shape(4, 8))
  # Forward, both gradients, and once more where it is recomputed.
  assert got == 6 * (2 * 4 * 8 * 8) * (4 if remat else 3)


def test_a_product_of_groups_counts_each_row_once():
  sizes = shape(4, dtype=jnp.int32)
  got = cost_model.matmul_flops(
    jax.lax.ragged_dot, shape(10, 3), shape(4, 3, 5), sizes
  )
  assert got == 2 * 10 * 3 * 5


def test_what_devices_divide_by_hand_adds_up_to_the_whole():
  mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
  divided = jax.shard_map(
    lambda a, b: a @ b,
    mesh=mesh,
    in_specs=(PartitionSpec("x"), PartitionSpec()),
    out_specs=PartitionSpec("x"),
  )
  assert (
    cost_model.matmul_flops(divided, shape(8, 3), shape(3, 5)) == 2 * 8 * 3 * 5
  )


def test_of_branches_the_cheapest_counts():
  choose = lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x)
  assert cost_model.matmul_flops(choose, shape(4, 4)) == 0


def test_kept_are_activations_and_not_weights():
  """tanh keeps its result; the kernel that the backward pass reads does not
  grow with the batch."""

  def loss(kernel, x):
    return jnp.tanh(x @ kernel).sum()

  kept = cost_model.kept_bytes(loss, shape(8, 5), shape(3, 8), shape(6, 8))
  # x for the kernel's gradient, and what tanh needs.
  assert kept >= 4 * 3 * (8 + 5)
  assert kept <= 4 * 3 * (8 + 2 * 5)
  whole = jax.checkpoint(loss)
  assert cost_model.kept_bytes(
    whole, shape(8, 5), shape(3, 8), shape(6, 8)
  ) == (4 * 3 * 8)
