"""Machines by name, here or elsewhere: what a program can be compiled for.

    v5e:2x4     a slice of TPU chips, by the compiler that TPUs use
    v5e:2x4*2   two such slices, joined by the data center's network
    cpu:8       fake devices on this machine's processor
    gpu-80GB:8  the CPU's program held against a GPU's limits: an estimate

A TPU's compiler (`libtpu`) runs anywhere and needs no TPU.
"""

import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from sft_jax.common import flops


class Machine(NamedTuple):
  """Devices that a program is compiled for.

  Attributes:
    name: as asked for, or the kind of device that is here.
    devices: what a mesh is made of; they may be elsewhere.
    estimate: why its figures are not the compiler's own; '' where they are.
  """

  name: str
  devices: Sequence[Any]
  chip: flops.Chip
  estimate: str = ""

  @property
  def published(self) -> bool:
    """The peaks are the vendor's, and not measured just now."""
    return bool(self.chip.source)

  @property
  def peak_known(self) -> bool:
    """A share of the peak says something: not on an unknown accelerator."""
    return not self.chip.name.startswith(_UNKNOWN)


_MEASURED, _UNKNOWN = "this processor", "unknown"
_TPU = re.compile(r"(v\d\w*|tpu7x):\d+(x\d+)+(\*[1-9]\d*)?")
_OTHER = re.compile(r"(cpu|gpu-(\d+)GB)(?::([1-9]\d*))?")
# By their memory in GB; of several the fastest.
_GPUS = {"40": "A100-SXM4-40GB", "80": "H100", "94": "H100 NVL", "141": "H200"}
_GPU_ESTIMATE = (
  "an estimate: compiled for the CPU, which computes bfloat16 in float32, so "
  "that temporaries of a bfloat16 model come out up to twice too large"
)
# What libtpu asks the cloud's metadata server otherwise, and waits for.
_WITHOUT_A_TPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  # A lock keeps two processes from one TPU; compiling needs none.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def prepare(name: str) -> None:
  """Has JAX start on the CPU with as many fake devices as `name` wants.

  To be called before JAX starts; that it has is an error. '' changes nothing.
  """
  if name:
    jax.config.update("jax_platforms", "cpu")
    _, count = _parse(name)
    jax.config.update("jax_num_cpu_devices", count)


def _parse(name: str) -> tuple[str, int]:
  """('80', 8) of 'gpu-80GB:8'; ('', 1) of 'cpu'; ('tpu', 1) of a slice."""
  if _TPU.fullmatch(name):
    return "tpu", 1
  found = _OTHER.fullmatch(name)
  if found is None:
    raise ValueError(
      f"topology: got {name!r}, expected a TPU slice (v5e:2x4, v5p:4x4x4*2), "
      "cpu, cpu:8, gpu-80GB or gpu-80GB:8. Write it like one of these."
    )
  return found.group(2) or "", int(found.group(3) or 1)


def find_machine(name: str) -> Machine:
  """The machine of this name; '' is what JAX sees here.

  Raises ValueError: an unknown name; a TPU without libtpu; more CPU devices
  than JAX has started with.
  """
  if not name:
    # Of several processes each has a processor of its own.
    device, local = jax.devices()[0], jax.local_devices()
    kind = device.device_kind
    if device.platform == "cpu":
      chip = _processor(local[0], len(local))
    elif (chip := flops.chip(kind)) is None:
      # Nothing is published of it: its speed is measured, for estimates.
      memory = (local[0].memory_stats() or {}).get("bytes_limit", math.inf)
      speed = flops.flops_per_second(local[0])
      chip = flops.Chip(f"{_UNKNOWN} accelerator {kind!r}", speed, memory)
    return Machine(kind, jax.devices(), chip)
  kind, count = _parse(name)
  if kind == "tpu":
    return _tpu(name)
  if not kind:
    devices = _cpus(count)
    return Machine(name, devices, _processor(devices[0], count))
  if kind not in _GPUS:
    known = [f"gpu-{size}GB" for size in _GPUS]
    raise ValueError(
      f"topology: got {name!r}, expected one of {known}. Take a smaller one."
    )
  return Machine(name, _cpus(count), flops.CHIPS[_GPUS[kind]], _GPU_ESTIMATE)


def _processor(device: Any, count: int) -> flops.Chip:
  """This machine's processor, its speed measured, its memory shared."""
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  speed = flops.flops_per_second(device)
  return flops.Chip(_MEASURED, speed / count, memory / count)


def _cpus(count: int) -> Sequence[Any]:
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise ValueError(
      f"topology: got {count} CPU devices, expected at most {len(devices)}, "
      "which JAX has started with. Call topology.prepare before it starts."
    )
  return devices[:count]


def _tpu(name: str) -> Machine:
  for key, value in _WITHOUT_A_TPU.items():
    os.environ.setdefault(key, value)
  try:
    slice_, _, count = name.partition("*")
    several = {"num_slices": int(count)} if count else {}
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=slice_, **several
    )
  except (RuntimeError, ValueError) as error:
    raise ValueError(
      f"topology: got {name!r}, expected a slice that libtpu knows, and libtpu "
      f"({error}). Install sft_jax[tpu]; write it like v5e:2x4 or v5p:2x2x1."
    ) from error
  kind = found.devices[0].device_kind
  chip = flops.chip(kind)
  if chip is None:
    raise ValueError(
      f"topology: {name} has devices {kind!r}, expected one of "
      f"{sorted(flops.CHIPS)}. Add its peaks to sft_jax/common/flops.py."
    )
  return Machine(name, found.devices, chip)
