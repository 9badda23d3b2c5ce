"""The laws of a training step, measured on the real devices.

A toy batch of two documents a row, with strongly uneven weights, goes through
the run's own model, loss and step. Each law says that something must not
matter; what is measured is how much it does.

    documents apart     hidden states, when another document's tokens change: 0
    no look ahead       hidden states, when a later token changes: 0
    packed = alone      nats and gradients of documents in rows of their own
    rows shuffled       the same rows on other devices
    cut in n            the same batch in n micro-batches

Gradients are compared by sketches: per parameter its norm and its products
with a few arrays of random signs, whose differences tell the distance of two
gradients (Johnson & Lindenstrauss 1984). So no more than one gradient exists
at a time, and none leaves its devices.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float32, Int

from sft_jax.common import sharding, trees
from sft_jax.common.batch import Batch
from sft_jax.step import train_step
from sft_jax.step.train_step import LossFn
from sft_jax.training.build import data as setup_data
from sft_jax.training.build import step as setup_step
from sft_jax.training.build.build import BuiltRun
from sft_jax.training.build.data import Config, Log

_LONGEST = 128  # Slots of the toy batch: the work of a fraction of a step.

Sketch = dict[str, jax.Array]
Put = Callable[[Batch], Batch]
_SIGNS = 4  # Products with random signs, per parameter.
# What rounding may do to nats and gradients, relative, by compute dtype.
TOLERANCES = {"float32": (1e-5, 1e-3), "bfloat16": (1e-2, 0.1)}


class Finding(NamedTuple):
  """How far a law is from holding.

  Attributes:
    law: what must not matter, and what was compared.
    difference: 0 where it does not matter at all.
    tolerance: up to which it is rounding.
    detail: where the difference is largest, if it has a place.
  """

  law: str
  difference: float
  tolerance: float
  detail: str = ""

  @property
  def passed(self) -> bool:
    """False for NaN too."""
    return self.difference <= self.tolerance


class Measured(NamedTuple):
  """What the step makes of a batch: nats, their weight, the mean gradient."""

  nats: float
  weight: float
  gradient: dict[str, np.ndarray]


def quick(
  loss_fn: LossFn,
  hidden: Callable[..., jax.Array],
  params: trees.Tree,
  trained: Callable[[str], bool],
  *,
  put: Put,
  rows: int,
  length: int,
  vocab_size: int,
  dtype: str,
) -> list[Finding]:
  """Segment leak, packing and placement: two small programs.

  Args:
    loss_fn: the run's (all parameters, batch) -> LossSums.
    hidden: the model's (params, tokens, positions, segment_ids) -> [B, T, D].
    put: places rows [B, T], or micro-batches [A, B / A, T], on the devices.
    rows: B, a multiple of what the mesh divides rows by, and even.
  """
  packed = toy_batch(rows, length, vocab_size)
  measure = measurer(loss_fn, params, trained, put)
  base = measure(packed, 1)
  order = np.arange(rows).reshape(2, -1).T.ravel()
  shuffled = jax.tree.map(lambda x: x[order], packed)
  return [
    *leaks(hidden, params, packed, put=put, vocab_size=vocab_size),
    *compare("packed = alone", base, measure(unpack(packed), 1), dtype),
    *compare("rows shuffled", base, measure(shuffled, 1), dtype),
  ]


def toy_batch(rows: int, length: int, vocab_size: int) -> Batch:
  """Two documents in each of the first rows / 2 rows; the others are empty.

  Weights grow steeply from row to row, so that a mean of means shows.
  """
  if rows < 2 or rows % 2 or length < 8:
    raise ValueError(
      f"selfcheck: got {rows} rows of {length} tokens; expected an even number "
      "of at least 8 tokens each. Raise batch_size or data.seq_len."
    )
  rng = np.random.default_rng(0)
  shape, half = (rows, length), rows // 2
  first = length // 2 - 1
  second = length - first - 1  # One slot of padding at the end.
  tokens, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
  segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  tokens[:half] = rng.integers(0, vocab_size, (half, length))
  for segment, start, size in ((1, 0, first), (2, first, second)):
    segments[:half, start : start + size] = segment
    positions[:half, start : start + size] = np.arange(size)
    share = np.linspace(0.1, 1, half)[:, None]
    drawn = rng.random((half, size - 1)) < share
    drawn[:, -1] = True
    weights[:half, start : start + size - 1] = drawn * (1 + 3 * share)
  tokens[segments == 0] = 0
  targets = np.zeros(shape, np.int32)
  targets[:, :-1] = np.where(weights[:, :-1] > 0, tokens[:, 1:], 0)
  return Batch(tokens, targets, weights, segments, positions)


def unpack(packed: Batch) -> Batch:
  """The documents of a `toy_batch`, each in a row of its own."""
  half = packed.tokens.shape[0] // 2

  def apart(x: np.ndarray) -> np.ndarray:
    found = np.zeros_like(x)
    for row in range(half):
      for segment in (1, 2):
        slots = packed.segment_ids[row] == segment
        found[row + half * (segment - 1), : slots.sum()] = x[row, slots]
    return found

  cut = jax.tree.map(apart, packed)
  return cut._replace(segment_ids=(cut.segment_ids > 0).astype(np.int32))


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
  """A batch that every process has whole, [B, T] or [A, B / A, T], placed."""
  leading = batch.tokens.ndim - 2
  own = sharding.own_rows(mesh, batch.tokens.shape[leading])
  mine = jax.tree.map(lambda x: np.take(x, own, axis=leading), batch)
  return sharding.put_rows(
    mine, sharding.row_sharding(mesh, leading_axes=leading)
  )


def leaks(
  hidden: Callable[..., jax.Array],
  params: trees.Tree,
  packed: Batch,
  *,
  put: Put,
  vocab_size: int,
) -> list[Finding]:
  """What of a change reaches where it must not; and that it is a change.

  The second documents of all rows change, then the last tokens of the first
  ones. The same program computes before and after, so what is not reached
  keeps every bit.
  """
  run = jax.jit(
    lambda params, b: hidden(params, b.tokens, b.positions, b.segment_ids)
  )
  before = run(params, put(packed))

  @jax.jit
  def largest(after, before, where):
    moved = jnp.abs(after.astype(jnp.float32) - before.astype(jnp.float32))
    moved = jnp.where(jnp.isfinite(moved), moved, jnp.inf).max(-1)
    inside = jnp.where(where, moved, 0).max()
    return inside, jnp.where(where, 0, moved).max()

  second = packed.segment_ids == 2
  first = packed.segment_ids == 1
  last = first & (packed.positions == packed.positions[first].max())
  findings = []
  for law, changed in (("documents apart", second), ("no look ahead", last)):
    tokens = np.where(changed, (packed.tokens + 1) % vocab_size, packed.tokens)
    after = run(params, put(packed._replace(tokens=tokens)))
    where = put(packed._replace(tokens=changed.astype(np.int32))).tokens > 0
    inside, outside = map(float, largest(after, before, where))
    findings.append(Finding(f"{law}: hidden states", outside, 0.0))
    if not inside > 0:
      law = f"{law}: the change itself"
      findings.append(Finding(law, float("nan"), 0.0, "not seen"))
  return findings


def measurer(
  loss_fn: LossFn,
  params: trees.Tree,
  trained: Callable[[str], bool],
  put: Put,
) -> Callable[[Batch, int], Measured]:
  """Returns (batch, number of micro-batches) -> what the step makes of it.

  It is `train_step` itself, with an optimizer that moves nothing and keeps a
  sketch of the gradient that it is handed.
  """

  def keep(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del state, params
    return jax.tree.map(jnp.zeros_like, gradient), sketch(gradient)

  # Of shapes alone: one by one, sums over many devices may wait for each other.
  begin = lambda params: jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sketch, params)
  )
  # Optax names the arguments of its protocol.
  make: Any = optax.GradientTransformation
  tx = make(begin, keep)
  step = train_step.make_train_step(loss_fn, tx, lambda count: 0.0)
  state = train_step.init_state(params, trained, tx)

  @jax.jit
  def run(state, batch):
    after, pairs = step(state, batch)
    return pairs["loss/nats_per_token"], after.opt_state

  def measure(batch: Batch, parts: int) -> Measured:
    cut = put(train_step.split_micro_batches(batch, parts))
    (nats, weight), gradient = jax.device_get(run(state, cut))
    return Measured(float(nats), float(weight), gradient)

  return measure


def sketch(tree: trees.Tree) -> Sketch:
  """{path: [norm, products with random signs]} of every leaf, float32."""

  def one(path: str, x: jax.Array) -> Float32[jax.Array, " signs"]:
    x = x.astype(jnp.float32)
    key = jax.random.key(zlib.crc32(path.encode()))
    signs = [
      jax.random.rademacher(jax.random.fold_in(key, i), x.shape, jnp.float32)
      for i in range(_SIGNS)
    ]
    return jnp.stack([jnp.sqrt((x * x).sum()), *((x * s).sum() for s in signs)])

  return {path: one(path, x) for path, x in trees.flatten(tree).items()}


def distance(
  one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]
) -> tuple[float, str]:
  """(relative distance of two sketched trees, the parameter where it is).

  Of each parameter sqrt(mean of squared differences of products), over its
  norm; where that is nothing beside the whole, over a thousandth of the
  whole's.
  """
  whole = np.sqrt(sum(float(x[0]) ** 2 for x in one.values()))
  worst, where = 0.0, ""
  for path, x in one.items():
    gap = np.sqrt(np.mean(np.square(x[1:] - other[path][1:])))
    share = float(gap) / max(float(x[0]), 1e-3 * whole, 1e-30)
    if not share <= worst and not np.isnan(worst):
      worst, where = share, path
  return worst, where


def compare(
  law: str, base: Measured, other: Measured, dtype: str
) -> list[Finding]:
  """What should not matter, in nats and in the gradient."""
  nats, gradient = TOLERANCES[dtype]
  means = base.nats / base.weight, other.nats / other.weight
  gap, where = distance(base.gradient, other.gradient)
  return [
    Finding(f"{law}: nats", abs(means[1] / means[0] - 1), nats),
    Finding(f"{law}: gradient", gap, gradient, where),
  ]


def stops(
  tokens: Int[np.ndarray, "B T"],
  weights: Float32[np.ndarray, "B T"],
  segment_ids: Int[np.ndarray, "B T"],
  stop_ids: tuple[int, ...],
) -> Finding:
  """The share of documents whose last trained token is no stop token.

  Args:
    tokens: those predicted, `Batch.targets`.
    segment_ids: documents, from 1; 0 where none should be looked at.
  """
  ends = []
  for row, (ids, w) in enumerate(zip(segment_ids, weights, strict=True)):
    for segment in np.unique(ids[ids > 0]):
      trained = np.flatnonzero((ids == segment) & (w > 0))
      if len(trained):
        ends.append(int(tokens[row, trained[-1]]) in stop_ids)
  missing = ends.count(False) / len(ends) if ends else 0.0
  law = "stop token trained: documents without"
  return Finding(law, missing, 0.0, f"{len(ends)} read")


def findings_table(findings: list[Finding]) -> list[tuple[Any, ...]]:
  """(law, difference, tolerance, outcome) of each, ready to print."""

  def outcome(one: Finding) -> str:
    detail = f" ({one.detail})" if one.detail else ""
    return "ok" if one.passed else f"FAILED{detail}"

  return [
    (one.law, f"{one.difference:.2g}", f"{one.tolerance:.2g}", outcome(one))
    for one in findings
  ]


def refuse(findings: list[Finding]) -> None:
  """Raises ValueError, with all that failed, where a law does not hold."""
  failed = findings_table([one for one in findings if not one.passed])
  lines = (
    f"  {law}: got {got}, expected at most {most} {outcome}\n"
    for law, got, most, outcome in failed
  )
  if failed:
    raise ValueError(
      "selfcheck: on these devices the model or the step is not what it "
      f"should be:\n{''.join(lines)}Try model.attention=xla, another mesh or "
      "another version of JAX; sft-jax selfcheck tells more. selfcheck=off "
      "trains all the same."
    )


def check_at_start(
  config: Config, built: BuiltRun, params: trees.Tree, log: Log
) -> None:
  """The quick form; where config.selfcheck is 'auto', on several devices.

  Raises ValueError: a law does not hold.
  """
  alone = config.selfcheck == "auto" and built.mesh.size == 1
  if alone or config.selfcheck == "off":
    return
  findings = quick_of_run(config, built, params)
  refuse(findings)
  log(
    f"Self-check: {len(findings)} laws hold on {built.mesh.size} devices, "
    f"largest difference {max(one.difference for one in findings):.1g}."
  )


def quick_of_run(
  config: Config, built: BuiltRun, params: trees.Tree
) -> list[Finding]:
  """What of packing and placement can be measured in seconds."""
  rows, length = toy_shape(config, built.mesh)
  loss_fn, plain = built.loss_fn, setup_data.plain(config)
  if plain.to_dict() != config.to_dict():
    # The toy documents are no pairs, and no teacher was asked of them.
    loss_fn = setup_step.make_step(
      *(plain, built.model, built.mesh, built.num_steps)
    ).loss_fn
  return quick(
    loss_fn,
    built.model.hidden,
    params,
    built.trained,
    put=lambda batch: place_batch(batch, built.mesh),
    rows=rows,
    length=length,
    vocab_size=built.model.config.vocab_size,
    dtype=config.model.dtype,
  )


def toy_shape(config: Config, mesh: Mesh) -> tuple[int, int]:
  """(rows, slots): two rows for each part of a batch."""
  # data.seq_len is a multiple of `context`, so half of it need not be.
  length = min(config.data.seq_len, _LONGEST * mesh.shape["context"])
  return 2 * sharding.size(mesh), length
