"""One layer of the decoder, and what layers share."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from sft_jax.common import sharding
from sft_jax.models import kv_cache, rope
from sft_jax.models.attention import parallel
from sft_jax.models.attention.attention import attention, choose, sight
from sft_jax.models.config import ModelConfig
from sft_jax.models.layers import Dtype, Norm, RMSNorm, norm_of
from sft_jax.models.linear import Linear
from sft_jax.models.lora.lora import LoraConfig
from sft_jax.models.moe import Moe, clipped_swiglu
from sft_jax.models.remat import BLOCK_INPUT

_ACTIVATIONS = {
  "silu": nn.silu,
  "gelu_tanh": partial(nn.gelu, approximate=True),
}


class Shared(NamedTuple):
  """What layers of one kind share; stacked, if there are several kinds.

  Attributes:
    q_turn: cosine and sine that turn queries.
    k_turn: those that turn keys: the new ones, or all of a cache (see
      `turns_late`).
    seen: who sees whom, see `attention.sight`.
  """

  q_turn: rope.Turn
  k_turn: rope.Turn
  seen: jax.Array


class Context(NamedTuple):
  """What all layers share, computed once, whatever their number."""

  q_positions: jax.Array
  kv_positions: jax.Array
  q_segment_ids: jax.Array
  kv_segment_ids: jax.Array
  shared: Shared

  def of_kind(self, config: ModelConfig, kind) -> "Context":
    """What layers of a kind share; `kind` may be traced."""
    if len(config.kinds) == 1:
      return self
    mine = jax.tree.map(lambda x: x[kind], self.shared)
    return self._replace(shared=mine)


def turns_late(config: ModelConfig) -> bool:
  """True if a cache holds keys as they were before they turned.

  Where angles depend on the length of a document, its earlier keys turn anew
  whenever it grows.
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
  if not cached:  # Attention sees whole rows; what turns meets its own slots.
    own = parallel.constrain(q_positions, mesh, sharding.SLOTS)
    q_positions, kv_positions, q_segment_ids, kv_segment_ids = (
      parallel.constrain(x, mesh, sharding.WHOLE_ROWS)
      for x in (q_positions, kv_positions, q_segment_ids, kv_segment_ids)
    )
  who = (q_positions, kv_positions, q_segment_ids, kv_segment_ids)
  backend = choose(
    backend, q_positions.shape[1], in_order=not cached, mesh=mesh
  )
  late = cached and turns_late(config)
  q_lengths = k_lengths = None
  if turns_late(config):
    q_lengths = _lengths(q_segment_ids, kv_segment_ids, kv_positions)
    k_lengths = _lengths(kv_segment_ids, kv_segment_ids, kv_positions)
  every = []
  for window, turning in config.kinds:
    turn = partial(rope.turn, rope=turning, head_dim=config.head_dim)
    q_turn = k_turn = turn(own, q_lengths)
    if late:
      k_turn = turn(kv_positions, k_lengths)
    q_turn = rope.query_turn(q_turn, own, turning)
    every.append(Shared(q_turn, k_turn, sight(backend, *who, window)))
  if len(every) == 1:
    return Context(*who, every[0])
  return Context(*who, jax.tree.map(lambda *xs: jnp.stack(xs), *every))


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
    q = self.linear(N * H, c.qkv_bias, name="q")(x)
    k = self.linear(K * H, c.qkv_bias, name="k")(x)
    v = self.linear(K * H, c.qkv_bias, name="v")(x).reshape(B, T, K, H)
    if c.qk_norm == "all":
      q, k = self.norm(name="q_norm")(q), self.norm(name="k_norm")(k)
    q, k = q.reshape(B, T, N, H), k.reshape(B, T, K, H)
    if c.qk_norm == "head":
      q, k = self.norm(name="q_norm")(q), self.norm(name="k_norm")(k)
    shared = context.shared
    turn = (lambda x, at: x) if c.learned_positions else rope.apply
    late = kv is not None and turns_late(c)
    q = turn(q, shared.q_turn)
    k = k if late else turn(k, shared.k_turn)
    sinks = None
    if c.attn_sinks:
      normal = nn.initializers.normal(c.init_std)
      sinks = self.param("sinks", normal, (N,), self.param_dtype)
    how = {"scale": c.attn_scale, "softcap": c.attn_softcap, "sinks": sinks}
    if kv is not None:
      kv = kv_cache.write(kv, k, v, layer, context.q_positions)
      later = partial(turn, at=shared.k_turn) if late else None
      y = kv_cache.attend(q, kv, layer, shared.seen, turn=later, **how)
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
        seen=shared.seen,
        in_order=True,
        **how,
      )
      chosen = choose(self.backend, T, in_order=True, mesh=self.mesh)
      if chosen == "splash":
        attend = _with_window(attend, [window for window, _ in c.kinds], kind)
      y = attend(q, k, v)
    out_std = _output_std(c)
    y = y.reshape(B, T, N * H)
    y = self.linear(c.d_model, c.o_bias, out_std, name="o")(y)
    return y, kv


def _with_window(attend, windows: list[int | None], kind):
  """`attend` with the window of a kind of layer, which may be traced.

  For splash, whose windows are part of the program; those of the others are
  in `seen`, as data.
  """
  each = [partial(attend, window=window) for window in windows]
  if len(each) == 1:
    return each[0]
  if isinstance(kind, int):
    return each[kind]
  return lambda q, k, v: jax.lax.switch(kind, each, q, k, v)


class Mlp(nn.Module):
  """down(act(gate(x)) * up(x)), or without a gate down(act(up(x))).

  Of the activation the backward pass keeps what went in, as of norms.
  """

  config: ModelConfig
  linear: Callable[..., Linear]

  @nn.compact
  def __call__(self, x):
    c = self.config
    act = _ACTIVATIONS[c.activation]
    up = self.linear(c.d_ff, c.mlp_bias, name="up")(x)
    if c.gated_mlp:
      gate = self.linear(c.d_ff, c.mlp_bias, name="gate")(x)
      up = jax.checkpoint(lambda gate, up: act(gate) * up)(gate, up)
    else:
      up = jax.checkpoint(act)(up)
    down = self.linear(c.d_model, c.mlp_bias, _output_std(c), name="down")
    return down(up)


def _experts(
  c: ModelConfig,
  lora: LoraConfig | None,
  mesh: Mesh | None,
  **dtypes: Dtype,
) -> Moe:
  """The experts that take the place of the MLP."""

  def activation(gate: jax.Array, up: jax.Array) -> jax.Array:
    if c.glu_alpha is not None:
      return clipped_swiglu(gate, up, alpha=c.glu_alpha, limit=c.glu_limit)
    return _ACTIVATIONS[c.activation](gate) * up

  return Moe(
    num_experts=c.num_experts,
    per_token=c.experts_per_token,
    d_ff=c.d_ff,
    activation=jax.checkpoint(activation),
    normalize=c.norm_topk,
    use_bias=c.mlp_bias,
    init_std=c.init_std,
    out_std=_output_std(c),
    lora=lora,
    mesh=mesh,
    **dtypes,
    name="moe",
  )


class Block(nn.Module):
  """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

  Families add a norm after each, or have that one alone.
  """

  config: ModelConfig
  lora: LoraConfig | None
  backend: str
  mesh: Mesh | None
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(self, x, context: Context, kv, layer, kind):
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
    with jax.named_scope("attn"):
      attn = Attention(
        c,
        linear,
        head_norm,
        self.backend,
        self.mesh,
        self.param_dtype,
        name="attn",
      )
      context = context.of_kind(c, kind)
      y, kv = attn(before(x, "attn_norm"), context, kv, layer, kind)
      x = add(x, y, "attn_post_norm")
    with jax.named_scope("mlp"):
      if c.num_experts:
        mlp = _experts(c, self.lora, self.mesh, **dtypes)
      else:
        mlp = Mlp(c, linear, name="mlp")
      y = mlp(before(x, "mlp_norm"))
      x = add(x, y, "mlp_post_norm")
    return x, kv


def _output_std(config: ModelConfig) -> float:
  """Scale of the two projections of each block that add to the residual."""
  return config.init_std / (2 * config.num_layers) ** 0.5
