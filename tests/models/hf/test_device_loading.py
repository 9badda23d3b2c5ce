"""Parameters from files: any grouping, sharding and dtype, the same numbers."""

import os
from collections import namedtuple

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from sft_jax.models.hf import device_loading
from sft_jax.models.hf.device_loading import Leaf, Source
from sft_jax.models.hf.safetensors_files import read_header, save_tensors

BF16 = ml_dtypes.bfloat16
FLOATS = [np.float32, BF16, np.float16]


def random(shape, dtype=np.float32, seed=0):
  x = np.random.default_rng(seed).standard_normal(shape, np.float32)
  return x.astype(dtype)


@given(
  st.integers(1, 40),
  st.integers(1, 600),
  st.sampled_from(FLOATS),
  st.sampled_from(FLOATS),
)
@settings(max_examples=40, deadline=None)
def test_transposing_is_what_numpy_does(rows, columns, dtype, out_dtype):
  x = random((rows, columns + 3), dtype)[:, :columns]  # Not contiguous.
  for transpose in (True, False):
    want = (x.T if transpose else x).astype(out_dtype)
    out = np.empty(want.shape, out_dtype)
    device_loading.copy_into(out, x, transpose=transpose)
    assert out.tobytes() == want.tobytes()


def leaves(folder, sharding, dtype=np.float32, file_dtype=np.float32):
  """(leaves, what they must be): a stack, experts, a fused part, a vector."""
  L, E, D, F = 5, 2, 8, 12
  tensors, want = {}, {}
  up = random((L, D, F), file_dtype, 1)
  experts = random((L, E, D, F), file_dtype, 2)
  fused = random((L, D, 2 * F), file_dtype, 3)
  norm = random((D,), file_dtype, 4)
  for i in range(L):
    tensors[f"up.{i}"] = up[i].T
    tensors[f"fused.{i}"] = fused[i].T
    for e in range(E):
      tensors[f"expert.{i}.{e}"] = experts[i, e].T
    # Gate and up of each feature side by side, as some models interleave.
    tensors[f"mixed.{i}"] = fused[i]
  tensors["norm"] = norm
  save_tensors(folder / "x.safetensors", tensors)
  found = read_header(folder / "x.safetensors")
  all_, half, odd = slice(None), slice(F, 2 * F), slice(1, None, 2)

  def stack(name, cut, transpose):
    return {
      (i,): Source(found[f"{name}.{i}"], cut, transpose) for i in range(L)
    }

  made = []
  for path, array, sources in (
    ("up", up, stack("up", (all_, all_), True)),
    ("second", fused[:, :, F:], stack("fused", (half, all_), True)),
    ("mixed", fused[:, :, 1::2], stack("mixed", (all_, odd), False)),
    (
      "experts",
      experts,
      {
        (i, e): Source(found[f"expert.{i}.{e}"], (all_, all_), True)
        for i in range(L)
        for e in range(E)
      },
    ),
    ("norm", norm, {(): Source(found["norm"], (all_,), False)}),
  ):
    want[path] = array.astype(dtype)
    spot = sharding(array.ndim) if sharding else None
    made.append(Leaf(path, array.shape, dtype, spot, sources))
  return made, want


def mesh():
  return jax.make_mesh(
    (2, 2),
    ("a", "b"),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[:4],
  )


SHARDINGS = {
  "one device": None,
  "the other device": lambda ndim: jax.sharding.SingleDeviceSharding(
    jax.devices()[1]
  ),
  "both sides": lambda ndim: NamedSharding(
    mesh(), PartitionSpec(*[None] * (ndim - 2), *("a", "b")[-ndim:])
  ),
  "replicated": lambda ndim: NamedSharding(mesh(), PartitionSpec()),
  "the first of two inner axes": lambda ndim: (
    NamedSharding(mesh(), PartitionSpec(*[None] * (ndim > 1), ("a", "b")))
    if ndim < 4
    else NamedSharding(mesh(), PartitionSpec(None, "a"))
  ),
}


@pytest.mark.parametrize("layers", [1, 2, 99])
@pytest.mark.parametrize("where", SHARDINGS)
def test_every_grouping_and_sharding_gives_the_same(
  where, layers, tmp_path, monkeypatch
):
  """As on an accelerator: the host holds so many layers at a time."""
  monkeypatch.setattr(
    device_loading, "_group_bytes", lambda _: layers * 8 * 12 * 4
  )
  made, want = leaves(tmp_path, SHARDINGS[where])
  found = dict(device_loading.load_leaves(made))
  assert found.keys() == want.keys()
  for leaf in made:
    np.testing.assert_array_equal(found[leaf.path], want[leaf.path])
    if leaf.sharding is not None:
      assert found[leaf.path].sharding.is_equivalent_to(
        leaf.sharding, len(leaf.shape)
      )


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("file_dtype", FLOATS)
def test_every_float_becomes_the_parameters_dtype(dtype, file_dtype, tmp_path):
  made, want = leaves(tmp_path, None, dtype, file_dtype)
  for path, array in device_loading.load_leaves(made):
    assert array.dtype == dtype
    assert np.asarray(array).tobytes() == want[path].tobytes()


def test_a_process_reads_the_rows_of_its_own_devices(tmp_path, monkeypatch):
  """Of two processes with half of the last axis each, one reads half."""
  made, want = leaves(tmp_path, SHARDINGS["both sides"])
  (leaf,) = (one for one in made if one.path == "up")
  box = (slice(0, 5), slice(0, 8), slice(6, 12))
  monkeypatch.setattr(device_loading, "_local_boxes", lambda *_: [box])
  read, plain = [], device_loading.Tensor.read

  def counted(tensor, *rows, **choices):
    read.append(plain(tensor, *rows, **choices).nbytes)
    return plain(tensor, *rows, **choices)

  monkeypatch.setattr(device_loading.Tensor, "read", counted)
  with device_loading.ThreadPoolExecutor(1) as pool:
    (group,) = device_loading._groups(pool, [leaf])
    for one in group.reads:
      one.result()
  ((_, array),) = group.host
  np.testing.assert_array_equal(array, want["up"][:, :, 6:])
  assert sum(read) == want["up"].nbytes // 2


def test_groups_are_exchanged_by_one_program(tmp_path, monkeypatch):
  """Rows are read, columns are wanted: as where another process has some."""
  made, want = leaves(tmp_path, SHARDINGS["both sides"])
  rows = NamedSharding(mesh(), PartitionSpec(None, ("a", "b")))
  plan = lambda leaf: device_loading._Plan(rows, leaf.shape)
  monkeypatch.setattr(device_loading, "_plan", plan)
  monkeypatch.setattr(device_loading, "_group_bytes", lambda _: 8 * 12 * 4)
  device_loading._exchange.cache_clear()
  for path, array in device_loading.load_leaves(made[:2]):  # Of one shape.
    np.testing.assert_array_equal(array, want[path])
  found = device_loading._exchange.cache_info()
  assert (found.misses, found.hits) == (1, 2 * 5 - 1)


def test_all_processes_put_the_same_layers_together(tmp_path, monkeypatch):
  """The groups of one that reads less are those of the one that reads most."""
  made, _ = leaves(tmp_path, SHARDINGS["both sides"])
  monkeypatch.setattr(device_loading, "_group_bytes", lambda _: 2 * 8 * 12 * 4)
  box = (slice(0, 5), slice(0, 2), slice(0, 12))
  monkeypatch.setattr(device_loading, "_local_boxes", lambda *_: [box])
  with device_loading.ThreadPoolExecutor(1) as pool:
    groups = [*device_loading._groups(pool, made[:1])]
  assert [(x.start, x.stop) for x in groups] == [(0, 2), (2, 4), (4, 5)]

  Device = namedtuple("Device", "process_index number")

  class Uneven:
    def devices_indices_map(self, shape):
      ends = {(0, 0): (0, 2), (1, 0): (2, 3), (1, 1): (3, 8)}
      return {
        Device(*device): (slice(None), slice(*rows))
        for device, rows in ends.items()
      }

  plan = device_loading._Plan(Uneven(), (5, 8))
  assert device_loading._layer_size(plan) == 6
  assert device_loading._layer_size(plan._replace(sharding=None)) == 8


def test_an_error_while_reading_is_raised_at_once(tmp_path):
  made, _ = leaves(tmp_path, None)
  os.truncate(tmp_path / "x.safetensors", 2_000)
  with pytest.raises(ValueError, match=r"x\.safetensors: .*expected"):
    dict(device_loading.load_leaves(made))


def test_on_a_cpu_what_was_read_is_the_parameter(tmp_path):
  """No copy: the memory that the file was read into is the array's."""
  made, _ = leaves(tmp_path, None)
  with device_loading.ThreadPoolExecutor(1) as pool:
    (group,) = device_loading._groups(pool, made[:1])
    for one in group.reads:
      one.result()
    array = device_loading._put(group, None)
  assert array.unsafe_buffer_pointer() == group.host[0][1].ctypes.data
