"""Know before you start: what a run needs and how fast it can be, by kind.

outline --compile--> Plan(memory by kind, FLOPs, collectives, time bound)
alternatives(config) -> what to change first where a plan does not fit
largest_batch(fits) -> how far a batch can grow
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from sft_jax.common import compile_cache, sharding, trees
from sft_jax.common import flops as fit
from sft_jax.common.machines import Machine
from sft_jax.models import remat as remat_ladder
from sft_jax.training.build.abstract import Outline
from sft_jax.training.build.data import Config
from sft_jax.training.planning import cost_model, step_time
from sft_jax.training.planning.cost_model import Traffic, collectives


class Memory(NamedTuple):
  """Bytes per device. All but the last two are known from shapes alone.

  `gradients` are those of the trained parameters, and their sum over
  micro-batches; `activations` what the backward pass of a micro-batch keeps, if
  devices divide it as they divide the rows; `temporary` the rest of what the
  compiler reserves, at least 0.
  """

  trained: int
  frozen: int
  optimizer: int
  gradients: int
  activations: int
  temporary: int
  total: int


class Times(NamedTuple):
  """Seconds that a step takes at least, by what bounds it; None: not known."""

  compute: float  # Executed matrix products, recomputed ones too, at the peak.
  # The state read and written, the weights read for each pass over the layers,
  # gradients and activations written and read.
  memory: float | None
  network: float | None  # Received from others of its slice or host.
  slices: float | None = 0.0  # From other slices, by the data center.

  @property
  def step(self) -> float:
    """All of them at once, as if they overlapped perfectly."""
    return max(x for x in self if x is not None)

  @property
  def bound(self) -> str:
    return max(self._fields, key=lambda name: getattr(self, name) or 0.0)


class Plan(NamedTuple):
  """What a compiled step says."""

  machine: Machine
  memory: Memory
  fits: bool  # Whether the total is within the chip's memory.
  flops: float  # That a step executes at least, on all devices.
  model_flops: float  # Those that the model asks for.
  traffic: Mapping[str, Traffic] = {}  # By kind; empty if not compiled.
  times: Times | None = None  # Lower bounds; None if not compiled.
  text: str = ""  # The compiled program, '' if it did not compile.
  # The step's time by operations, for TPUs whose compiler gives cycles,
  # compiled with full effort; None otherwise.
  predicted: step_time.Prediction | None = None


def plan(
  outline: Outline,
  machine: Machine,
  *,
  model_flops: float = 0.0,
  loss_chunks: int = 1,
  quick: bool = False,
) -> Plan:
  """Compiles the step for the machine; runs nothing.

  A TPU's compiler refuses what does not fit, and says how much it would need:
  the plan then has that total, and no program. `model_flops` of a step bound
  what is executed where kernels hide theirs; `quick` has a TPU's compiler
  optimize less, in a fifth of the time: temporaries are some 10 % off.
  """
  step = outline.step.train_step
  executed = cost_model.matmul_flops(step, outline.state, outline.batch)
  flops = max(executed, model_flops)
  parts = known_bytes(outline.step.loss_fn, outline.state, outline.batch)
  try:
    kind = machine.devices[0].device_kind
    options = compile_cache.compiler_options(kind) | (_QUICK if quick else {})
    compiled = outline.lower().compile(options or None)
  except jax.errors.JaxRuntimeError as error:
    total = needed(str(error))
    if total is None:
      raise
    memory = _memory(parts, sum(parts[:3]) + total)
    return Plan(machine, memory, False, flops, model_flops)
  text = compiled.as_text()
  assert text is not None  # Every backend prints its programs.
  memory = _memory(parts, fit.program(compiled).memory)
  traffic = collectives(text)
  times = bounds(outline, machine, memory, flops, traffic)
  fits = memory.total <= machine.chip.memory
  predicted = None
  if machine.chip.name in step_time.CLOCKS and not quick:
    predicted = step_time.predict(text, machine.chip, loss_chunks=loss_chunks)
  known = (traffic, times, text, predicted)
  return Plan(machine, memory, fits, flops, model_flops, *known)


# JAX passes it on to XLA; a CPU's compiler does not look at it.
_QUICK: Any = {"exec_time_optimization_effort": -1.0}


def needed(message: str) -> int | None:
  """The bytes of temporaries that a TPU's compiler asks for in vain.

  >>> needed('... HLO temporaries (37.50G) exceeds available HBM (15.75G).')
  40265318400
  """
  found = re.search(r"temporaries \(([\d.]+)([KMGT])\) exceeds", message)
  if found is None:
    return None
  return int(float(found[1]) * 1024 ** (" KMGT".index(found[2])))


def known_bytes(
  loss_fn: Callable[..., Any], state: Any, batch: Any
) -> tuple[int, int, int, int, int]:
  """(trained, frozen, optimizer, gradients, activations) of `Memory`. `batch`:
  shapes with shardings, [A, B / A, T]: A micro-batches."""
  parts = batch.tokens.shape[0]
  gradients = _shard_bytes(state.params)
  if parts > 1:  # A micro-batch's own, and the float32 sums.
    gradients += _shard_bytes(state.params, itemsize=4)

  def resized(times: int) -> Any:
    size = lambda x: (times * x.shape[1], *x.shape[2:])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(size(x), x.dtype), batch)

  kept = cost_model.kept_bytes(
    lambda params, batch, rest: loss_fn(trees.merge(params, rest), batch).nats,
    *(state.params, resized(1), resized(2), state.frozen),
  )
  share = _shard_bytes(batch.tokens) / (batch.tokens.size * 4)
  held = (state.params, state.frozen, state.opt_state)
  trained, frozen, optimizer = map(_shard_bytes, held)
  return trained, frozen, optimizer, gradients, int(kept * share)


def _memory(parts: tuple[int, int, int, int, int], total: int) -> Memory:
  return Memory(*parts, temporary=max(0, total - sum(parts)), total=total)


def _shard_bytes(tree: Any, itemsize: int | None = None) -> int:
  """Bytes of one device's part of a tree of shapes with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * (itemsize or x.dtype.itemsize)
    for x in jax.tree.leaves(tree)
  )


def bounds(
  outline: Outline,
  machine: Machine,
  memory: Memory,
  flops: float,
  traffic: Mapping[str, Traffic],
) -> Times:
  chip, mesh = machine.chip, outline.mesh
  size = outline.dtype.itemsize
  # Each device multiplies by whole weights, but for what these axes divide.
  weights = size * sum(
    math.prod(x.shape) / sharding.size(mesh, {"expert", "tensor"} & {*x.spec})
    for x in sharding.placements(outline.params, mesh)
  )
  passes = 2 * outline.batch.tokens.shape[0]
  moved = 2 * (memory.trained + memory.optimizer + memory.gradients)
  moved += passes * (weights + memory.activations)
  across = traffic.get(cost_model.ACROSS, cost_model.Traffic(0, 0, True)).bytes
  received = sum(one.bytes for one in traffic.values()) - across
  return Times(
    flops / mesh.size / chip.flops,
    moved / chip.bandwidth if chip.bandwidth else None,
    received / chip.links if chip.links else None,
    across / chip.network if chip.network else 0.0 if not across else None,
  )


# -- What to change -----------------------------------------------------------


class Change(NamedTuple):
  """A change of the config: the keys that it sets."""

  keys: Mapping[str, Any]

  @property
  def name(self) -> str:
    return ", ".join(f"{key}={value}" for key, value in self.keys.items())


def alternatives(config: Config, mesh: Mapping[str, int]) -> Iterator[Change]:
  """What to try where a run does not fit, the cheapest first. Recompute more (a
  step takes up to a third longer), cut the batch in more parts, divide the
  state over copies of the model (more is sent), and then all of these."""
  ladder = remat_ladder.LEVELS
  stronger = ladder[ladder.index(config.model.remat) + 1 :]
  copies = config.accum_steps * math.prod(mesh[a] for a in sharding.ROWS)
  rows = config.batch_size // copies
  divisors = [n for n in range(2, rows + 1) if rows % n == 0]
  parts = [config.accum_steps * n for n in divisors]
  ways = (
    [{"model.remat": remat} for remat in stronger],
    [{"accum_steps": n} for n in dict.fromkeys(parts[:1] + parts[-1:])],
    [{"mesh.data": 1, "mesh.fsdp": -1}] if mesh["data"] > 1 else [],
  )
  everything: dict[str, Any] = {}
  for way in ways:
    yield from map(Change, way)
    everything |= way[-1] if way else {}
  if len(everything) > 1:
    yield Change(everything)


def changed(config: Config, keys: Mapping[str, Any]) -> Config:
  """A copy of the config with these keys, as on the command line."""
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(dict(keys))
  return config


def largest_batch(
  total: Callable[[int], float], limit: float, *, most: int = 1 << 20
) -> int:
  """The largest n in [1, most] with total(n) <= limit; 0 if there is none.

  `total` is the bytes that a batch of n needs, nearly a straight line, so a
  line through what was tried guesses what to try next: four trials as a rule.
  Every third halves what is left, whatever the line says.
  """
  tried = {n: total(n) for n in (1, 2)}
  while True:
    low = max((n for n, size in tried.items() if size <= limit), default=0)
    above = [n for n, size in tried.items() if size > limit]
    high = min(above, default=most + 1)
    if high - low == 1:
      return low
    a, b = sorted(tried, key=lambda n: abs(tried[n] - limit))[:2]
    slope = (tried[b] - tried[a]) / (b - a)
    guess = 2 * low if slope <= 0 else a + (limit - tried[a]) // slope
    if len(tried) % 3 == 2:
      guess = min((low + high) // 2, 8 * low)
    n = int(min(max(guess, low + 1), high - 1))
    tried[n] = total(n)
