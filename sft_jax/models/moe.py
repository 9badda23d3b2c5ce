"""Mixture of experts: a router sends each token through k of E small MLPs.

No expert has a capacity and no token is dropped, so packing and padding change
nothing. Tokens are sorted by expert, so that each expert multiplies one block
of rows; here 3 tokens of k = 2 and E = 3:

    experts [M k]           2 0 | 2 1 | 0 2        of tokens 0, 1, 2
    sorted by expert        0 0 | 1 | 2 2 2        sizes [2 1 3]
    rows are of tokens      0 2 | 1 | 0 1 2
    grouped_matmul x 3, back to the order of tokens, weighed and added

The load-balancing loss of pretraining is not added: it would pull the router
from what the data say (transformers adds it on `output_router_logits` only).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from sft_jax.common import sharding
from sft_jax.models.attention import parallel
from sft_jax.models.layers.grouped import grouped_matmul, permute
from sft_jax.models.layers.linear import Dtype, adapter_scale, dense
from sft_jax.models.lora.lora import LoraConfig
from sft_jax.models.remat import PROJECTION


class Routing(NamedTuple):
  """How a router chooses experts and weighs them."""

  k: int  # Experts of each token.
  normalize: bool = True  # The k shares sum to one.
  sigmoid: bool = False  # Scores are sigmoids, else a softmax, of logits.
  groups: int = 1  # The experts are in so many groups, of equal size.
  top_groups: int = 1  # Experts are chosen from this many groups alone.
  best: int = 2  # A group is as good as the sum of its so many best scores.
  scale: float = 1.0  # Multiplies the shares.


def route(
  logits: Float32[Array, "... E"],
  routing: Routing,
  correction: Float[Array, " E"] | None = None,
) -> tuple[Float32[Array, "... k"], Int32[Array, "... k"]]:
  """The k best experts of each token, and their shares.

  A `correction` decides with the scores who is chosen, and weighs nothing (Wang
  et al. 2024, arXiv:2408.15664); groups are those of DeepSeek-V3
  (arXiv:2412.19437, 2.1.2).
  """
  r = routing
  if not r.sigmoid and correction is None and r.groups == 1 and r.scale == 1:
    top, experts = jax.lax.top_k(logits, r.k)
    if r.normalize:
      return jax.nn.softmax(top, axis=-1), experts
    return jnp.exp(top - jax.nn.logsumexp(logits, -1, keepdims=True)), experts
  scores = nn.sigmoid(logits) if r.sigmoid else jax.nn.softmax(logits, axis=-1)
  choice = scores
  if correction is not None:
    choice = scores + correction.astype(jnp.float32)
  if r.groups > 1:
    grouped = choice.reshape(*choice.shape[:-1], r.groups, -1)
    best = jax.lax.top_k(grouped, r.best)[0].sum(-1)
    chosen = jax.lax.top_k(best, r.top_groups)[1]
    inside = jax.nn.one_hot(chosen, r.groups, dtype=bool).any(-2)
    grouped = jnp.where(inside[..., None], grouped, -jnp.inf)
    choice = grouped.reshape(choice.shape)
  experts = jax.lax.top_k(choice, r.k)[1]
  shares = jnp.take_along_axis(scores, experts, axis=-1)
  if r.normalize:
    total = jnp.sum(shares, axis=-1, keepdims=True)
    shares = shares / jnp.maximum(total, 1e-20)
  return shares * r.scale, experts


def clipped_swiglu(
  gate: jax.Array, up: jax.Array, *, alpha: float, limit: float
) -> jax.Array:
  """gate sigmoid(alpha gate) (up + 1) of gpt-oss; gate is clipped from above
  only."""
  gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
  return gate * nn.sigmoid(alpha * gate) * (up + 1)


class Weights(NamedTuple):
  """What multiplies the rows of each expert: x W + b + scale * (x A) B."""

  kernel: Any  # [E, in, out], or the codes and scales that stand in for it.
  bias: Any = None  # [E, out] or None.
  a: Any = None  # LoRA's [E, in, R] or None.
  b: Any = None  # LoRA's [E, R, out] or None.
  factor: Any = None  # [E]; shares of an expert are multiplied by its own.


class ExpertLinear(nn.Module):
  """Holds the `Weights` of E linear maps, as `Linear` holds those of one."""

  num_experts: int
  features: int
  use_bias: bool = False
  init_std: float = 0.02
  lora: LoraConfig | None = None
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, in_features: int) -> Weights:
    shape = (self.num_experts, in_features, self.features)
    normal = nn.initializers.normal(self.init_std)
    if self.has_variable("params", "kernel_codes"):
      leaf = lambda name: self.get_variable("params", name)
      kernel = leaf("kernel_codes"), leaf("kernel_scale")
    else:
      kernel = self.param("kernel", normal, shape, self.param_dtype)
      kernel = kernel.astype(self.dtype)
    bias = a = b = None
    if self.use_bias:
      zeros = nn.initializers.zeros
      bias = self.param("bias", zeros, shape[::2], self.param_dtype)
    if self.has_variable("params", "lora_a"):
      a = self.get_variable("params", "lora_a")
      scale = adapter_scale(self.lora, self.path)
      b = scale * self.get_variable("params", "lora_b")
    bias, a, b = jax.tree.map(lambda x: x.astype(self.dtype), (bias, a, b))
    return Weights(kernel, bias, a, b)


class Moe(nn.Module):
  """sum over the k chosen experts of share * down(activation(gate, up)),
  or without a gate of share * down(activation(up))."""

  num_experts: int  # E.
  routing: Routing  # See `route`.
  d_ff: int  # F, width of each expert.
  activation: Callable[..., jax.Array]  # Of [M, F] of `gate` and `up`.
  gated: bool = True  # There is a gate.
  correction: int = 0  # Axes of the router's in the files; 0: none.
  shared: Callable[[], nn.Module] | None = None  # Makes the shared expert.
  # Of what the router reads, times D ** -0.5 too (Gemma 4); then an expert's
  # shares are multiplied by a factor of its own.
  router_norm: Callable[..., nn.Module] | None = None
  use_bias: bool = False  # Router and experts have biases.
  init_std: float = 0.02  # Scale of fresh weights.
  out_std: float = 0.02  # Scale of fresh `down` weights.
  lora: LoraConfig | None = None  # What the adapters are, if there are any.
  # Where the tokens of a batch are divided over devices, so that each sorts its
  # own; its axis 'tensor' divides F, 'expert' E. Without it the result is the
  # same, but XLA gathers all tokens on every device.
  mesh: Mesh | None = None
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], seen: Float[Array, "B T D"] | None = None
  ) -> Float[Array, "B T D"]:
    """What the experts say of x; the router reads `seen`, or x."""
    (B, T, D), E, F = x.shape, self.num_experts, self.d_ff
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = x.astype(self.dtype)
    router = Router(
      *(E, self.use_bias, self.init_std, self.correction),
      **dtypes,
      name="router",
    )
    read: Any = x if seen is None else seen
    if self.router_norm:
      read = self.router_norm(name="router_norm")(read) * D**-0.5
    logits, correction = router(read)

    def linear(name, features, init_std):
      return ExpertLinear(
        E, features, self.use_bias, init_std, self.lora, **dtypes, name=name
      )

    names = ("gate", "up") if self.gated else ("up",)
    weights = [linear(name, F, self.init_std)(D) for name in names]
    weights.append(linear("down", D, self.out_std)(F))
    if self.router_norm:
      ones = nn.initializers.ones
      factor = self.param("per_expert_scale", ones, (E,), self.param_dtype)
      weights[-1] = weights[-1]._replace(factor=factor)
    routed = partial(route, routing=self.routing, correction=correction)
    mix = partial(_mix, routed=routed, act=self.activation)
    mesh, even = self.mesh, parallel.divides(self.mesh, B, T)
    sizes = mesh.shape if mesh is not None else {"expert": 1, "tensor": 1}
    even = even and not (E % sizes["expert"] or F % sizes["tensor"])
    if mesh is not None and even:
      mix = _on_mesh(mix, mesh, weights)

    def decoded(x, logits, *weights: Weights):
      """Kernels as they multiply, whatever they are kept as."""
      kernels = [dense(w.kernel, x.dtype) for w in weights]
      pairs = zip(weights, kernels, strict=True)
      return mix(x, logits, *(w._replace(kernel=k) for w, k in pairs))

    if isinstance(weights[0].kernel, tuple):
      # As in `linear`: or the decoded kernels wait for the backward pass.
      decoded = jax.checkpoint(decoded)
    y = decoded(x, logits, *weights).astype(self.dtype)
    return y + self.shared()(x) if self.shared else y


class Router(nn.Module):
  """x W + b in float32: near ties decide which experts a token sees."""

  num_experts: int
  use_bias: bool
  init_std: float
  correction: int
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"]
  ) -> tuple[Float32[Array, "B T E"], Float[Array, " E"] | None]:
    shape = (x.shape[-1], self.num_experts)
    normal = nn.initializers.normal(self.init_std)
    kernel = self.param("kernel", normal, shape, self.param_dtype)
    logits = jnp.matmul(
      x, kernel.astype(self.dtype), preferred_element_type=jnp.float32
    )
    if self.use_bias:
      zeros = nn.initializers.zeros
      bias = self.param("bias", zeros, shape[1:], self.param_dtype)
      logits = logits + bias.astype(jnp.float32)
    if not self.correction:
      return logits, None
    shape = (1,) * (self.correction - 1) + shape[1:]
    zeros = nn.initializers.zeros
    # Small beside its size, and near ties decide: in float32 whatever the rest.
    correction = self.param("correction", zeros, shape, jnp.float32)
    return logits, jax.lax.stop_gradient(correction.reshape(-1))


def _mix(
  x: Float[Array, "B T D"],
  logits: Float32[Array, "B T E"],
  *weights: Weights,
  routed: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  act: Callable[..., jax.Array],
  first: jax.Array | None = None,
) -> Float32[Array, "B T D"]:
  """Sorts tokens by expert, multiplies, sorts back and adds; see above. With
  `first`, the weights are of the experts from there on alone: tokens of others
  are sorted to the end and get 0."""
  *inner, down = weights
  E = len(down.kernel)
  shares, experts = routed(logits)
  if down.factor is not None:
    shares = shares * down.factor.astype(jnp.float32)[experts]
  k, (B, T, _), experts = shares.shape[-1], x.shape, experts.reshape(-1)
  own = None
  if first is not None:
    experts = experts - first
    own = (experts >= 0) & (experts < E)
    experts = jnp.where(own, experts, E)
  order = jnp.argsort(experts, stable=True)
  inverse = jnp.argsort(order)
  sizes = jnp.bincount(experts, length=E)

  def linear(x, w: Weights):
    y = grouped_matmul(x, w.kernel, sizes)
    if w.a is not None:
      low = grouped_matmul(x, w.a, sizes)
      y = y + grouped_matmul(low, w.b, sizes)
    if w.bias is not None:
      y = y + w.bias[experts[order]]
    return checkpoint_name(y, PROJECTION)

  rows = jnp.repeat(x.reshape(B * T, -1), k, axis=0)
  rows = permute(rows, order, inverse)
  rows = linear(act(*(linear(rows, w) for w in inner)), down)
  rows = permute(rows, inverse, order)
  if own is not None:  # Of the rows past the last group anything may be left.
    rows = jnp.where(own[:, None], rows, 0)
  rows = rows.reshape(B, T, k, -1)
  return jnp.einsum("btkd,btk->btd", rows.astype(jnp.float32), shares)


def _on_mesh(mix, mesh: Mesh, weights: list[Weights]):
  """`mix`, each device with its own tokens and its own part of F.

  Where `expert` divides the experts, its n devices gather their tokens, give
  each what their own experts say of it, and add that up where the token is: n -
  1 vectors each way, where an exchange of k copies would need room for the
  worst case.
  """
  n = mesh.shape["expert"]
  wide = Weights(
    kernel=PartitionSpec("expert", None, "tensor"),
    bias=PartitionSpec("expert", "tensor"),
    a=PartitionSpec("expert"),
    b=PartitionSpec("expert", None, "tensor"),
  )
  tall = Weights(
    kernel=PartitionSpec("expert", "tensor"),
    bias=PartitionSpec("expert"),
    a=PartitionSpec("expert", "tensor"),
    b=PartitionSpec("expert"),
    factor=PartitionSpec(),
  )

  def specs(weights: Weights, where: Weights) -> Weights:
    pairs = zip(weights, where, strict=True)
    return Weights(*(None if w is None else spec for w, spec in pairs))

  def local(x, logits, *weights):
    *inner, down = weights
    if down.bias is not None:
      # The parts are added up; one of them brings the bias.
      first = jax.lax.axis_index("tensor") == 0
      down = down._replace(bias=jnp.where(first, down.bias, 0))
    if n == 1:
      return jax.lax.psum(mix(x, logits, *inner, down), "tensor")
    gather = partial(jax.lax.all_gather, axis_name="expert", tiled=True)
    x, logits = map(gather, (x, logits))
    first = jax.lax.axis_index("expert") * len(down.kernel)
    y = mix(x, logits, *inner, down, first=first)
    return jax.lax.psum(jax.lax.psum_scatter(y, "expert", tiled=True), "tensor")

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(
      *(sharding.SLOTS, sharding.SLOTS),
      *(specs(w, wide) for w in weights[:-1]),
      specs(weights[-1], tall),
    ),
    out_specs=sharding.SLOTS,
    check_vma=False,
  )
