"""One layer of the decoder, its norms and embedding, and what layers share.

Parameters are kept in `param_dtype` and cast to `dtype` where they are used.
Of a norm and of an activation the backward pass keeps the input alone and
computes the rest again: the results in between are as large as the input and
take longer to write and to read than to compute.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sft_jax.common import sharding
from sft_jax.models import kv_cache, rope
from sft_jax.models.attention import parallel
from sft_jax.models.attention.attention import attention, attention_mask, choose
from sft_jax.models.attention.latent import LatentAttention
from sft_jax.models.config import ModelConfig
from sft_jax.models.layers.delta_net import DeltaNet
from sft_jax.models.layers.linear import Linear
from sft_jax.models.layers.mamba2 import Mamba2
from sft_jax.models.layers.short_conv import GatedConv
from sft_jax.models.lora import quantize
from sft_jax.models.lora.lora import LoraConfig
from sft_jax.models.moe import Moe, Routing, clipped_swiglu
from sft_jax.models.remat import BLOCK_INPUT

Dtype = Any

_ACTIVATIONS = {
  "silu": nn.silu,
  "gelu_tanh": partial(nn.gelu, approximate=True),
}


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * (offset + scale), in float32.

  The mean is over the last axis. With an offset of 1 (Gemma) the scale is what
  the factor differs from 1 by.
  """

  eps: float
  offset: float = 0.0
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    init = nn.initializers.constant(1 - self.offset)
    scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
    return jax.checkpoint(self._normalise)(x, scale)

  def _normalise(self, x: Array, scale: Array) -> Array:
    x = x.astype(jnp.float32)
    factor = scale.astype(jnp.float32) + self.offset
    return (x * _inverse_root(x, self.eps) * factor).astype(self.dtype)


class LayerNorm(nn.Module):
  """(x - mean) / sqrt(variance + eps) * scale + bias, in float32."""

  eps: float
  use_bias: bool = True
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    scale = self.param("scale", ones, (x.shape[-1],), self.param_dtype)
    bias = jnp.zeros(())
    if self.use_bias:
      bias = self.param("bias", zeros, (x.shape[-1],), self.param_dtype)
    return jax.checkpoint(self._normalise)(x, scale, bias)

  def _normalise(self, x: Array, scale: Array, bias: Array) -> Array:
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    y = x * _inverse_root(x, self.eps) * scale.astype(jnp.float32)
    return (y + bias.astype(jnp.float32)).astype(self.dtype)


def _inverse_root(x: Array, eps: float) -> Array:
  """1 / sqrt(mean(x^2) + eps), over the last axis, which stays."""
  mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return jax.lax.rsqrt(mean + eps)


Norm = RMSNorm | LayerNorm


def norm_of(config: ModelConfig, **dtypes: Dtype) -> partial[Norm]:
  """The norm of a model's residual stream; call it with a module's name."""
  if config.norm == "layer":
    return partial(LayerNorm, config.norm_eps, config.norm_bias, **dtypes)
  return partial(RMSNorm, config.norm_eps, config.norm_offset, **dtypes)


class Embed(nn.Module):
  """A table [V, D] of token vectors.

  An id outside the vocabulary gives NaN, which is seen; the clamping of plain
  indexing would give another token's vector, which is not. Rows that train
  alone, `lora_rows` [N, D], stand for those of `token_rows`.
  """

  vocab_size: int
  features: int
  init_std: float = 0.02
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32
  token_rows: tuple[int, ...] = ()

  @nn.compact
  def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    x = self._frozen(tokens)
    if not self.has_variable("params", "lora_rows"):
      return x
    rows = self.get_variable("params", "lora_rows")
    ids = jnp.array(self.token_rows)
    at = jnp.minimum(jnp.searchsorted(ids, tokens), len(ids) - 1)
    own = (ids[at] == tokens)[..., None]
    return jnp.where(own, rows.astype(self.dtype)[at], x)

  def _frozen(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    # jnp.take counts negative ids from the end; send them outside instead.
    tokens = jnp.where(tokens < 0, self.vocab_size, tokens)
    rows = lambda leaf: jnp.take(leaf, tokens, axis=0, mode="fill")
    if self.has_variable("params", "embedding_codes"):
      leaves = self.variables["params"]
      codes, scale = leaves["embedding_codes"], leaves["embedding_scale"]
      # Codes are whole numbers and fill with one; the scale fills with NaN.
      return quantize.decode(rows(codes), rows(scale), self.dtype, axis=-1)
    table = self.param(
      "embedding",
      nn.initializers.normal(self.init_std),
      (self.vocab_size, self.features),
      self.param_dtype,
    )
    return rows(table).astype(self.dtype)


def embedding_table(
  leaves: dict[str, Any], dtype: Dtype, token_rows: tuple[int, ...] = ()
) -> Float[Array, "V D"]:
  """The whole table of an `Embed`, decoded to `dtype` if it is quantized."""
  if "embedding_codes" in leaves:
    codes, scale = leaves["embedding_codes"], leaves["embedding_scale"]
    whole = quantize.decode(codes, scale, dtype, axis=-1)
  else:
    whole = leaves["embedding"]
  if "lora_rows" in leaves:
    rows = leaves["lora_rows"].astype(dtype)
    whole = whole.astype(dtype).at[jnp.array(token_rows)].set(rows)
  return whole


class Shared(NamedTuple):
  """What layers of one kind share; stacked, if there are several kinds.

  Attributes:
    q_rotation: cosine and sine that rotate queries.
    k_rotation: those that rotate keys: the new ones, or all of a cache (see
      `cache_unrotated_keys`).
    mask: see `attention.attention_mask`.
  """

  q_rotation: rope.Rotation
  k_rotation: rope.Rotation
  mask: jax.Array


class Context(NamedTuple):
  """What all layers share, computed once, whatever their number.

  Attributes:
    starts: [B, T], the first token of each document.
    valid: [B, T], False of padding.
  """

  q_positions: jax.Array
  kv_positions: jax.Array
  q_segment_ids: jax.Array
  kv_segment_ids: jax.Array
  shared: Shared
  starts: jax.Array
  valid: jax.Array

  def of_kind(self, config: ModelConfig, kind) -> "Context":
    """What layers of a kind share; `kind` may be traced."""
    if len(config.kinds) == 1:
      return self
    mine = jax.tree.map(lambda x: x[kind], self.shared)
    return self._replace(shared=mine)


def cache_unrotated_keys(config: ModelConfig) -> bool:
  """True if a cache holds keys as they were before their rotation.

  Where angles depend on the length of a document, its earlier keys are rotated
  again whenever it grows.
  """
  return any(kind.rope and kind.rope.by_length for kind in config.kinds)


def make_context(
  config: ModelConfig,
  q_positions: jax.Array,
  kv_positions: jax.Array,
  q_segment_ids: jax.Array,
  kv_segment_ids: jax.Array,
  *,
  backend: str = "auto",
  mesh: Mesh | None = None,
  cached: bool = False,
) -> Context:
  """Angles and masks for one call of the model, one of each kind of layer."""
  own = q_positions
  if not cached:  # Attention sees whole rows; rotation needs its own slots.
    own = parallel.constrain(q_positions, mesh, sharding.SLOTS)
    q_positions, kv_positions, q_segment_ids, kv_segment_ids = (
      parallel.constrain(x, mesh, sharding.WHOLE_ROWS)
      for x in (q_positions, kv_positions, q_segment_ids, kv_segment_ids)
    )
  ids = (q_positions, kv_positions, q_segment_ids, kv_segment_ids)
  starts = q_positions == 0
  if not cached:
    before = jnp.pad(q_segment_ids[:, :-1], ((0, 0), (1, 0)))
    starts = (q_segment_ids != before).at[:, 0].set(True)
  marks = (starts, q_segment_ids > 0)
  backend = choose(
    backend, q_positions.shape[1], in_order=not cached, mesh=mesh
  )
  q_lengths = k_lengths = None
  if cache_unrotated_keys(config):
    q_lengths = _lengths(q_segment_ids, kv_segment_ids, kv_positions)
    k_lengths = _lengths(kv_segment_ids, kv_segment_ids, kv_positions)
  every = []
  for window, by, *_ in config.kinds:
    turned = config.rope_dim or config.head_dim
    rotation = partial(rope.rotation, rope=by, head_dim=turned)
    q_rotation = k_rotation = rotation(own, q_lengths)
    if cached and cache_unrotated_keys(config):
      k_rotation = rotation(kv_positions, k_lengths)
    q_rotation = rope.query_rotation(q_rotation, own, by)
    mask = attention_mask(backend, *ids, window)
    every.append(Shared(q_rotation, k_rotation, mask))
  if len(every) == 1:
    return Context(*ids, every[0], *marks)
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *every)
  return Context(*ids, stacked, *marks)


def _lengths(
  segment_ids: jax.Array, kv_segment_ids: jax.Array, kv_positions: jax.Array
) -> jax.Array:
  """How long the document of each token is: its last position, plus one."""
  same = segment_ids[:, :, None] == kv_segment_ids[:, None, :]
  last = jnp.max(jnp.where(same, kv_positions[:, None, :], 0), axis=-1)
  return last + 1


class Attention(nn.Module):
  """Projections, norms and rotation around `attention.attention`."""

  config: ModelConfig
  linear: Callable[..., Linear]
  norm: Callable[..., RMSNorm]
  backend: str
  mesh: Mesh | None
  param_dtype: Dtype

  @nn.compact
  def __call__(self, x, context: Context, kv, layer, kind):
    c = self.config
    B, T, _ = x.shape
    N, K, H = c.num_heads, c.num_kv_heads, c.head_dim
    q = self.linear(N * H * (1 + c.attn_gate), c.qkv_bias, name="q")(x)
    gate = None
    if c.attn_gate:
      q, gate = jnp.split(q.reshape(B, T, N, 2 * H), 2, axis=-1)
    k = self.linear(K * H, c.qkv_bias, name="k")(x)
    v = self.linear(K * H, c.qkv_bias, name="v")(x).reshape(B, T, K, H)
    if c.qk_norm == "all":
      q, k = self.norm(name="q_norm")(q), self.norm(name="k_norm")(k)
    q, k = q.reshape(B, T, N, H), k.reshape(B, T, K, H)
    if c.qk_norm == "head":
      q, k = self.norm(name="q_norm")(q), self.norm(name="k_norm")(k)
    shared = context.shared
    rotate = partial(rope.apply, pairs=c.rope_pairs)
    if c.learned_positions:
      rotate = lambda x, at: x
    unrotated = kv is not None and cache_unrotated_keys(c)
    q = rotate(q, shared.q_rotation)
    k = k if unrotated else rotate(k, shared.k_rotation)
    if c.qk_norm == "rotated":
      q, k = self.norm(name="q_norm")(q), self.norm(name="k_norm")(k)
    sinks = None
    if c.attn_sinks:
      normal = nn.initializers.normal(c.init_std)
      sinks = self.param("sinks", normal, (N,), self.param_dtype)
    options = {"scale": c.attn_scale, "softcap": c.attn_softcap, "sinks": sinks}
    if kv is not None:
      kv = kv_cache.write(kv, k, v, layer, context.q_positions)
      later = partial(rotate, at=shared.k_rotation) if unrotated else None
      y = kv_cache.attend(q, kv, layer, shared.mask, rotate=later, **options)
    else:
      attend = partial(
        parallel.attention,
        attention,
        self.mesh,
        q_positions=context.q_positions,
        kv_positions=context.kv_positions,
        q_segment_ids=context.q_segment_ids,
        kv_segment_ids=context.kv_segment_ids,
        backend=self.backend,
        mask=shared.mask,
        in_order=True,
        **options,
      )
      chosen = choose(self.backend, T, in_order=True, mesh=self.mesh)
      if chosen == "splash":
        attend = _with_window(attend, [one.window for one in c.kinds], kind)
      y = attend(q, k, v)
    if gate is not None:
      y = y * nn.sigmoid(gate)
    y = y.reshape(B, T, N * H)
    y = self.linear(c.d_model, c.o_bias, c.out_std, name="o")(y)
    return y, kv


def _with_window(attend, windows: list[int | None], kind):
  """`attend` with the window of a kind of layer, which may be traced.

  For splash, whose windows are part of the program; those of the others are
  in `mask`, as data.
  """
  each = [partial(attend, window=window) for window in windows]
  if len(each) == 1:
    return each[0]
  if isinstance(kind, int):
    return each[kind]
  return lambda q, k, v: jax.lax.switch(kind, each, q, k, v)


class Xielu(nn.Module):
  """a x^2 + beta x above 0 and b (expm1(x) - x) + beta x below, in float32.

  a = softplus(alpha_p) and b = beta + softplus(alpha_n) train, beta does not
  (arXiv:2411.13010). Below, x is at most eps.
  """

  param_dtype: Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "... F"]) -> Float[Array, "... F"]:
    def leaf(name, value, *shape):
      start = nn.initializers.constant(value)
      return self.param(name, start, shape, self.param_dtype)

    # softplus of these is 0.8 and 0.3.
    a, b = leaf("alpha_p", 0.2033, 1), leaf("alpha_n", -1.0502, 1)
    beta, eps = leaf("beta", 0.5), leaf("eps", -1e-6)

    def act(x, *leaves):
      a, b, beta, eps = (leaf.astype(jnp.float32) for leaf in leaves)
      y = x.astype(jnp.float32)
      above = nn.softplus(a) * y * y
      below = (beta + nn.softplus(b)) * (jnp.expm1(jnp.minimum(y, eps)) - y)
      return (jnp.where(y > 0, above, below) + beta * y).astype(x.dtype)

    return jax.checkpoint(act)(x, a, b, beta, eps)


class Mlp(nn.Module):
  """down(act(gate(x)) * up(x)), or without a gate down(act(up(x))).

  `gated`: times sigmoid(share(x)), one number per token.
  """

  config: ModelConfig
  linear: Callable[..., Linear]
  width: int
  param_dtype: Dtype
  gated: bool = False

  @nn.compact
  def __call__(self, x):
    c = self.config
    act = _ACTIVATIONS.get(c.activation) or Xielu(self.param_dtype, name="act")
    up = self.linear(self.width, c.mlp_bias, name="up")(x)
    if c.gated_mlp:
      gate = self.linear(self.width, c.mlp_bias, name="gate")(x)
      up = jax.checkpoint(lambda gate, up: act(gate) * up)(gate, up)
    else:
      up = act(up) if c.activation == "xielu" else jax.checkpoint(act)(up)
    down = self.linear(c.d_model, c.mlp_bias, c.out_std, name="down")
    if self.gated:
      return nn.sigmoid(self.linear(1, name="share")(x)) * down(up)
    return down(up)


def _experts(
  c: ModelConfig,
  lora: LoraConfig | None,
  mesh: Mesh | None,
  shared: Callable[[], nn.Module],
  **dtypes: Dtype,
) -> Moe:
  """The experts that take the place of the MLP."""

  def activation(gate: jax.Array, up: jax.Array) -> jax.Array:
    if c.glu_alpha is not None:
      return clipped_swiglu(gate, up, alpha=c.glu_alpha, limit=c.glu_limit)
    return _ACTIVATIONS[c.activation](gate) * up

  return Moe(
    num_experts=c.num_experts,
    routing=Routing(
      k=c.experts_per_token,
      normalize=c.norm_topk,
      sigmoid=c.router_sigmoid,
      groups=c.router_groups,
      top_groups=c.router_top_groups,
      best=c.router_best,
      scale=c.router_scale,
    ),
    d_ff=c.d_ff,
    activation=jax.checkpoint(activation),
    correction=c.router_correction,
    shared=shared if c.d_ff_shared else None,
    use_bias=c.mlp_bias,
    init_std=c.init_std,
    out_std=c.out_std,
    lora=lora,
    mesh=mesh,
    **dtypes,
    name="moe",
  )


_MIXERS: dict[str, Callable[..., Any]] = {
  "conv": GatedConv,
  "delta": DeltaNet,
  "mamba": Mamba2,
}


class Block(nn.Module):
  """One layer: x + mixer(norm(x)), then x + mlp(norm(x)).

  Families add a norm after each, or have that one alone. `sort` names the two
  modules, see `ModelConfig.sorts`.
  """

  config: ModelConfig
  lora: LoraConfig | None
  backend: str
  mesh: Mesh | None
  dtype: Dtype
  param_dtype: Dtype
  sort: tuple[str, str] = ("attn", "mlp")

  @nn.compact
  def __call__(self, x, context: Context, kv, slot, kind):
    c = self.config
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    norm: Callable[..., Norm] = norm_of(c, **dtypes)
    head_norm = partial(RMSNorm, c.norm_eps, c.norm_offset, **dtypes)

    def linear(features, use_bias=False, init_std=c.init_std, *, name):
      return Linear(
        features, use_bias, init_std, self.lora, **dtypes, name=name
      )

    def before(x, name):
      return norm(name=name)(x) if c.pre_norm else x

    def add(x, y, name):
      y = norm(name=name)(y) if c.post_norm else y
      return x + (y if c.residual_scale == 1 else y * c.residual_scale)

    x = checkpoint_name(x, BLOCK_INPUT)
    mixer, rest = self.sort
    with jax.named_scope(mixer):
      y = normed = before(x, "attn_norm")
      where = (self.backend, self.mesh)
      context = context.of_kind(c, kind)
      if mixer != "attn":
        of = _MIXERS[mixer](c, linear, self.mesh, **dtypes, name=mixer)
        y, kv = of(y, context, kv, slot)
      elif c.kv_rank:
        # The reference gives these norms no other eps.
        rank_norm = partial(RMSNorm, 1e-6, **dtypes)
        attn = LatentAttention(
          c, linear, rank_norm, *where, self.lora, name="attn"
        )
        y, kv = attn(y, context, kv, slot)
      else:
        attn = Attention(
          c, linear, head_norm, *where, self.param_dtype, name="attn"
        )
        y, kv = attn(y, context, kv, slot, kind)
      x = add(x, y, "attn_post_norm")
    with jax.named_scope("mlp"):
      mlp = partial(Mlp, c, linear)
      if rest == "moe":
        own = (c.d_ff_shared, self.param_dtype, c.shared_gate)
        shared = partial(mlp, *own, name="shared")
        wide = _experts(c, self.lora, self.mesh, shared, **dtypes)
      else:
        width = c.d_ff_dense if c.num_experts else c.d_ff
        wide = mlp(width, self.param_dtype, name="mlp")
      y = wide(normed if c.parallel else before(x, "mlp_norm"))
      x = add(x, y, "mlp_post_norm")
    return x, kv
