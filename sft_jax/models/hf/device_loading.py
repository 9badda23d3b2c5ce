"""Tensors of files to parameters on devices, a few layers at a time.

    model.layers.{0,1,2,..}.mlp.up_proj.weight [F, D], each its own tensor
      -> layers/mlp/up/kernel [L, D, F], sharded

Threads read, transpose and cast the next layers into host memory while the
last ones go to their devices. Beside what the threads have just read, the host
holds two groups of layers of `_GROUP_BYTES` each; the device never holds a
parameter twice. Where the host is the device, what was read becomes the
parameter and nothing is copied.

Of several processes each reads what its own devices hold, and no more than
that. Where this is columns of a file, which are far apart there, processes read
as many rows instead, and the devices exchange them, all to all: then a group,
or a table without layers, is there twice.
"""

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from itertools import chain, pairwise, product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sft_jax.common.buckets import ranges
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
    tensor, shape, cut = self.tensor, self.tensor.shape, self.cut
    if not shape:
      out[...] = tensor.read()
      return
    if isinstance(tensor, Decoded) and tensor.turned:
      shape, cut = shape[::-1], cut[::-1]
    local = local[::-1] if self.by_columns else local
    lead, *cuts = cut
    if isinstance(lead, int):
      lead, local = slice(lead, lead + 1), (slice(0, 1), *local)
    axes = zip(shape, (lead, *cuts), local, strict=True)
    rows, *columns = (range(n)[cut][one] for n, cut, one in axes)
    # Rows are contiguous in the file; what is not wanted of them is dropped.
    # Some at a time: memory holds no second copy of a large tensor.
    row_bytes = tensor.num_bytes // max(shape[0], 1)
    step = max(1, _CHUNK_BYTES // max(row_bytes * rows.step, 1))
    if isinstance(tensor, Decoded):
      step = max(len(rows), 1)  # Once: what it needs beside codes is small.
      read = tensor.read_turned if tensor.turned else tensor.read
    else:
      tensor.fetch(rows, *columns)
      read = partial(tensor.read, fetched=True)
    for first in range(0, len(rows), step):
      some = rows[first : first + step]
      x = read(some.start, some.stop)
      _check_finite(x, tensor)
      rest = (slice(one.start, one.stop, one.step) for one in columns)
      x = x[(slice(None, None, some.step), *rest)]
      at = slice(first, first + len(some))
      part = out[..., at] if self.by_columns else out[at]
      if x.ndim > out.ndim:
        part, x = out, x[0]
      copy_into(part, x, transpose=self.by_columns)

  @property
  def by_columns(self) -> bool:
    """Whether what is read row by row is columns of the parameter."""
    turned = isinstance(self.tensor, Decoded) and self.tensor.turned
    return self.transpose != turned


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
  stop: int
  plan: "_Plan"
  host: list[tuple[Slices, np.ndarray]]  # Boxes; of a stack, of these layers.
  reads: list[Future]


class _Plan(NamedTuple):
  """How a leaf is read: of this shape, which may be longer, and sharded so."""

  sharding: Any
  shape: tuple[int, ...]


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
        if group.stop == group.leaf.shape[0]:
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
    plan, n = _plan(leaf), leaf.stacked
    boxes = _local_boxes(plan.sharding, plan.shape)
    step = leaf.shape[0]
    if n:
      size = _layer_size(plan) * np.dtype(leaf.dtype).itemsize
      step = max(1, _group_bytes(leaf.sharding) // max(size, 1))
    for start in range(0, leaf.shape[0], step):
      stop = min(start + step, leaf.shape[0])
      host, reads = [], []
      for box in boxes:
        layers = slice(start, stop)
        here = (layers, *box[1:]) if n else box
        array = _aligned(_sizes(here), leaf.dtype)
        host.append(((slice(0, stop - start), *box[1:]) if n else box, array))
        # A plan may be longer than what there is.
        ends = zip(here[n:], leaf.shape[n:], strict=True)
        real = tuple(slice(one.start, min(one.stop, m)) for one, m in ends)
        for place in np.ndindex(_sizes(here[:n])):
          at = (i + one.start for i, one in zip(place, here[:n], strict=True))
          own = array[(*place, *(slice(max(x, 0)) for x in _sizes(real)), ...)]
          source = leaf.sources[tuple(at)]
          reads.append(pool.submit(source.read_into, own, real))
      yield _Group(leaf, start, stop, plan, host, reads)


def _sizes(box: Slices) -> tuple[int, ...]:
  return tuple(one.stop - one.start for one in box)


def _plan(leaf: Leaf) -> _Plan:
  """Rows where a process's devices hold columns of a file."""
  where, n = leaf.sharding, leaf.stacked
  plain = _Plan(where, leaf.shape)
  source = next(iter(leaf.sources.values()))
  axes = [*range(n, len(leaf.shape))][:: -1 if source.by_columns else 1]
  if not isinstance(where, NamedSharding) or len(axes) < 2:
    return plain
  # Of what is decoded rows come whole.
  decoded = isinstance(source.tensor, Decoded)
  to, whole = (axes[0], axes[1:]) if decoded else (axes[-2], axes[-1:])
  held = _held(where, leaf.shape)
  parts = ((boxes, i) for boxes in held for i in whole)
  if all(_cover(boxes, i) == [(0, leaf.shape[i])] for boxes, i in parts):
    return plain
  spec: list[Any] = [*where.spec] + [None] * (len(leaf.shape) - len(where.spec))
  names = [spec[i] for i in (to, *whole) if spec[i] is not None]
  names = [x for one in names for x in ([one] if isinstance(one, str) else one)]
  for i in whole:
    spec[i] = None
  spec[to] = tuple(names)
  count = math.prod(where.mesh.shape[name] for name in names)
  shape = [*leaf.shape]
  shape[to] = -(-shape[to] // count) * count
  spread = NamedSharding(where.mesh, PartitionSpec(*spec))
  return _Plan(spread, tuple(shape))


def _held(sharding: Any, shape: tuple[int, ...]) -> list[list[Slices]]:
  """What the devices of each process hold."""
  held: dict[int, list[Slices]] = {}
  for device, box in sharding.devices_indices_map(shape).items():
    held.setdefault(device.process_index, []).append(_ends(box, shape))
  return [*held.values()]


def _layer_size(plan: _Plan) -> int:
  """The most elements of a layer that a process reads.

  All find the same, whatever they read themselves: groups are put together.
  """
  sharding, shape = plan.sharding, plan.shape
  whole = [tuple(slice(0, n) for n in shape)]
  alike = sharding is None or not all(shape)
  held = [whole] if alike else _held(sharding, shape)
  every = (_joined(boxes, shape) for boxes in held)
  return max(sum(math.prod(_sizes(x[1:])) for x in boxes) for boxes in every)


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


def _ends(box: Slices, shape: tuple[int, ...]) -> Slices:
  """The same slices, with their ends."""
  pairs = zip(box, shape, strict=True)
  return tuple(slice(*one.indices(n)[:2]) for one, n in pairs)


def _cover(boxes: list[Slices], axis: int) -> list[tuple[int, int]]:
  """What boxes hold of an axis."""
  return ranges.merged((box[axis].start, box[axis].stop) for box in boxes)


def _local_boxes(sharding: Any, shape: tuple[int, ...]) -> list[Slices]:
  """What this process's devices hold: neighbors as one, others apart."""
  if sharding is None or not all(shape):
    return [tuple(slice(0, n) for n in shape)]
  found = sharding.addressable_devices_indices_map(shape).values()
  return _joined([_ends(box, shape) for box in found], shape)


def _joined(boxes: list[Slices], shape: tuple[int, ...]) -> list[Slices]:
  axes = ([slice(*x) for x in _cover(boxes, i)] for i in range(len(shape)))
  return [*product(*axes)]


def _put(group: _Group, array: jax.Array | None) -> jax.Array:
  """Puts a group's layers into the leaf that is being assembled."""
  leaf, sharding, (read, shape) = group.leaf, group.leaf.sharding, group.plan
  part = leaf.stacked and group.stop - group.start < leaf.shape[0]
  if part:
    shape = (group.stop - group.start, *shape[1:])
    # A group of layers need not divide as all of them do.
    read, sharding = (
      NamedSharding(x.mesh, PartitionSpec(None, *x.spec[1:]))
      if isinstance(x, NamedSharding)
      else x
      for x in (read, sharding)
    )
  layers = _to_devices(group.host, shape, read)
  if read is not sharding and read != sharding:
    sizes = (group.stop - group.start if part else leaf.shape[0],)
    layers = _exchange((*sizes, *leaf.shape[1:]), sharding)(layers)
  if not part:
    return layers
  if array is None:
    array = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
  return _write_layers(array, layers, group.start)


@cache
def _exchange(sizes: tuple[int, ...], sharding: Any) -> Any:
  """What cuts an array to its sizes, sharded so: groups share a program."""
  cut = tuple(slice(0, n) for n in sizes)
  return jax.jit(lambda x: x[cut], out_shardings=sharding)


@partial(jax.jit, donate_argnums=0)
def _write_layers(array: jax.Array, layers: jax.Array, start: int) -> jax.Array:
  """Replaces layers in place: the memory of `array` is given back to it."""
  return jax.lax.dynamic_update_slice_in_dim(array, layers, start, axis=0)


def _to_devices(
  host: list[tuple[Slices, np.ndarray]], shape: tuple[int, ...], sharding: Any
) -> jax.Array:
  """An array of this global shape, of which the host holds these boxes."""
  if sharding is None:
    return jax.device_put(host[0][1])

  def part(index: Slices | None) -> np.ndarray:
    assert index is not None  # Only where a shape is not known.
    wanted = _ends(index, shape)
    box, array = next(
      one
      for one in host
      if all(
        own.start <= x.start and x.stop <= own.stop
        for own, x in zip(one[0], wanted, strict=True)
      )
    )
    pairs = zip(wanted, box, strict=True)
    return array[
      tuple(slice(x.start - own.start, x.stop - own.start) for x, own in pairs)
    ]

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
