"""The time of a step on a TPU, predicted from its compiler's own estimates.

Most instructions of libtpu's optimized, scheduled program carry the compiler's
`estimated_cycles`. Loops are multiplied out and fusions counted once:

    %fusion.7 = bf16[8192,4096] fusion(...), "estimated_cycles":"1200000"
    in a loop of 32 trips, at 1.75 GHz -> 21.9 ms of products

What carries no estimate is filled in, and marked as such:

    Pallas kernels        FLOPs of the blocks that they compute, at a share of
                          the peak (`KERNEL_SHARE`)
    collectives           bytes received at the links' bandwidth; one that is
                          started early costs what the schedule does not hide
    asynchronous copies   the same, at the memory's bandwidth
    gathers, scatters...  bytes read and written at the memory's bandwidth

The estimates know no contention; how far to trust them: docs/planning.md.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sft_jax.common.flops import Chip
from sft_jax.training.planning import cost_model

# Cycles per second at which the published peak is reached: 262,144 FLOPs a
# cycle on v4 and v5p (two cores of four 128 x 128 units), 131,072 on v5e,
# 524,288 on v6e.
CLOCKS = {
  "TPU v4": 1.05e9,
  "TPU v5e": 1.5e9,
  "TPU v5p": 1.75e9,
  "TPU v6e": 1.75e9,
}
# Of the peak, over the blocks that splash attention computes: from the bundles
# of its kernels, 50 to 87 % on v5e and v5p, 19 to 35 % on v6e.
KERNEL_SHARE = {"TPU v6e": 0.35}

# The first that an operation's scope matches names its part of the model.
_PARTS = {
  "attention kernel": r"splash|flash_attention|attention/vmap",
  "optimizer": r"optimizer|adam|optax|global_norm|clip_by|apply_updates",
  "loss head": r"loss_head",
  "LoRA": r"_adapted|lora",
  "norms": r"_norm\b|norm/|_norm\.|rms_norm",
  "attention projections": r"attn/(q|k|v|o|qkv)\b",
  "experts": r"/moe\b|expert",
  "MLP": r"/mlp",
  "rope and layouts": r"/attn|attention|rope",
  "embedding": r"embed",
  "stacking of layers": r"layers",
}
_PASSES = {
  "recompute": r"rematted_computation|/remat/",
  "backward": r"transpose\(",
  "forward": r"jvp",
}
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("after-all", "partition-id", "replica-id", "opt-barrier", "domain"),
  *("add-dependency", "async-update"),
}
_PRODUCTS = ("convolution", "dot")


class Operation(NamedTuple):
  """One instruction of the program, all its runs in a step."""

  name: str  # The compiler's.
  seconds: float  # Of a step.
  times: int  # How often it runs.
  # 'products', 'kernels', 'collectives', 'copies' (what the schedule does not
  # hide of the latter two), 'moves' (guessed by bytes) or 'others'.
  kind: str
  part: str  # Of the model, such as 'MLP'.
  phase: str  # 'forward', 'recompute', 'backward' or 'outside'.
  source: str  # 'file.py:line' of ours, '' where the program does not say.
  flops: float  # Of its matrix products, or of a kernel's blocks.


class Prediction(NamedTuple):
  operations: tuple[Operation, ...]  # The dearest first.
  links: float  # Seconds that the links are busy, hidden or not.
  notes: tuple[str, ...]  # What was assumed, a sentence each.

  @property
  def seconds(self) -> float:
    return sum(one.seconds for one in self.operations)

  def by(self, *fields: str) -> dict[tuple[str, ...], float]:
    """Seconds summed by these fields of the operations, the dearest first."""
    sums: dict[tuple[str, ...], float] = defaultdict(float)
    for one in self.operations:
      sums[tuple(getattr(one, field) for field in fields)] += one.seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def predict(text: str, chip: Chip, *, loss_chunks: int = 1) -> Prediction:
  """Reads `compiled.as_text()` of a TPU's program, optimized with full effort.

  `loss_chunks`: rounds of the loss head's loop, which the data decide: trained
  tokens of a device and micro-batch over `loss.chunk_tokens`.

  Raises ValueError: the chip's clock is not known, or the text is no program.
  """
  if chip.name not in CLOCKS:
    raise ValueError(
      f"predict: got the chip {chip.name!r}, expected one of "
      f"{sorted(CLOCKS)}. Its compiler gives no cycles that are known here."
    )
  return _Reader(text, chip, loss_chunks).read()


class _Instruction(NamedTuple):
  name: str
  type: str
  op: str
  operands: tuple[str, ...]
  line: str


class _Reader:
  """One reading of a program; times in seconds."""

  def __init__(self, text: str, chip: Chip, loss_chunks: int):
    self.loss_chunks = loss_chunks
    self.lines, self.entry = cost_model.computations(text)
    self.chip, self.clock = chip, CLOCKS[chip.name]
    self.bandwidth = chip.bandwidth or math.inf
    self.rate = chip.links or math.inf
    self.share = KERNEL_SHARE.get(chip.name, 0.5)
    found = re.search(r"num_partitions=(\d+)", text)
    self.num_devices = int(found[1]) if found else 1
    self.parsed: dict[str, dict[str, _Instruction]] = {}
    self.sources = _sources(text)
    self.operations: list[Operation] = []
    self.links = 0.0
    self.notes: dict[str, None] = {}

  def read(self) -> Prediction:
    self.run(self.entry, 1)
    order = sorted(self.operations, key=lambda one: -one.seconds)
    return Prediction(tuple(order), self.links, tuple(self.notes))

  def body(self, name: str) -> dict[str, _Instruction]:
    """The instructions of a computation, in the order of its schedule."""
    if name not in self.parsed:
      found = map(_instruction, self.lines.get(name, ()))
      self.parsed[name] = {one.name: one for one in found if one}
    return self.parsed[name]

  def run(self, name: str, times: int) -> float:
    """Records the operations of a computation; returns one run's seconds."""
    body = self.body(name)
    now = 0.0
    free = {"collectives": 0.0, "copies": 0.0}
    pending: dict[str, tuple[float, str, _Instruction]] = {}

    def spend(one: _Instruction, seconds: float, kind: str, flops=0.0) -> None:
      nonlocal now
      if seconds <= 0:
        return
      now += seconds
      scopes = list(self.scopes(one))
      self.operations.append(
        Operation(
          *(one.name, seconds * times, times, kind),
          part=_first(_PARTS, scopes, "others"),
          phase=_first(_PASSES, scopes, "outside"),
          source=self.source(one),
          flops=flops * times,
        )
      )

    for one in body.values():
      if one.op in _FREE:
        continue
      if one.op == "while":
        trips = cost_model.trips(one.line, self.lines)
        if trips is None and "loss_head" in one.line:
          trips = self.loss_chunks
          self.notes[f"the loss head works off {trips} chunks"] = None
        elif trips is None:
          self.notes["a loop of unknown length is counted once"] = None
        inner = re.search(r"body=%?([\w.\-]+)", one.line)
        assert inner is not None
        now += (trips or 1) * self.run(inner[1], times * (trips or 1))
      elif one.op in ("conditional", "call"):
        now += self.dearest(cost_model.callees(one.line), times)
      elif one.op.endswith("-done"):
        source = self.started(one, body, pending)
        if source:
          end, kind, start = pending.pop(source)
          spend(start, end - now, kind)
      elif one.op.endswith("-start"):
        kind, seconds = self.transfer(one)
        free[kind] = max(free[kind], now) + seconds
        pending[one.name] = free[kind], kind, one
        self.links += times * seconds * (kind == "collectives")
      elif found := cost_model.collective(one.line, self.num_devices):
        seconds = found[1] / self.rate
        self.links += times * seconds
        spend(one, seconds, "collectives")
      elif '"tpu_custom_call"' in one.line:
        flops = self.kernel_flops(one)
        spend(one, flops / self.chip.flops / self.share, "kernels", flops)
      else:
        flops = self.flops(one, body)
        cycles = re.search(r'"estimated_cycles":"(\d+)"', one.line)
        kind = "products" if flops else "others"
        if cycles:
          spend(one, int(cycles[1]) / self.clock, kind, flops)
        elif flops:
          spend(one, flops / self.chip.flops, kind, flops)
        elif one.op != "custom-call":
          spend(one, self.moved(one, body) / self.bandwidth, "moves")
    return now

  def dearest(self, names: list[str], times: int) -> float:
    """Of branches the one that takes longest is counted."""
    before, best, kept = self.operations, 0.0, []
    for name in names:
      self.operations = []
      seconds = self.run(name, times)
      if seconds >= best:
        best, kept = seconds, self.operations
    self.operations = before + kept
    return best

  def transfer(self, one: _Instruction) -> tuple[str, float]:
    """(kind, seconds) of what an asynchronous instruction moves."""
    found = cost_model.collective(one.line, self.num_devices)
    size = found[1] if found else self.received(cost_model.callees(one.line))
    if size:
      return "collectives", size / self.rate
    # (operand, result, context): what arrives is the smaller of the two.
    arrays = re.findall(r"\w+\[[\d,]*\]", one.type)
    sizes = [cost_model.num_bytes(x) for x in arrays]
    return "copies", min(sizes[:2], default=0) / self.bandwidth

  def received(self, names: list[str]) -> int:
    """Bytes that collectives inside of these computations receive."""
    total = 0
    for name in names:
      for line in self.lines.get(name, ()):
        found = cost_model.collective(line, self.num_devices)
        total += found[1] if found else self.received(cost_model.callees(line))
    return total

  def started(self, one, body, pending) -> str | None:
    """The start that an end waits for, through updates in between."""
    for name in one.operands:
      while name not in pending and name in body and body[name].operands:
        name = body[name].operands[0]
      if name in pending:
        return name
    return None

  def opened(self, one: _Instruction, body=None) -> Iterator[Any]:
    """(instruction, the computation it is of): itself, then a fusion's."""
    yield one, body
    for name in cost_model.callees(one.line) if one.op == "fusion" else ():
      inner = self.body(name)
      for x in inner.values():
        yield from self.opened(x, inner)

  def flops(self, one: _Instruction, body: dict[str, _Instruction]) -> float:
    """Of the products of an instruction, fusions opened."""
    found = (x for x in self.opened(one, body) if x[0].op in _PRODUCTS)
    return sum((_product_flops(*x) for x in found), 0.0)

  def kernel_flops(self, one: _Instruction) -> float:
    """Of the causal blocks of splash attention; 0, noted, of other kernels. Its
    forward pass multiplies twice (4 T S H), the pass for keys and values four
    times, that for queries thrice; blocks are of 512 tokens."""
    found = re.search(r"operand_layout_constraints=\{(.*?\})\}", one.line)
    arrays = _arrays(found[1]) if found else []
    large = [dims for kind, dims in arrays if kind[0] in "bf" and len(dims) > 2]
    if len(large) < 2 or not re.search("splash|flash", one.name):
      self.notes[f"the kernel {one.name.split('.')[0]} is not counted"] = None
      return 0.0
    q, k = large[:2]
    times = 8 if "dkv" in one.name else 6 if "dq" in one.name else 4
    blocks = max(1, q[-2] // 512)
    causal = (blocks + 1) / (2 * blocks)
    self.notes[f"kernels run at {self.share:.0%} of the peak"] = None
    return times * math.prod(q) * k[-2] * causal

  def moved(self, one, body) -> float:
    """Bytes of memory that an instruction without an estimate moves."""
    out = cost_model.num_bytes(one.type)
    operands = (body[name] for name in one.operands if name in body)
    sizes = [cost_model.num_bytes(x.type) for x in operands]
    ops = {x.op for x, _ in self.opened(one)}
    if "gather" in ops:
      return 2 * out
    if ops & {"scatter", "dynamic-update-slice"}:  # In place, where it can.
      return 3 * sum(size for size in sizes if size < out)
    if "sort" in ops:
      rounds = math.ceil(math.log2(max(2, out)))
      return (out + sum(sizes)) * rounds**2 / 8
    return out + sum(sizes)

  def scopes(self, one: _Instruction) -> Iterator[str]:
    """Names of the operations in it, its own first, then those of products."""
    own, *inner = (x for x, _ in self.opened(one))
    for x in (own, *sorted(inner, key=lambda x: x.op not in _PRODUCTS)):
      if named := re.search(r'op_name="([^"]*)"', x.line):
        yield named[1]

  def source(self, one: _Instruction) -> str:
    for x, _ in self.opened(one):
      frame = re.search(r"stack_frame_id=(\d+)", x.line)
      if frame and (found := self.sources(int(frame[1]))):
        return found
    return ""


def _first(patterns: dict[str, str], scopes: list[str], default: str) -> str:
  for scope in scopes:
    for name, pattern in patterns.items():
      if re.search(pattern, scope):
        return name
  return default


def _instruction(line: str) -> _Instruction | None:
  """Of '  ROOT %add.2 = f32[8]{0} add(%a, %b), metadata={...}'."""
  start = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
  if not start:
    return None
  end = _closed(line, start.end()) if line[start.end()] == "(" else None
  end = end or line.index(" ", start.end())
  opened = line.index("(", end + 1)
  inside = line[opened : _closed(line, opened)]
  return _Instruction(
    start[1],
    line[start.end() : end],
    line[end:opened].strip(),
    tuple(re.findall(r"%([\w.\-]+)", inside)),
    line,
  )


def _closed(line: str, start: int) -> int:
  """Just past the bracket that closes the one at start."""
  depth = 0
  for found in re.compile(r"[(){}\[\]]").finditer(line, start):
    depth += 1 if found[0] in "([{" else -1
    if not depth:
      return found.end()
  return len(line)


def _arrays(types: str) -> list[tuple[str, list[int]]]:
  """[('bf16', [8, 128])] of 'bf16[8,128]{1,0:T(8,128)}', or of a tuple."""
  found = re.findall(r"\b([a-z]+\d\w*|pred)\[([\d,]*)\]", types)
  return [(t, [int(n) for n in dims.split(",") if n]) for t, dims in found]


def _product_flops(one, body) -> float:
  """2 x the result's size x what is summed over; a TPU writes products as
  convolutions, whose batch dimensions are windows of one tap that counts."""
  out = _arrays(one.type)[0][1]
  left = _arrays(body[one.operands[0]].type)[0][1]
  if one.op == "dot":
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.line)
    summed = [int(d) for d in dims[1].split(",") if d] if dims else []
    return 2.0 * math.prod(out) * math.prod(left[d] for d in summed)
  right = _arrays(body[one.operands[1]].type)[0][1]
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.line)
  assert labels is not None
  of_left, of_right, of_out = labels.groups()
  taps = 1.0
  window = re.search(r"window=\{([^}]*)\}", one.line)
  spatial = sorted(c for c in of_right if c not in "io")
  for n, axis in enumerate(spatial):
    if window is None:
      break
    size = right[of_right.index(axis)]
    count = out[of_out.index(axis)] if axis in of_out else 1
    taps *= _taps(window[1], n, size, count, left[of_left.index(axis)])
  return 2.0 * math.prod(out) * right[of_right.index("i")] * taps


def _taps(window: str, n: int, size: int, count: int, length: int) -> float:
  """Taps of a window along an axis that meet an input, on average."""

  def of(name: str, default: str) -> str:
    found = re.search(rf"\b{name}=([\dx_\-]+)", window)
    return found[1].split("x")[n] if found else default

  low = int(of("pad", "0_0").split("_")[0])
  stride, dilated = int(of("stride", "1")), int(of("lhs_dilate", "1"))
  spread = int(of("rhs_dilate", "1"))
  plain = (low, stride, dilated, spread) == (0, 1, 1, 1)
  if plain and count + size - 1 == length:
    return size  # Every tap meets one.
  hits = 0
  for place in range(count):
    for tap in range(size):
      at = place * stride + tap * spread - low
      hits += at % dilated == 0 and 0 <= at // dilated < length
  return hits / max(1, count)


def _sources(text: str) -> Callable[[int], str]:
  """frame -> 'models/rope.py:88', the innermost frame that is ours."""

  def table(name: str) -> dict[int, str]:
    found = re.search(rf"^{name}\n(.*?)\n\n", text, re.S | re.M)
    lines = found[1].splitlines() if found else []
    return {int(x.split(" ", 1)[0]): x.split(" ", 1)[1] for x in lines}

  def number(field: str, line: str) -> int:
    found = re.search(rf"{field}=(\d+)", line)
    return int(found[1]) if found else 0

  files, places = table("FileNames"), table("FileLocations")
  frames = table("StackFrames")

  def source(frame: int) -> str:
    seen = set()
    while frame in frames and frame not in seen:
      seen.add(frame)
      place = places.get(number("file_location_id", frames[frame]), "")
      name = files.get(number("file_name_id", place), "").strip('"')
      if "sft_jax/" in name:
        line = number("line", place)
        return f"{name.rsplit('sft_jax/', 1)[1]}:{line}"
      frame = number("parent_frame_id", frames[frame])
    return ""

  return source
