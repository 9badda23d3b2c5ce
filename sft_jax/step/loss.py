"""Masked next-token cross-entropy, as sums, without a batch's logits.

`Objective` is the formula of a token and its gradient, `linear_cross_entropy`
works off the trained tokens in chunks, and `_logits` to `_gradient` are the
arithmetic of one chunk.

Axes: B batch, T position, D model, V vocabulary; W the tokens of one chunk; w a
token's weight, y its target.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from sft_jax.common.batch import AnyArray
from sft_jax.step.distillation import Divergence


class Objective(NamedTuple):
  """What is minimized of a token with logits z and target y.

      f * ((1 - e) nll(y) + e mean_v nll(v)) + c log_z^2 + k KL(p_0 || p),
      nll(v) = log_z - z[v],  log_z = logsumexp(z),  p = softmax(z)

  with p_0 the prediction of the base or a teacher, and its gradient, f taken as
  a constant,

      (f + 2 c log_z) p - f (1 - e) onehot(y) - f e / V + k (p - p_0).

  By default it is nll(y). The divergence is in `_compare`; any other term of a
  token is one more summand in `loss` and in `slopes`.

  Attributes:
    z_loss: c; keeps log_z near 0 (PaLM, arXiv 2204.02311, section 5).
    label_smoothing: e; share of the target spread over the vocabulary (Szegedy
      et al., arXiv 1512.00567, section 7).
    dft: f is p[y] and not 1: dynamic fine-tuning, in which unlikely targets
      pull less (Wu et al., arXiv 2508.05629).
    kl: k; what the base held likely must stay likely; KL(p || p_0) would let
      the model drop all but one of its answers.
    ce: f is multiplied by it: 0 leaves what the teacher says alone.
    divergence: what stands for KL(p_0 || p) beside a teacher.
  """

  z_loss: float | int = 0.0
  label_smoothing: float | int = 0.0
  dft: bool = False
  kl: float | int = 0.0
  ce: float | int = 1.0
  divergence: Divergence = Divergence()

  def loss(self, z: Array, log_z: Array, nll: Array) -> Array:
    """Each token's, without the divergence; z is [W, V], the others [W]."""
    e = self.label_smoothing
    smooth = (1 - e) * nll + e * (log_z - z.mean(axis=-1)) if e else nll
    factor = self.ce * (jnp.exp(-nll) if self.dft else 1.0)
    return factor * smooth + self.z_loss * jnp.square(log_z)

  def slopes(
    self, log_z: Array, nll: Array, size: int
  ) -> tuple[Array, Array, Array]:
    """(a, b, s): the gradient is a p - b onehot(y) - s, but for divergence."""
    factor = self.ce * (jnp.exp(-nll) if self.dft else jnp.ones_like(nll))
    e = self.label_smoothing
    a = factor + 2 * self.z_loss * log_z
    return a, factor * (1 - e), factor * (e / size)


NATS = Objective()

# A loss of one's own: (hidden [W, D], head [V, D], targets [W], weights [W],
# segment_ids [W]) -> (objective, {name: sum}), scalars over the W tokens of a
# chunk, which the step divides by the weight of the whole batch. Every summand
# must be multiplied by the token's weight, which is 0 where a chunk is filled
# up. Keyword-only parameters are given more arrays of the same tokens, see
# `extra_names`, and `softcap`.
Loss = Callable[..., tuple[Array, dict[str, Array]]]


def extra_names(loss: Objective | Loss) -> tuple[str, ...]:
  """Names of the keyword-only parameters of a loss of one's own.

  >>> extra_names(lambda h, e, y, w, s, *, sources: (w.sum(), {}))
  ('sources',)
  """
  if isinstance(loss, Objective):
    return ()
  parameters = inspect.signature(loss).parameters.values()
  return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


class GroupSums(NamedTuple):
  """The sums of `LossSums` for each group of tokens; see there."""

  nats: Float32[Array, " groups"]
  weight: Float32[Array, " groups"]
  correct: Float32[Array, " groups"]


class BaseSums(NamedTuple):
  """The tuned model's predictions against the base's, over trained tokens.

  Attributes:
    kl: sum of w * KL(base || tuned), in nats.
    top1_agreement: of w where both have the same most likely token.
    base_correct: of w where the base's most likely token is the target.
    both_correct: of w where that of both models is.
  """

  kl: Float32[Array, ""]
  top1_agreement: Float32[Array, ""]
  base_correct: Float32[Array, ""]
  both_correct: Float32[Array, ""]


class LossSums(NamedTuple):
  """Sums over the trained tokens of a batch, not yet divided.

  Attributes:
    objective: what is minimized, the only one that carries a gradient.
    nats: sum of w * nll, in nats, whatever the objective.
    weight: sum of w, the one denominator of every mean.
    correct: sum of w over tokens whose most likely prediction is right.
    entropy: sum of w times the entropy of the prediction, in nats.
    groups: nats, weight and correct of each group of tokens.
    base: the comparison with the base; None without a base.
    named: the sums of a loss of one's own.
    count: what objective and named are divided by; None is `weight`.
  """

  objective: Float32[Array, ""]
  nats: Float32[Array, ""]
  weight: Float32[Array, ""]
  correct: Float32[Array, ""]
  entropy: Float32[Array, ""]
  groups: GroupSums
  base: BaseSums | None = None
  named: dict[str, Array] | None = None
  count: Float32[Array, ""] | None = None


class HeadRows(NamedTuple):
  """A frozen head of which some rows train: the table with these rows in it,
  their ids, and the rows alone, float32, which receive the gradient."""

  table: Float[AnyArray, "V D"]
  ids: Int32[AnyArray, " N"]
  rows: Float[AnyArray, "N D"]


# The base's hidden states and head; its width C may be another.
Base = tuple[Float[AnyArray, "B T C"], Any]


class _Static(NamedTuple):
  objective: Objective | Loss
  softcap: float | int | None
  width: int
  num_groups: int
  rows: NamedSharding | None


def linear_cross_entropy(
  hidden: Float[AnyArray, "B T D"],
  head: Float[AnyArray, "V D"] | HeadRows,
  targets: Int32[AnyArray, "B T"],
  weights: Float32[AnyArray, "B T"],
  groups: Int32[AnyArray, "B T K"] | None = None,
  *,
  base: Base | None = None,
  num_groups: int = 0,
  objective: Objective | Loss = NATS,
  extras: dict[str, Array] | None = None,
  chunk_tokens: int = 512,
  softcap: float | int | None = None,
  rows: NamedSharding | None = None,
) -> LossSums:
  """Cross-entropy of `hidden @ head.T` against `targets`, weighted, summed.

      nll = logsumexp(z) - z[target],  z = hidden @ head.T  (float32)

  Only trained tokens, those with a weight, meet the head. They are listed, and
  the list is worked off in chunks until its end; here with chunks of 2:

      weights [B T]    0 1 1 0 | 0 0 0 1
      listed           1 2 | 7 -        two chunks, and not four

  Each chunk's gradient is formed while its logits exist, so that the backward
  pass only scales (the idea of Liger Kernel, arXiv 2410.10989); the head's own,
  a third of the work, only where the head trains (`symbolic_zeros`).

  Args:
    hidden: the model's last hidden states, any float dtype.
    head: the unembedding, or a frozen one with some rows that train.
    targets: ids in [0, V), also where the weight is 0.
    weights: of each prediction; what stands where it is 0 changes nothing, not
      even NaN.
    groups: the groups of each token, ids in [0, num_groups); -1 is none.
    base: the base's hidden states of the same tokens, and its head: constants.
    objective: what is minimized; its `kl` needs a base. Of a `Loss` of one's
      own the gradient is taken chunk by chunk, at the price of the chunk's
      logits once more.
    extras: {name: array [B, T, ...]} for a `Loss`, its segment_ids among them.
    chunk_tokens: tokens of a chunk; changes memory, not results.
    softcap: bends logits to softcap * tanh(z / softcap) (Gemma 2).
    rows: how [B, T] is divided over a mesh. Each device then lists its own
      tokens, the head is gathered once, and its gradient added up once. None:
      one device, or XLA decides, which moves more.

  Raises ValueError: an objective that compares with the base, and no base; a
  loss of one's own with a parameter that there is no array for.
  """
  extras = {"segment_ids": jnp.zeros(targets.shape, jnp.int32)} | (extras or {})
  wanted = {"segment_ids", *extra_names(objective)}
  if unknown := wanted - extras.keys() - {"softcap"}:
    raise ValueError(
      f"loss: got the keyword-only parameters {sorted(unknown)}, expected "
      f"some of {sorted(extras.keys() | {'softcap'})}. Rename them."
    )
  extras = {name: extras[name] for name in wanted & extras.keys()}
  extras = jax.lax.stop_gradient(extras)
  if isinstance(objective, Objective) and objective.kl and base is None:
    raise ValueError(
      f"loss: objective.kl is {objective.kl} without a base; expected its "
      "hidden states and head. Pass base, or set kl to 0."
    )
  if groups is None:
    groups = jnp.zeros((*targets.shape, 0), jnp.int32)
  static = _Static(objective, softcap, max(1, chunk_tokens), num_groups, rows)
  base = jax.lax.stop_gradient(base)
  with jax.named_scope("loss_head"):
    value, table, versus, named = _sums(
      hidden, head, targets, weights, groups, base, extras, static
    )
  nats, weight, correct, entropy = table
  return LossSums(
    *(value, nats[0], weight[0], correct[0], entropy[0]),
    GroupSums(nats[1:], weight[1:], correct[1:]),
    None if versus is None else BaseSums(*versus),
    None if isinstance(objective, Objective) else named,
  )


def _local_sums(
  *arrays: Any, static: _Static, to_hidden: bool, to_head: bool
) -> tuple[Array, Array, Array | None, dict, Array | None, Array | None]:
  """(objective, table, base's, named, d hidden, d head) of a device's tokens;
  gradients that are not requested are None."""
  hidden, head, targets, weights, groups, base, extras = arrays
  shape, n, axes = hidden.shape, targets.size, _axes(static.rows)
  objective: Any = static.objective
  own_loss = None if isinstance(objective, Objective) else objective
  ids: Any = None
  if isinstance(head, HeadRows):
    head, ids = jnp.asarray(head.table), head.ids
  hidden, y, w, groups, extras = jax.tree.map(
    lambda x: jnp.reshape(x, (n, *x.shape[2:])),
    (hidden, targets, weights, groups, extras),
  )
  base_hidden = None if base is None else base[0].reshape(n, -1)
  trained = w != 0
  listed = jnp.argsort(~trained, stable=True)
  count = trained.sum()
  # Past the list's end is no token at all: reading there gives zeros.
  listed = jnp.where(jnp.arange(n) < count, listed, n)
  width = min(static.width, n)
  listed = jnp.pad(listed, (0, width), constant_values=n)

  def own(h: Array, head: Array, y: Array, w: Array, extras: dict):
    """The loss of one's own, of a chunk."""
    assert own_loss
    known = extras | {"softcap": static.softcap}
    keywords = {name: known[name] for name in extra_names(objective)}
    found = own_loss(h, head, y, w, extras["segment_ids"], **keywords)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), found)

  def step(i, carry):
    value, table, versus, named, d_hidden, d_head = carry
    at = jax.lax.dynamic_slice_in_dim(listed, i * width, width)
    take = lambda x: jnp.take(x, at, axis=0, mode="fill", fill_value=0)
    h, y_, w_ = take(hidden), take(y), take(w)
    found = _logits(h, head, y_, static.softcap)
    table += _table(found, w_, take(groups), static.num_groups)
    known = None
    if base is not None:
      was = _logits(take(base_hidden), base[1], y_, static.softcap)
      known = _compare(was, found, static.objective)
      versus += (w_ * known.table).sum(axis=-1)
    d_h: Any = None
    d_e: Any = None
    if own_loss is None:
      value += (w_ * objective.loss(found.z, found.log_z, found.nll)).sum()
      if objective.kl and known is not None:
        value += objective.kl * (w_ * known.value).sum()
      if to_hidden or to_head:
        # In the compute dtype: these products are as large as the forward's.
        d_z = _gradient(found, y_, w_, objective, static.softcap, known)
        d_z = d_z.astype(h.dtype)
      if to_hidden:
        d_h = jnp.einsum("wv,vd->wd", d_z, head)
      if to_head:
        of_rows = d_z if ids is None else d_z[:, ids]
        d_e = jnp.einsum(
          "wv,wd->vd", of_rows, h, preferred_element_type=jnp.float32
        )
    else:
      arguments = (h, head, y_, w_, jax.tree.map(take, extras))
      if to_hidden or to_head:
        gradient = jax.value_and_grad(own, (0, 1), has_aux=True)
        (loss, sums), (d_h, d_e) = gradient(*arguments)
        d_e = d_e if ids is None else d_e[ids]
      else:
        loss, sums = own(*arguments)
      value, named = value + loss, jax.tree.map(jnp.add, named, sums)
    if to_hidden:
      d_hidden = jax.lax.dynamic_update_slice_in_dim(
        d_hidden, d_h.astype(h.dtype), i * width, 0
      )
    if to_head:
      d_head += d_e.astype(jnp.float32)
    return value, table, versus, named, d_hidden, d_head

  chunks = -(-count // width)
  if axes:
    # As many on every device: collectives inside must meet.
    chunks = jax.lax.pmax(chunks, axes)
  rows = len(head if ids is None else ids)
  names: dict[str, Any] = {}
  if own_loss:
    cut = lambda x: jax.ShapeDtypeStruct((width, *x.shape[1:]), x.dtype)
    chunk = jax.tree.map(cut, (hidden, y, w, extras))
    names = jax.eval_shape(own, chunk[0], head, *chunk[1:])[1]
  zero = lambda *shape: jnp.zeros(shape, jnp.float32)
  carry = (
    zero(),
    zero(4, 1 + static.num_groups),
    None if base is None else zero(len(BaseSums._fields)),
    {name: zero() for name in names},
    jnp.zeros((n + width, shape[-1]), hidden.dtype) if to_hidden else None,
    zero(rows, shape[-1]) if to_head else None,
  )
  *sums, d_hidden, d_head = jax.lax.fori_loop(0, chunks, step, carry)
  if to_hidden:
    place = jnp.cumsum(trained) - 1
    d_hidden = jnp.where(trained[:, None], d_hidden[place], 0).reshape(shape)
  if axes:
    sums, d_head = jax.lax.psum((sums, d_head), axes)
  return *sums, d_hidden, d_head


def _axes(rows: NamedSharding | None) -> tuple[str, ...]:
  """Names of the mesh axes that divide [B, T]; () if none does."""
  if rows is None:
    return ()
  parts = [p for p in rows.spec if p is not None]
  axes = [a for p in parts for a in (p if isinstance(p, tuple) else (p,))]
  return tuple(axes) if any(rows.mesh.shape[a] > 1 for a in axes) else ()


def _on_devices(*arrays, **choices):
  """`_local_sums`, where `rows` says so on each device with its own tokens."""
  local_sums = partial(_local_sums, **choices)
  rows = choices["static"].rows
  axes = _axes(rows)
  if not axes:
    return local_sums(*arrays)
  none = PartitionSpec()
  of_base = None if arrays[5] is None else (rows.spec, none)
  # Axes that are not named, such as 'tensor', are left to XLA.
  return jax.shard_map(
    local_sums,
    mesh=rows.mesh,
    axis_names=set(axes),
    in_specs=(rows.spec, none, *[rows.spec] * 3, of_base, rows.spec),
    out_specs=(none, none, none, none, rows.spec, none),
    check_vma=False,
  )(*arrays)


def _sums_only(*arguments):
  *arrays, static = arguments
  return _on_devices(*arrays, static=static, to_hidden=False, to_head=False)[:4]


def _sums_with_gradients(*arguments):
  *arrays, static = arguments
  hidden, head = arrays[:2]
  given = lambda x: hasattr(x, "perturbed")
  values = jax.tree.map(lambda x: x.value, arrays, is_leaf=given)
  trained: Any = head.rows if isinstance(head, HeadRows) else head
  *sums, d_hidden, d_head = _on_devices(
    *values,
    static=static,
    to_hidden=hidden.perturbed,
    to_head=trained.perturbed,
  )
  if d_head is not None:
    d_head = d_head.astype(trained.value.dtype)
    if isinstance(head, HeadRows):
      nothing: Any = None
      d_head = HeadRows(nothing, nothing, d_head)
  return tuple(sums), (d_hidden, d_head)


def _scale_gradients(static, gradients, cotangents):
  del static
  d_value: Any = cotangents[0]
  scale = lambda g: (g.astype(jnp.float32) * d_value).astype(g.dtype)
  d_hidden, d_head = jax.tree.map(scale, gradients)
  return d_hidden, d_head, None, None, None, None, None


_sums: Any = jax.custom_vjp(_sums_only, nondiff_argnums=(7,))
_sums.defvjp(_sums_with_gradients, _scale_gradients, symbolic_zeros=True)


# -- One chunk of tokens ------------------------------------------------------


class _Logits(NamedTuple):
  """Logits and softmax [W, V] of a chunk; the rest [W], entropy in nats."""

  z: Array
  softmax: Array
  log_z: Array
  nll: Array
  correct: Array
  entropy: Array


class _Comparison(NamedTuple):
  """A table [4, W], its rows as `BaseSums`; the divergence [W], its slope."""

  table: Array
  value: Array
  slope: Array


def _logits(h: Array, head: Array, y: Array, softcap) -> _Logits:
  """Of hidden states [W, D] under a head [V, D], in float32."""
  z = jnp.einsum("wd,vd->wv", h, head, preferred_element_type=jnp.float32)
  if softcap is not None:
    z = softcap * jnp.tanh(z / softcap)
  top = z.max(axis=-1)
  # One exponential of each logit serves both sums, which are one pass over
  # the logits, and the gradient.
  centered = z - top[:, None]
  share = jnp.exp(centered)
  total = share.sum(axis=-1)
  entropy = jnp.log(total) - (share * centered).sum(axis=-1) / total
  softmax = share / total[:, None]
  log_z = top + jnp.log(total)
  z_target = jnp.take_along_axis(z, y[:, None], axis=-1)[:, 0]
  # Ties count as correct: a maximum is cheaper than an argmax.
  correct = (z_target >= top).astype(jnp.float32)
  return _Logits(z, softmax, log_z, log_z - z_target, correct, entropy)


def _table(found: _Logits, w: Array, groups: Array, num_groups: int) -> Array:
  """[4, 1 + groups]: nats, weight, correct, entropy; of all, of each group."""
  ones = jnp.ones_like(w)
  values = w * jnp.stack([found.nll, ones, found.correct, found.entropy])
  member = jax.nn.one_hot(groups, num_groups).sum(axis=1)
  member = jnp.concatenate([jnp.ones((len(w), 1)), member], axis=1)
  return jnp.matmul(values, member, precision="highest")


def _compare(
  base: _Logits, tuned: _Logits, objective: Objective | Loss
) -> _Comparison:
  """KL(base || tuned) of each token, and whether the top tokens agree.

  sum_v p(v) (log p(v) - log q(v)),  p the base's and q the tuned softmax
  """
  gap = (base.z - base.log_z[:, None]) - (tuned.z - tuned.log_z[:, None])
  kl = (base.softmax * gap).sum(axis=-1)
  best = base.z.argmax(axis=-1)[:, None]
  agree = jnp.take_along_axis(tuned.z, best, axis=-1)[:, 0] >= tuned.z.max(-1)
  both = base.correct * tuned.correct
  table = jnp.stack([kl, agree.astype(jnp.float32), base.correct, both])
  kind = isinstance(objective, Objective) and objective.divergence
  if not kind or kind == Divergence():
    return _Comparison(table, kl, tuned.softmax - base.softmax)
  return _Comparison(table, *kind(base.z, tuned.z))


def _gradient(
  found: _Logits,
  y: Array,
  w: Array,
  objective: Objective,
  softcap,
  known: _Comparison | None,
) -> Array:
  """d (sum of w * objective) / d z, [W, V] float32, z before the soft cap."""
  size = found.z.shape[-1]
  slopes = objective.slopes(found.log_z, found.nll, size)
  a, b, s = ((w * slope)[:, None] for slope in slopes)
  d_z = a * found.softmax - b * jax.nn.one_hot(y, size)
  if objective.label_smoothing:
    d_z -= s
  if objective.kl and known is not None:
    d_z += objective.kl * w[:, None] * known.slope
  if softcap is not None:
    d_z *= 1 - jnp.square(found.z / softcap)
  return d_z
