"""What a step costs, from its trace and from its compiled program.

JAX's trace holds every product, recomputed ones too, and how often a loop runs:
FLOPs, and the bytes kept for the backward pass. What devices send each other,
which XLA's own cost analysis leaves out, is in the text of the compiled
program:

    %all-gather = f32[64,64]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], ...
    -> 'all-gather', 16,384 bytes gathered by groups of 4 devices
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sft_jax.common import trees

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
KINDS += ("ragged-all-to-all", "collective-permute", "collective-broadcast")
# What the runtime of several slices hands to a device, of whatever kind.
ACROSS = "across slices"


def matmul_flops(function: Callable[..., Any], *arguments: Any) -> int:
  """FLOPs of all matrix products that a call executes, loops multiplied out.

  Unlike in `flops.model_flops_per_token`, recomputation (remat) and padding
  count. A lower bound: kernels (Pallas) count as 0, of the branches of a
  condition the cheapest counts, of a loop of unknown length one round.
  """
  return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr: Any) -> int:
  return sum(map(_flops_of, jaxpr.eqns))


def _flops_of(equation: Any) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    size = math.prod(equation.outvars[0].aval.shape)
    return 2 * size * math.prod(left[i] for i in contracted)
  if name.startswith("ragged_dot"):
    # Every row of [M, K] meets one of the groups of [G, K, N]; or, in the
    # gradient, of [M, N] in groups of rows.
    left, right = (v.aval.shape for v in equation.invars[:2])
    out = equation.outvars[0].aval.shape
    return 2 * math.prod(left) * (out[1] if len(out) == 2 else right[1])
  if name == "pallas_call":
    return 0
  inner = [_flops(jaxpr) for jaxpr in _inner(params)]
  if name == "cond":
    return min(inner)
  times = params["length"] if name == "scan" else 1
  if name == "shard_map":
    # Traced for one device, by the axes that are divided by hand.
    mesh = params["mesh"]
    times = math.prod(mesh.shape[axis] for axis in params["newly_manual_axes"])
  return times * sum(inner)


def _inner(params: Any) -> list[Any]:
  """The traces that an equation's parameters hold."""
  is_trace = lambda x: hasattr(x, "eqns")
  leaves = jax.tree.leaves(list(params.values()), is_leaf=is_trace)
  closed = (getattr(leaf, "jaxpr", leaf) for leaf in leaves)
  return [jaxpr for jaxpr in closed if is_trace(jaxpr)]


def kept_bytes(
  function: Callable[..., Any],
  params: Any,
  batch: Any,
  doubled: Any,
  *others: Any,
) -> int:
  """Bytes kept for the backward pass that grow with the batch: activations.
  `function`: (params, batch, *others) -> scalar, differentiated in `params`.
  Shapes will do; those of `doubled` are a batch twice as large."""

  def kept(batch: Any) -> int:
    pull = lambda p, *rest: jax.vjp(lambda p: function(p, *rest), p)[1]
    return trees.num_bytes(jax.eval_shape(pull, params, batch, *others))

  return kept(doubled) - kept(batch)


# -- Traffic between devices ---------------------------------------------------


class Traffic(NamedTuple):
  """All collectives of one kind in one run of a program."""

  count: int  # How often one runs, loops multiplied out.
  # What one device receives in all of them, if each runs on a ring (Thakur,
  # Rabenseifner, Gropp 2005): of n bytes gathered, scattered or exchanged among
  # g devices n (g - 1) / g, reduced to all twice that, and permuted n. From
  # other slices what their runtime brings counts.
  bytes: int
  exact: bool  # False if some are in a loop of unknown length, counted once.


def collectives(compiled_text: str) -> dict[str, Traffic]:
  """{kind: Traffic} of `jax.jit(f).lower(...).compile().as_text()`.

  A sum over 8 devices that runs in each of 4 iterations of a loop, of f32[1000]
  each, is {'all-reduce': Traffic(4, 28000, True)}.

  Raises ValueError: the text is no compiled program.
  """
  bodies, entry = computations(compiled_text)
  found = re.search(r"num_partitions=(\d+)", compiled_text)
  num_devices = int(found.group(1)) if found else 1
  total: dict[str, Traffic] = {}

  def visit(name: str, times: int, exact: bool) -> None:
    for line in bodies.get(name, ()):
      if one := collective(line, num_devices):
        kind, size = one
        count, received, known = total.get(kind, (0, 0, True))
        received += times * size
        total[kind] = Traffic(count + times, received, known and exact)
        continue
      rounds = trips(line, bodies) if " while(" in line else 1
      for callee in callees(line):
        visit(callee, times * (rounds or 1), exact and rounds is not None)

  visit(entry, 1, True)
  return total


def computations(text: str) -> tuple[dict[str, list[str]], str]:
  """({name: its instructions}, name of the one that runs first)."""
  computations: dict[str, list[str]] = {}
  entry = None
  lines: list[str] = []
  for line in text.splitlines():
    if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
      lines = computations.setdefault(start.group(2), [])
      if start.group(1):
        entry = start.group(2)
    elif line.startswith(" "):
      lines.append(line)
    elif lines and not line.startswith("}\n"):
      lines[-1] += line  # A kernel's metadata has lines of its own.
  if entry is None:
    raise ValueError(
      "collectives: got no ENTRY computation; expected a compiled program. "
      "Take it from jit(f).lower(...).compile().as_text()."
    )
  return computations, entry


def trips(line: str, computations: dict[str, list[str]]) -> int | None:
  """How often a loop runs, None where that is not known. XLA notes it for CPU
  and GPU. For a TPU it is what the condition compares with: scans count from 0
  up to a constant."""
  if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
    return int(known.group(1))
  name = re.search(r"condition=%?([\w.\-]+)", line)
  condition = "\n".join(computations.get(name.group(1), ())) if name else ""
  last = r"ROOT .* compare\(.*%([\w.\-]+)\), direction=LT"
  bound = re.search(last, condition)
  if bound is None:
    return None
  name = re.escape(bound.group(1))
  end = re.search(rf"%{name} = .*constant\((\d+)\)", condition)
  return int(end.group(1)) if end else None


def callees(line: str) -> list[str]:
  """Computations that an instruction runs; the end of an async one has none."""
  if re.search(r" async-(done|update)\(", line):
    return []
  one = re.findall(
    r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)"
    r"=%?([\w.\-]+)",
    line,
  )
  many = re.findall(r"\b(?:branch_computations|calls)=\{([^}]*)\}", line)
  return one + [name.strip(" %") for names in many for name in names.split(",")]


def collective(line: str, num_devices: int) -> tuple[str, int] | None:
  """(kind, bytes that a device receives) of an instruction, if it is one."""
  if found := re.search(r" = (.+?) recv\(.*_xla_megascale_transfer", line):
    return ACROSS, num_bytes(re.sub(r"(u32|token)\[\]", "", found[1]))
  found = re.search(rf" = (.+?) ({'|'.join(KINDS)})(-start)?\(", line)
  if found is None:
    return None
  types, kind, started = found.groups()
  if kind == "collective-permute" and started:
    # Begun apart, its type is (operand, result, words of context).
    return kind, num_bytes(types.replace("u32[]", "")) // 2
  size = num_bytes(types)
  if kind == "collective-permute":
    return kind, size
  devices = _group_size(line, num_devices)
  if kind == "all-gather" and started:
    size = size * devices // (devices + 1)  # (operand, result).
  if kind == "reduce-scatter":
    return kind, size * (devices - 1)
  shares = 2 if kind == "all-reduce" else 1
  return kind, shares * size * (devices - 1) // devices


def num_bytes(types: str) -> int:
  """Bytes of all arrays of a type: 'f32[2,3]{1,0}' or '(f32[2], bf16[])'."""
  bits = 0
  for dtype, dims in re.findall(r"\b([a-z]+\w*)\[([\d,]*)\]", types):
    digits = re.search(r"\d+", dtype)
    width = int(digits.group()) if digits else 8  # 'pred' takes a byte.
    bits += width * math.prod(int(n) for n in dims.split(",") if n)
  return -(-bits // 8)


def _group_size(line: str, num_devices: int) -> int:
  """How many devices take part in one group; XLA writes it in three ways."""
  if found := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", line):
    return int(found.group(1))  # [groups, size] <= [all devices]
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return found.group(1).count(",") + 1  # {{0, 1}, {2, 3}}
  if found := re.search(r"replica_groups=mesh\[(.*?)\].*?\{([^}]*)\}", line):
    # mesh['a'=4,'b'=2], ... {'a'}; 'a':(2)2 is a part of an axis, of size 2.
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
    named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found.group(2))
    return math.prod(int(part or sizes[axis]) for axis, part in named)
  return num_devices
