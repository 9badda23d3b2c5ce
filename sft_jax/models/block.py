"""One layer of the decoder, its norms and embedding, and what layers share.

Parameters are kept in `param_dtype` and cast to `dtype` where they are used.
Norms and activations keep their input alone for the backward pass: what is in
between takes longer to write and to read than to compute.
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
from sft_jax.models.config import ATTENTION, ModelConfig
from sft_jax.models.layers.linear import Dtype, Linear
from sft_jax.models.layers.mixers import DeltaNet, GatedConv, Mamba2
from sft_jax.models.lora import quantize
from sft_jax.models.lora.lora import LoraConfig
from sft_jax.models.moe import Moe, Routing, clipped_swiglu
from sft_jax.models.remat import BLOCK_INPUT

_ACTIVATIONS = {
  "silu": nn.silu,
  "gelu_tanh": partial(nn.gelu, approximate=True),
  "relu2": lambda x: jnp.square(nn.relu(x)),
}


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * (offset + scale) over the last axis, in
  float32. With an offset of 1 (Gemma) the scale is what the factor differs from
  1 by."""

  eps: float
  offset: float = 0.0
  use_scale: bool = True
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    if not self.use_scale:
      return jax.checkpoint(self._normalise)(x, jnp.ones(()))
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
  """A table [V, D] of token vectors. An id outside the vocabulary gives NaN,
  where plain indexing would clamp it to another token. Rows that train alone,
  `lora_rows` [N, D], stand for those of `token_rows`."""

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
    normal = nn.initializers.normal(self.init_std)
    shape = (self.vocab_size, self.features)
    table = self.param("embedding", normal, shape, self.param_dtype)
    return rows(table).astype(self.dtype)


def embedding_table(
  leaves: dict[str, Any], dtype: Dtype, token_rows: tuple[int, ...] = ()
) -> Float[Array, "V D"]:
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
  """What layers of one kind share; stacked, if their mixer has several."""

  q_rotation: rope.Rotation
  k_rotation: rope.Rotation  # Of new keys, or of all of a cache.
  mask: jax.Array  # See `attention.attention_mask`.


class Context(NamedTuple):
  """What all layers share, computed once, whatever their number."""

  ids: dict[str, jax.Array]  # Positions and segments, as attention takes them.
  shared: Any  # {mixer that is attention: `Shared`}.
  starts: jax.Array  # [B, T], the first token of each document.
  valid: jax.Array  # [B, T], False of padding.


def cache_unrotated_keys(config: ModelConfig) -> bool:
  """True if a cache holds keys as they were before their rotation. Where angles
  depend on a document's length, its earlier keys turn again as it grows."""
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
  ids = {
    **{"q_positions": q_positions, "kv_positions": kv_positions},
    **{"q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids},
  }
  starts = q_positions == 0
  if not cached:
    before = jnp.pad(q_segment_ids[:, :-1], ((0, 0), (1, 0)))
    starts = (q_segment_ids != before).at[:, 0].set(True)
  T, in_order = q_positions.shape[1], not cached
  backend = choose(backend, T, in_order=in_order, mesh=mesh)
  q_lengths = k_lengths = None
  if cache_unrotated_keys(config):
    q_lengths = _lengths(q_segment_ids, kv_segment_ids, kv_positions)
    k_lengths = _lengths(kv_segment_ids, kv_segment_ids, kv_positions)
  every: dict[str, list[Shared]] = {}
  for window, by, _, mixer, _ in config.kinds:
    turned = config.rope_dim or config.kv_shape(mixer)[1]
    rotation = partial(rope.rotation, rope=by, head_dim=turned)
    q_rotation = k_rotation = rotation(own, q_lengths)
    if cached and cache_unrotated_keys(config):
      k_rotation = rotation(kv_positions, k_lengths)
    q_rotation = rope.query_rotation(q_rotation, own, by)
    mask = attention_mask(backend, *ids.values(), window=window)
    one = Shared(q_rotation, k_rotation, mask)
    every.setdefault(mixer, []).append(one)
  stack = lambda x, *more: jnp.stack((x, *more)) if more else x
  shared = {name: jax.tree.map(stack, *x) for name, x in every.items()}
  return Context(ids, shared, starts, q_segment_ids > 0)


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
  mixer: str = "attn"
  shares: bool = False

  @nn.compact
  def __call__(self, x, context: Context, kv: Any, layer, kind):
    c = self.config
    (B, T, _), N = x.shape, c.num_heads
    K, H = c.kv_shape(self.mixer)
    shared = context.shared
    rotate = partial(rope.apply, pairs=c.rope_pairs)
    if c.learned_positions:
      rotate = lambda x, at: x
    cached = "k" in (kv or {})
    unrotated = cached and cache_unrotated_keys(c)

    def turned(x, name: str, heads: int, at: rope.Rotation | None):
      """Norm and rotation of queries or keys."""
      norm = lambda x, when: self.norm(name=name)(x) if c.qk_norm == when else x
      x = norm(norm(x, "all").reshape(B, T, heads, H), "head")
      return norm(x if at is None else rotate(x, at), "rotated")

    q = self.linear(N * H * (1 + c.attn_gate), c.qkv_bias, name="q")(x)
    gate = None
    if c.attn_gate:
      q, gate = jnp.split(q.reshape(B, T, N, 2 * H), 2, axis=-1)
    q = turned(q, "q_norm", N, shared.q_rotation)
    k: Any = None
    v: Any = None
    if not self.shares:
      k = self.linear(K * H, c.qkv_bias, name="k")(x)
      v = k
      if self.mixer == "attn" or not c.global_k_is_v:
        v = self.linear(K * H, c.qkv_bias, name="v")(x)
      v = v.reshape(B, T, K, H)
      if c.v_norm:
        v = self.norm(use_scale=False)(v)
      k = turned(k, "k_norm", K, None if unrotated else shared.k_rotation)
    sinks = None
    if c.attn_sinks:
      normal = nn.initializers.normal(c.init_std)
      sinks = self.param("sinks", normal, (N,), self.param_dtype)
    options = {"scale": c.attn_scale, "softcap": c.attn_softcap, "sinks": sinks}
    if cached:
      at = (layer, self.mixer)
      if not self.shares:
        kv = kv_cache.write(kv, k, v, *at, positions=context.ids["q_positions"])
      later = partial(rotate, at=shared.k_rotation) if unrotated else None
      y = kv_cache.attend(q, kv, *at, shared.mask, rotate=later, **options)
    else:
      attend = partial(
        *(parallel.attention, attention, self.mesh),
        **context.ids,
        backend=self.backend,
        mask=shared.mask,
        in_order=True,
        **options,
      )
      chosen = choose(self.backend, T, in_order=True, mesh=self.mesh)
      if chosen == "splash":
        windows = [one.window for one in c.kinds_of(self.mixer)]
        attend = _with_window(attend, windows, kind)
      if self.shares:
        k, v = kv[self.mixer]
      elif kv is not None:  # Later layers read them.
        kv = kv | {self.mixer: (k, v)}
      y = attend(q, k, v)
    if gate is not None:
      y = y * nn.sigmoid(gate)
    y = y.reshape(B, T, N * H)
    y = self.linear(c.d_model, c.o_bias, c.out_std, name="o")(y)
    return y, kv


def _with_window(attend, windows: list[int | None], kind):
  """`attend` with the window of a kind of layer, which may be traced. For
  splash, whose windows are part of the program and not of the `mask`."""
  each = [partial(attend, window=window) for window in windows]
  if len(each) == 1:
    return each[0]
  if isinstance(kind, int):
    return each[kind]
  return lambda q, k, v: jax.lax.switch(kind, each, q, k, v)


class Xielu(nn.Module):
  """a x^2 + beta x above 0 and b (expm1(x) - x) + beta x below, in float32. a =
  softplus(alpha_p) and b = beta + softplus(alpha_n) train, beta does not
  (arXiv:2411.13010). Below, x is at most eps."""

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
  """down(act(gate(x)) * up(x)), or without a gate down(act(up(x))). `gated`:
  times sigmoid(share(x)), one number per token."""

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
  norm: Callable[..., Norm],
  **dtypes: Dtype,
) -> Moe:
  def activation(*inner: jax.Array) -> jax.Array:
    if not c.gated_mlp:
      return _ACTIVATIONS[c.activation](*inner)
    gate, up = inner
    if c.glu_alpha is not None:
      return clipped_swiglu(gate, up, alpha=c.glu_alpha, limit=c.glu_limit)
    return _ACTIVATIONS[c.activation](gate) * up

  return Moe(
    num_experts=c.num_experts,
    routing=Routing(
      *(c.experts_per_token, c.norm_topk, c.router_sigmoid, c.router_groups),
      *(c.router_top_groups, c.router_best, c.router_scale),
    ),
    d_ff=c.d_ff,
    activation=jax.checkpoint(activation),
    gated=c.gated_mlp,
    correction=c.router_correction,
    shared=shared if c.d_ff_shared else None,
    router_norm=norm if c.mlp_beside else None,
    use_bias=c.mlp_bias,
    init_std=c.init_std,
    out_std=c.out_std,
    lora=lora,
    mesh=mesh,
    **dtypes,
    name="moe",
  )


_MIXERS: Any = {"conv": GatedConv, "delta": DeltaNet, "mamba": Mamba2}


class PerLayer(nn.Module):
  """What each layer reads of a token beside the residual: P numbers. (norm(W x
  / sqrt(D)) + sqrt(P) table[token]) / sqrt(2), where x are the embeddings
  (Gemma 4)."""

  config: ModelConfig
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(
    self, tokens: Int[Array, "B T"], x: Float[Array, "B T D"]
  ) -> Float[Array, "L B T P"]:
    c = self.config
    L, P = c.num_layers, c.per_layer_dim
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    of_token = Embed(
      c.per_layer_vocab, L * P, c.init_std, **dtypes, name="embed"
    )(tokens)
    linear = Linear(L * P, False, c.init_std, **dtypes, name="project")
    y = (linear(x) * c.d_model**-0.5).reshape(*tokens.shape, L, P)
    y = RMSNorm(c.norm_eps, c.norm_offset, **dtypes, name="norm")(y)
    of_token = of_token * jnp.asarray(P**0.5, self.dtype)
    y = (y + of_token.reshape(y.shape)) * 2**-0.5
    return jnp.moveaxis(y, 2, 0)


class Block(nn.Module):
  """One layer: x + mixer(norm(x)), then x + mlp(norm(x)). Families add a norm
  after each, or have that one alone, or one part alone. `sort` names the
  modules, see `ModelConfig.sorts`."""

  config: ModelConfig
  lora: LoraConfig | None
  backend: str
  mesh: Mesh | None
  dtype: Dtype
  param_dtype: Dtype
  sort: tuple[str, ...] = ("attn", "mlp")

  @nn.compact
  def __call__(self, x, context: Context, kv, slot, kind, own=None):
    c = self.config
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    norm: Callable[..., Norm] = norm_of(c, **dtypes)
    head_norm = partial(RMSNorm, c.norm_eps, c.norm_offset, **dtypes)

    def linear(features, use_bias=False, init_std=c.init_std, *, name):
      return Linear(
        features, use_bias, init_std, self.lora, **dtypes, name=name
      )

    norms = c.norms(self.sort)

    def before(x, name):
      return norm(name=name)(x) if name in norms else x

    def add(x, y, name):
      y = norm(name=name)(y) if name in norms else y
      return x + (y if c.residual_scale == 1 else y * c.residual_scale)

    x = checkpoint_name(x, BLOCK_INPUT)
    mixer, *rest = self.sort
    lone = mixer in ("mlp", "moe")
    rest = [mixer] if lone else rest
    with jax.named_scope(mixer):
      y = normed = before(x, "attn_norm")
    if not lone:
      with jax.named_scope(mixer):
        where = (self.backend, self.mesh)
        base = mixer.removeprefix("reuse_")
        if base in ATTENTION:
          mine = context.shared[base]
          if len(c.kinds_of(base)) > 1:  # `kind` may be traced.
            mine = jax.tree.map(lambda x: x[kind], mine)
          context = context._replace(shared=mine)
        if mixer in _MIXERS:
          of = _MIXERS[mixer](c, linear, self.mesh, **dtypes, name=mixer)
          y, kv = of(y, context, kv, slot)
        elif c.kv_rank:
          # The reference gives these norms no other eps.
          rank_norm = partial(RMSNorm, 1e-6, **dtypes)
          where += (self.lora,)
          attn = LatentAttention(c, linear, rank_norm, *where, name="attn")
          y, kv = attn(y, context, kv, slot)
        else:
          where += (self.param_dtype, base, base != mixer)
          attn = Attention(c, linear, head_norm, *where, name=mixer)
          y, kv = attn(y, context, kv, slot, kind)
        x = add(x, y, "attn_post_norm")
    if rest:
      with jax.named_scope("mlp"):
        mlp = partial(Mlp, c, linear)
        y = normed if c.parallel or lone else before(x, "mlp_norm")
        width = c.d_ff_dense if c.num_experts else c.d_ff
        for name, times in (("mlp", 1), ("wide_mlp", 2)):
          if name in rest:
            y = mlp(times * width, self.param_dtype, name=name)(y)
        if "moe" in rest:
          sizes = (c.d_ff_shared, self.param_dtype, c.shared_gate)
          shared = partial(mlp, *sizes, name="shared")
          experts = _experts(c, self.lora, self.mesh, shared, norm, **dtypes)
          if c.mlp_beside:
            z = experts(norm(name="moe_norm")(x), x)
            z = norm(name="moe_post_norm")(z)
            y = norm(name="mlp_own_norm")(y) + z
          else:
            y = experts(y)
        x = add(x, y, "mlp_post_norm")
    if own is not None:
      gate = linear(c.per_layer_dim, name="per_layer_gate")(x)
      y = _ACTIVATIONS[c.activation](gate) * own
      y = linear(c.d_model, name="per_layer_out")(y)
      x = x + norm(name="per_layer_norm")(y)
    if c.layer_scalar:
      ones = nn.initializers.ones
      scalar = self.param("layer_scalar", ones, (1,), self.param_dtype)
      x = x * scalar.astype(self.dtype)
    return x, kv
