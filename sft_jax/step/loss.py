"""Masked next-token cross-entropy, as sums, without a batch's logits.

With the base model's hidden states beside the tuned model's, also how far the
tuned predictions are from the base's.

Axes: B batch, T position, D model, V vocabulary (legend:
`models/transformer.py`); W the tokens of one chunk.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from sft_jax.common.batch import AnyArray
from sft_jax.step import loss_chunk
from sft_jax.step.objective import NATS, Objective


class GroupSums(NamedTuple):
  """The sums of `LossSums` for each group of tokens; see there.

  Attributes:
    nats: sum of w * nll over the group's tokens.
    weight: sum of w.
    correct: sum of w over those predicted rightly.
  """

  nats: Float32[Array, " groups"]
  weight: Float32[Array, " groups"]
  correct: Float32[Array, " groups"]


class BaseSums(NamedTuple):
  """What of the base model's predictions is left, summed over trained tokens.

  Attributes:
    kl: sum of w * KL(base || tuned), in nats.
    kept: sum of w where the tuned model's most likely token is the base's.
    right: sum of w where the base's most likely token is the target.
    still_right: of these, where the tuned model's is, too.
  """

  kl: Float32[Array, ""]
  kept: Float32[Array, ""]
  right: Float32[Array, ""]
  still_right: Float32[Array, ""]


class LossSums(NamedTuple):
  """Sums over the trained tokens of a batch; dividing is the caller's.

  Attributes:
    objective: what is minimised, the only one that carries a gradient; equal
      to `nats` unless an `Objective` says otherwise.
    nats: sum of w * nll, in nats, whatever the objective.
    weight: sum of w, the one denominator of every mean.
    correct: sum of w over tokens whose most likely prediction is right.
    entropy: sum of w times the entropy of the prediction, in nats.
    groups: nats, weight and correct of each group of tokens.
    base: what is left of the base's predictions; None without a base.
  """

  objective: Float32[Array, ""]
  nats: Float32[Array, ""]
  weight: Float32[Array, ""]
  correct: Float32[Array, ""]
  entropy: Float32[Array, ""]
  groups: GroupSums
  base: BaseSums | None = None


# The base's hidden states and head; its width C may be another.
Base = tuple[Float[AnyArray, "B T C"], Float[AnyArray, "V C"]]


class _Choices(NamedTuple):
  """What is known when the program is compiled."""

  objective: Objective
  softcap: float | int | None
  width: int
  num_groups: int
  rows: NamedSharding | None


def linear_cross_entropy(
  hidden: Float[AnyArray, "B T D"],
  head: Float[AnyArray, "V D"],
  targets: Int32[AnyArray, "B T"],
  weights: Float32[AnyArray, "B T"],
  groups: Int32[AnyArray, "B T K"] | None = None,
  *,
  base: Base | None = None,
  num_groups: int = 0,
  objective: Objective = NATS,
  chunk_tokens: int = 512,
  softcap: float | int | None = None,
  rows: NamedSharding | None = None,
) -> LossSums:
  """Cross-entropy of `hidden @ head.T` against `targets`, weighted, summed.

      nll = logsumexp(z) - z[target],  z = hidden @ head.T  (float32)

  Only trained tokens, those with a weight, meet the head. They are listed,
  and the list is worked off in chunks until its end; here with chunks of 2:

      weights [B T]    0 1 1 0 | 0 0 0 1
      listed           1 2 | 7 -        two chunks, and not four

  so the work follows the data and nothing is compiled anew. Each chunk's
  gradient is formed while its logits are at hand, so that the backward pass
  only scales (the idea of Liger Kernel, arXiv 2410.10989); no other chunk's
  logits exist then. The head's own gradient, a third of the work, is formed
  only where the head trains, which JAX tells. Metrics are sums of the same
  chunks.

  Args:
    hidden: the model's last hidden states, any float dtype.
    head: the unembedding.
    targets: ids in [0, V), also where the weight is 0.
    weights: weight of each prediction; 0 where nothing is trained, and what
      stands there changes nothing, not even NaN.
    groups: the groups that each token belongs to, ids in [0, num_groups);
      -1 is none.
    base: the base's hidden states of the same tokens, and its head: constants,
      which receive no gradient. Their logits, too, exist a chunk at a time.
    num_groups: number of groups.
    objective: what is minimised; its `kl` needs a base.
    chunk_tokens: tokens of a chunk; changes memory, not results.
    softcap: bends logits to softcap * tanh(z / softcap) (Gemma 2).
    rows: how [B, T] is divided over a mesh. Each device then lists its own
      tokens, the head is gathered once, and its gradient added up once. None:
      one device, or XLA finds out, and moves more.

  Returns:
    LossSums over all B * T predictions.

  Raises:
    ValueError: an objective that compares with the base, and no base.
  """
  if objective.kl and base is None:
    raise ValueError(
      f"linear_cross_entropy: objective.kl is {objective.kl} without a base; "
      "expected its hidden states and head. Pass base, or set kl to 0."
    )
  if groups is None:
    groups = jnp.zeros((*targets.shape, 0), jnp.int32)
  choices = _Choices(objective, softcap, max(1, chunk_tokens), num_groups, rows)
  base = jax.lax.stop_gradient(base)
  with jax.named_scope("loss_head"):
    value, table, left = _sums(
      hidden, head, targets, weights, groups, base, choices
    )
  nats, weight, correct, entropy = table
  return LossSums(
    *(value, nats[0], weight[0], correct[0], entropy[0]),
    GroupSums(nats[1:], weight[1:], correct[1:]),
    None if left is None else BaseSums(*left),
  )


def _work_off(
  hidden: Array,
  head: Array,
  targets: Array,
  weights: Array,
  groups: Array,
  base: tuple[Array, Array] | None,
  *,
  choices: _Choices,
  to_hidden: bool,
  to_head: bool,
) -> tuple[Array, Array, Array | None, Array | None, Array | None]:
  """(objective, table, of the base, d hidden, d head) of a device's tokens.

  Gradients that are not asked for are None.
  """
  shape, n, axes = hidden.shape, targets.size, _axes(choices.rows)
  hidden, y, w, groups = (
    jnp.reshape(x, (n, *x.shape[2:]))
    for x in (hidden, targets, weights, groups)
  )
  base_hidden = None if base is None else base[0].reshape(n, -1)
  trained = w != 0
  listed = jnp.argsort(~trained, stable=True)
  count = trained.sum()
  # Past the list's end is no token at all: reading there gives zeros.
  listed = jnp.where(jnp.arange(n) < count, listed, n)
  width = min(choices.width, n)
  listed = jnp.pad(listed, (0, width), constant_values=n)

  def step(i, carry):
    value, table, left, d_hidden, d_head = carry
    at = jax.lax.dynamic_slice_in_dim(listed, i * width, width)
    take = lambda x: jnp.take(x, at, axis=0, mode="fill", fill_value=0)
    h, y_, w_ = take(hidden), take(y), take(w)
    found = loss_chunk.logits(h, head, y_, choices.softcap)
    value += (
      w_ * choices.objective.loss(found.z, found.log_z, found.nll)
    ).sum()
    table += loss_chunk.table(found, w_, take(groups), choices.num_groups)
    known = None
    if base is not None:
      was = loss_chunk.logits(take(base_hidden), base[1], y_, choices.softcap)
      known = loss_chunk.compare(was, found)
      left += (w_ * known.table).sum(axis=-1)
      if choices.objective.kl:
        value += choices.objective.kl * (w_ * known.kl).sum()
    if to_hidden or to_head:
      # In the compute dtype: these products are as large as the forward's.
      d_z = loss_chunk.gradient(
        found, y_, w_, choices.objective, choices.softcap, known
      ).astype(h.dtype)
    if to_hidden:
      d_h = jnp.einsum("wv,vd->wd", d_z, head).astype(h.dtype)
      d_hidden = jax.lax.dynamic_update_slice_in_dim(
        d_hidden, d_h, i * width, 0
      )
    if to_head:
      d_head += jnp.einsum(
        "wv,wd->vd", d_z, h, preferred_element_type=jnp.float32
      )
    return value, table, left, d_hidden, d_head

  chunks = -(-count // width)
  if axes:
    # As many on every device: collectives inside must meet.
    chunks = jax.lax.pmax(chunks, axes)
  carry = (
    jnp.zeros((), jnp.float32),
    jnp.zeros((4, 1 + choices.num_groups), jnp.float32),
    None if base is None else jnp.zeros(len(BaseSums._fields), jnp.float32),
    jnp.zeros((n + width, shape[-1]), hidden.dtype) if to_hidden else None,
    jnp.zeros(head.shape, jnp.float32) if to_head else None,
  )
  value, table, left, d_hidden, d_head = jax.lax.fori_loop(
    0, chunks, step, carry
  )
  if to_hidden:
    place = jnp.cumsum(trained) - 1
    d_hidden = jnp.where(trained[:, None], d_hidden[place], 0).reshape(shape)
  if axes:
    value, table, left, d_head = jax.lax.psum(
      (value, table, left, d_head), axes
    )
  return value, table, left, d_hidden, d_head


def _axes(rows: NamedSharding | None) -> tuple[str, ...]:
  """Names of the mesh axes that divide [B, T]; none if it stays whole."""
  if rows is None:
    return ()
  parts = [p for p in rows.spec if p is not None]
  axes = [a for p in parts for a in (p if isinstance(p, tuple) else (p,))]
  return tuple(axes) if any(rows.mesh.shape[a] > 1 for a in axes) else ()


def _on_devices(hidden, head, targets, weights, groups, base, **choices):
  """`_work_off`, where `rows` says so on each device with its own tokens."""
  work_off = partial(_work_off, **choices)
  rows = choices["choices"].rows
  axes = _axes(rows)
  if not axes:
    return work_off(hidden, head, targets, weights, groups, base)
  none = PartitionSpec()
  of_base = None if base is None else (rows.spec, none)
  # Axes that are not named, such as 'tensor', are left to XLA.
  return jax.shard_map(
    work_off,
    mesh=rows.mesh,
    axis_names=set(axes),
    in_specs=(rows.spec, none, rows.spec, rows.spec, rows.spec, of_base),
    out_specs=(none, none, none, rows.spec, none),
    check_vma=False,
  )(hidden, head, targets, weights, groups, base)


def _sums_only(hidden, head, targets, weights, groups, base, choices):
  return _on_devices(
    *(hidden, head, targets, weights, groups, base),
    choices=choices,
    to_hidden=False,
    to_head=False,
  )[:3]


def _sums_with_gradients(hidden, head, targets, weights, groups, base, choices):
  value, table, left, d_hidden, d_head = _on_devices(
    *(x.value for x in (hidden, head, targets, weights, groups)),
    base=base and tuple(x.value for x in base),
    choices=choices,
    to_hidden=hidden.perturbed,
    to_head=head.perturbed,
  )
  if d_head is not None:
    d_head = d_head.astype(head.value.dtype)
  return (value, table, left), (d_hidden, d_head)


def _scale_gradients(choices, gradients, cotangents):
  del choices
  d_value: Any = cotangents[0]
  scale = lambda g: (g.astype(jnp.float32) * d_value).astype(g.dtype)
  d_hidden, d_head = jax.tree.map(scale, gradients)
  return d_hidden, d_head, None, None, None, None


_sums: Any = jax.custom_vjp(_sums_only, nondiff_argnums=(6,))
_sums.defvjp(_sums_with_gradients, _scale_gradients, symbolic_zeros=True)
