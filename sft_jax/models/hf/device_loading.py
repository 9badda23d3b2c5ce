"""Tensors of files to parameters on devices, a few layers at a time.

    model.layers.{0,1,2,..}.mlp.up_proj.weight [F, D], each its own tensor
      -> layers/mlp/up/kernel [L, D, F], sharded

Threads read, transpose and cast the next layers into host memory while the
last ones go to their devices. Beside what the threads have just read, the host
holds two groups of layers of `_GROUP_BYTES` each; the device never holds a
parameter twice. Where the host is the device, what was read becomes the
parameter and nothing is copied.
"""

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sft_jax.models.hf.dequantize import Decoded
from sft_jax.models.hf.safetensors_files import Tensor

_GROUP_BYTES = 128 << 20
# Of a tensor, read at a time.
_CHUNK_BYTES = 2 << 20
_WORKERS = min(8, os.cpu_count() or 1)

Slices = tuple[slice, ...]


class Source(NamedTuple):
  """What fills one layer of a parameter: a tensor, or a part of it.

  Attributes:
    cut: what of the tensor it is, one slice per axis; or the number of an
      expert in it.
    transpose: [out, in] in the file, [in, out] in the parameter.
  """

  tensor: Tensor | Decoded
  cut: tuple[Any, ...]
  transpose: bool

  def read_into(self, out: np.ndarray, local: Slices) -> None:
    """Fills `out` with the part `local` of the layer, in the dtype of `out`."""
    if not self.tensor.shape:
      out[...] = self.tensor.read()
      return
    local = local[::-1] if self.transpose else local
    lead, *cuts = self.cut
    if isinstance(lead, int):
      lead, local = slice(lead, lead + 1), (slice(0, 1), *local)
    axes = zip(self.tensor.shape, (lead, *cuts), local, strict=True)
    rows, *columns = (range(n)[cut][one] for n, cut, one in axes)
    # Rows are contiguous in the file; what is not wanted of them is dropped.
    # Some at a time: memory holds no second copy of a large tensor.
    row_bytes = self.tensor.num_bytes // max(self.tensor.shape[0], 1)
    step = max(1, _CHUNK_BYTES // max(row_bytes * rows.step, 1))
    if isinstance(self.tensor, Decoded):
      step = max(len(rows), 1)  # It is decoded as a whole.
    for first in range(0, max(len(rows), 1), step):
      some = rows[first : first + step]
      x = self.tensor.read(some.start, some.stop)
      _check_finite(x, self.tensor)
      rest = (slice(one.start, one.stop, one.step) for one in columns)
      x = x[(slice(None, None, some.step), *rest)]
      at = slice(first, first + len(some))
      part = out[..., at] if self.transpose else out[at]
      if x.ndim > out.ndim:
        part, x = out, x[0]
      copy_into(part, x, transpose=self.transpose)


def _check_finite(x: np.ndarray, tensor: Tensor | Decoded) -> None:
  """Raises ValueError where a number has the exponent of NaN and infinity.

  By its bits, which is one pass over what is in the cache: of bfloat16 NumPy
  would call a function per number.
  """
  kind = jnp.finfo(x.dtype)
  bits = x.view({16: np.uint16, 32: np.uint32}[kind.bits])
  exponent = ((1 << kind.nexp) - 1) << kind.nmant
  if x.size and int(np.max(bits & bits.dtype.type(exponent))) >= exponent:
    raise ValueError(
      f"{tensor.path}: {tensor.name} holds NaN or infinite numbers; expected "
      "finite weights. Download it again, or train from another checkpoint."
    )


class Leaf(NamedTuple):
  """A parameter to load.

  Attributes:
    sharding: where to; None is the default device.
    sources: of each place on the axes that the files have not: (layer,),
      (layer, expert), or () for a parameter that is one tensor.
  """

  path: str
  shape: tuple[int, ...]
  dtype: Any
  sharding: Any
  sources: Mapping[tuple[int, ...], Source]

  @property
  def stacked(self) -> int:
    """How many axes the files have not."""
    return len(next(iter(self.sources)))


class _Group(NamedTuple):
  """Layers `start` onward of a leaf, on their way through the host."""

  leaf: Leaf
  start: int
  host: np.ndarray  # The part `local` of the leaf, but for its first axis.
  local: Slices
  reads: list[Future]


def load_leaves(leaves: Iterable[Leaf]) -> Iterator[tuple[str, jax.Array]]:
  """Yields (path, array) of each leaf, read and put on its devices.

  A process reads the rows that its own devices hold.
  """
  with ThreadPoolExecutor(_WORKERS) as pool:
    try:
      array = None
      # Each group is asked for before the last one is handed out.
      for group, _ in pairwise(chain(_groups(pool, leaves), [None])):
        assert group is not None  # Which is the end alone.
        for read in group.reads:
          read.result()
        array = _put(group, array)
        done = group.start + len(group.host) == group.leaf.shape[0]
        if done or not group.leaf.stacked:
          yield group.leaf.path, array
          array = None
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _groups(
  pool: ThreadPoolExecutor, leaves: Iterable[Leaf]
) -> Iterator[_Group]:
  """Starts the reading of each group of layers, as many as fit in one."""
  for leaf in leaves:
    local, n = _local_slice(leaf.sharding, leaf.shape), leaf.stacked
    if n:
      part = tuple(one.stop - one.start for one in local[1:])
      size = math.prod(part) * np.dtype(leaf.dtype).itemsize
      step = max(1, _group_bytes(leaf.sharding) // max(size, 1))
    else:
      step = leaf.shape[0]
    for start in range(0, leaf.shape[0], step):
      if n:
        stop = min(start + step, leaf.shape[0])
        local = (slice(start, stop), *local[1:])
      shape = tuple(one.stop - one.start for one in local)
      host = _aligned(shape, leaf.dtype)
      reads = []
      for place in np.ndindex(shape[:n]):
        at = (i + one.start for i, one in zip(place, local[:n], strict=True))
        source = leaf.sources[tuple(at)]
        own = host[(*place, ...)]  # A view, of a scalar too.
        reads.append(pool.submit(source.read_into, own, local[n:]))
      yield _Group(leaf, start, host, local, reads)


def _group_bytes(sharding: Any) -> int:
  """The memory for layers on their way; a CPU has them where they stay."""
  devices = sharding.device_set if sharding else jax.devices()
  on_cpu = next(iter(devices)).platform == "cpu"
  return sys.maxsize if on_cpu else _GROUP_BYTES


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """Memory that XLA's CPU backend takes over as it is: 64 bytes aligned."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)


def _local_slice(sharding: Any, shape: tuple[int, ...]) -> Slices:
  """The smallest slice that holds all that this process's devices hold."""
  if sharding is None:
    return tuple(slice(0, n) for n in shape)
  ends = [
    [one.indices(n)[:2] for one, n in zip(local, shape, strict=True)]
    for local in sharding.addressable_devices_indices_map(shape).values()
  ]
  return tuple(
    slice(min(a for a, _ in axis), max(b for _, b in axis))
    for axis in zip(*ends, strict=True)
  )


def _put(group: _Group, array: jax.Array | None) -> jax.Array:
  """Puts a group's layers into the leaf that is being assembled."""
  leaf, local, sharding = group.leaf, group.local, group.leaf.sharding
  if not leaf.stacked or len(group.host) == leaf.shape[0]:
    return _to_devices(group.host, leaf.shape, local, sharding)
  if isinstance(sharding, NamedSharding):
    # A group of layers need not divide as all of them do.
    spec = PartitionSpec(None, *sharding.spec[1:])
    sharding = NamedSharding(sharding.mesh, spec)
  shape = (len(group.host), *leaf.shape[1:])
  local = (slice(0, len(group.host)), *local[1:])
  layers = _to_devices(group.host, shape, local, sharding)
  if array is None:
    array = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
  return _write_layers(array, layers, group.start)


@partial(jax.jit, donate_argnums=0)
def _write_layers(array: jax.Array, layers: jax.Array, start: int) -> jax.Array:
  """Replaces layers in place: the memory of `array` is given back to it."""
  return jax.lax.dynamic_update_slice_in_dim(array, layers, start, axis=0)


def _to_devices(
  host: np.ndarray, shape: tuple[int, ...], local: Slices, sharding: Any
) -> jax.Array:
  """An array of this global shape, of which the host holds the part `local`."""
  if sharding is None:
    return jax.device_put(host)

  def part(index: Slices | None) -> np.ndarray:
    assert index is not None  # Only where a shape is not known.
    bounds = zip(index, shape, local, strict=True)
    ends = ((one.indices(n), own.start) for one, n, own in bounds)
    return host[tuple(slice(a - at, b - at) for (a, b, _), at in ends)]

  return jax.make_array_from_callback(shape, sharding, part)


def copy_into(out: np.ndarray, x: np.ndarray, *, transpose: bool) -> None:
  """out[...] = x or x.T, cast; the latter several times as fast as NumPy.

  NumPy would visit a cache line of the target once per element. Sixteen rows
  at a time fill it while it is in memory, in a scratch that stays in the cache.
  Bits are moved as plain integers: NumPy moves a bfloat16 by a function call.
  """
  if not transpose or x.ndim > 2:
    out[...] = x.T if transpose else x
    return
  bits = {2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
  scratch = np.empty((min(512, len(out)), len(x)), bits)
  for first in range(0, len(out), 512):
    columns = x[:, first : first + 512].view(bits)
    part = scratch[: columns.shape[1]]
    for start in range(0, len(x), 16):
      part[:, start : start + 16] = columns[start : start + 16].T
    out[first : first + 512] = part.view(x.dtype)
