"""Where parameters lie on a mesh of eight fake devices."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sft_jax.common import sharding


def test_one_size_may_be_left_open():
  assert dict(sharding.make_mesh(-1, 2, 1).shape) == {
    "data": 4,
    "fsdp": 2,
    "expert": 1,
    "context": 1,
    "tensor": 1,
  }


@pytest.mark.parametrize(
  "sizes", [(3, 1, 1), (-1, -1, 1), (2, 2, 1), (0, 8, 1)]
)
def test_sizes_that_cannot_be_are_refused(sizes):
  with pytest.raises(ValueError, match="mesh: got data="):
    sharding.make_mesh(*sizes)


@dataclasses.dataclass(frozen=True)
class FakeChip:
  id: int
  coords: tuple[int, int, int]
  slice_index: int
  device_kind: str
  platform: str = "tpu"
  core_on_chip: int = 0
  process_index: int = 0


@pytest.mark.parametrize(
  ("kind", "shape"), [("TPU v5", (2, 2, 2)), ("TPU v6 lite", (2, 4, 1))]
)
def test_only_data_goes_across_slices(kind, shape):
  chips = [
    FakeChip(8 * number + i, tuple(map(int, at)), number, kind)
    for number in (1, 0)
    for i, at in enumerate(np.ndindex(shape))
  ]
  mesh = sharding.make_mesh(-1, 2, 1, context=2, devices=chips)
  assert tuple(mesh.shape.values()) == (4, 2, 1, 2, 1)
  slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
  assert (slices == np.array([0, 0, 1, 1])[:, *[None] * 4]).all()
  with pytest.raises(ValueError, match="for 2 slices of 8 devices"):
    sharding.make_mesh(1, -1, 1, devices=chips)


def test_of_all_but_experts_two_axes_divide_what_one_would():
  mesh = sharding.make_mesh(1, 2, 1, context=2, expert=2)
  place = lambda path, *shape: sharding.place_parameter(path, shape, mesh).spec
  expert = place("layers/moe/down/kernel", 2, 4, 6, 8)
  assert expert == PartitionSpec(None, "expert", "tensor", "fsdp")
  factors = (place(f"layers/moe/down/lora_{x}", 2, 4, 6, 8) for x in "ab")
  assert next(factors) == PartitionSpec(None, "expert", "tensor", None)
  assert next(factors) == PartitionSpec(None, "expert", None, "fsdp")
  both = PartitionSpec(None, ("fsdp", "expert"), "tensor")
  assert place("layers/attn/q/kernel", 2, 8, 6) == both
  assert place("layers/moe/shared/up/kernel", 2, 8, 6) == both
  assert sharding.size(mesh) == 4


def test_rules_divide_what_can_be_divided():
  mesh = sharding.make_mesh(1, 4, 2)
  kernel = sharding.place_parameter("layers/attn/q/kernel", (3, 16, 32), mesh)
  assert kernel.spec == PartitionSpec(None, "fsdp", "tensor")
  assert kernel.note == ""
  odd = sharding.place_parameter("layers/attn/o/kernel", (3, 7, 16), mesh)
  assert odd.spec == PartitionSpec(None, None, "fsdp")
  assert odd.note == "7 is not a multiple of tensor"


def test_a_parameter_without_a_rule_is_an_error():
  with pytest.raises(ValueError, match=r"no pattern matches .*'router/gate'"):
    sharding.place_parameter("router/gate", (4,), sharding.make_mesh(8, 1, 1))


def test_rows_are_divided_over_both_data_axes():
  mesh = sharding.make_mesh(2, 4, 1)
  x = np.arange(16 * 3).reshape(16, 3)
  placed = sharding.put_rows(x, sharding.row_sharding(mesh))
  assert {s.data.shape for s in placed.addressable_shards} == {(2, 3)}
  np.testing.assert_array_equal(placed, x)
  stacked = sharding.put_rows(
    x[None], sharding.row_sharding(mesh, leading_axes=1)
  )
  assert {s.data.shape for s in stacked.addressable_shards} == {(1, 2, 3)}
  assert len(jax.devices()) == 8
