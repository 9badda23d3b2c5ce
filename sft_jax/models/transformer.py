"""The decoder: blocks, their stacking, and the Model others hold.

Axes, here and everywhere in the package:
  B batch          T query position   S key position   D model width
  N query heads    K key/value heads  G = N / K        H head width
  F MLP width      E experts          V vocabulary     L layers    R LoRA rank

Flax Linen defines the modules; outside this package parameters are a plain
nested dict, with the layers stacked on a leading L axis.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from sft_jax.batch import AnyArray
from sft_jax.models import lora as lora_lib
from sft_jax.models.attention import check_backend
from sft_jax.models.blocks import Block, Context, cache_slots, make_context
from sft_jax.models.config import ModelConfig
from sft_jax.models.layers import Dtype, Embed, RMSNorm
from sft_jax.trees import Tree

Cache = dict[str, jax.Array]

# What the backward pass may keep of a block's forward pass; the rest of it is
# computed again.
_REMAT: dict[str, Callable[..., Any] | None] = {
  "none": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Model(NamedTuple):
  """Pure functions over a plain tree of parameters; see `build`.

  Attributes:
    config: sizes and switches.
    lora: what the adapters are, or None.
    init: init(key) -> params.
    hidden: hidden(params, tokens, positions=None, segment_ids=None)
      -> [B, T, D] after the last norm, in the compute dtype.
    head: head(params) -> the unembedding [V, D].
    logits: logits(params, hidden) -> [B, T, V] float32.
    init_cache: init_cache(batch, length) -> cache.
    decode: decode(params, tokens, positions, cache) -> (hidden, cache).
  """

  config: ModelConfig
  lora: lora_lib.LoraConfig | None
  init: Callable[..., Tree]
  hidden: Callable[..., jax.Array]
  head: Callable[[Tree], jax.Array]
  logits: Callable[[Tree, jax.Array], jax.Array]
  init_cache: Callable[[int, int], Cache]
  decode: Callable[..., tuple[jax.Array, Cache]]


def build(
  config: ModelConfig,
  *,
  dtype: Dtype = jnp.float32,
  param_dtype: Dtype = jnp.float32,
  attention: str = "auto",
  remat: str = "none",
  scan: bool = True,
  lora: lora_lib.LoraConfig | None = None,
) -> Model:
  """Returns the functions of a model; nothing is allocated.

  Args:
    config: sizes and switches.
    dtype: of activations and products, float32 or bfloat16.
    param_dtype: of fresh parameters and of their gradients.
    attention: backend, see `attention.BACKENDS`.
    remat: 'none' keeps every activation for the backward pass, 'dots' keeps
      the results of projections, 'full' keeps the input of each block.
    scan: one compiled block run L times; False unrolls it, which compiles
      longer and may run faster. The parameters are the same.
    lora: adapters that `init` adds and the forward pass applies. Parameters
      without adapters are the base model.

  Raises:
    ValueError: an unknown dtype, backend or remat policy.
  """
  dtype, param_dtype = jnp.dtype(dtype), jnp.dtype(param_dtype)
  for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
    if value not in (jnp.float32, jnp.bfloat16):
      raise ValueError(
        f"build: {name} is {value}; expected float32 or bfloat16. "
        "Set model.dtype to one of them."
      )
  if remat not in _REMAT:
    raise ValueError(
      f"build: remat is {remat!r}; expected one of {tuple(_REMAT)}. "
      "Set model.remat to one of them."
    )
  check_backend(attention)
  c = config
  dtypes = {"dtype": dtype, "param_dtype": param_dtype}
  scale = lora.scale if lora else None
  block = Block(c, scale, attention, **dtypes)
  embed = Embed(c.vocab_size, c.d_model, c.init_std, **dtypes)
  final_norm = RMSNorm(c.norm_eps, **dtypes)

  def init(key: jax.Array) -> Tree:
    """Fresh parameters: normal(init_std); the projections that write to the
    residual stream are smaller by sqrt(2 L) (GPT-2), norms 1, biases 0."""
    token = jnp.zeros((1, 1), jnp.int32)
    x = jnp.zeros((1, 1, c.d_model), dtype)
    context = make_context(c, token, token, token, token)
    embed_key, head_key, layer_key, lora_key = jax.random.split(key, 4)

    def init_layer(key):
      return block.init(key, x, context, None, 0)["params"]

    params = {
      "embed": embed.init(embed_key, token)["params"],
      "layers": jax.vmap(init_layer)(jax.random.split(layer_key, c.num_layers)),
      "final_norm": final_norm.init(key, x)["params"],
    }
    if not c.tie_embeddings:
      params["head"] = embed.init(head_key, token)["params"]
    if lora:
      params = lora_lib.init(lora_key, params, lora, dtype=param_dtype)
    return params

  def run(params: Tree, tokens, context: Context, kv) -> tuple[Any, Any]:
    """Embeds, runs the blocks, norms; threads the cache through."""

    def step(carry, layer):
      (x, kv), (weights, index) = carry, layer
      return block.apply({"params": weights}, x, context, kv, index), None

    if _REMAT[remat] is not None:
      # Inside a scan nothing can merge the second forward pass into the
      # first, so the barrier against it is not needed.
      step = jax.checkpoint(step, policy=_REMAT[remat], prevent_cse=not scan)
    with jax.named_scope("embed"):
      x = embed.apply({"params": params["embed"]}, tokens)
    carry = (x, kv)
    with jax.named_scope("layers"):
      if scan:
        layers = (params["layers"], jnp.arange(c.num_layers))
        carry, _ = jax.lax.scan(step, carry, layers)
      else:
        parts = jax.tree.map(jnp.unstack, params["layers"])
        for i in range(c.num_layers):
          weights = jax.tree.map(
            lambda part, i=i: part[i],
            parts,
            is_leaf=lambda x: isinstance(x, tuple),
          )
          carry, _ = step(carry, (weights, i))
    x, kv = carry
    with jax.named_scope("final_norm"):
      x = final_norm.apply({"params": params["final_norm"]}, x)
    return x, kv

  def hidden(
    params: Tree,
    tokens: Int[AnyArray, "B T"],
    positions: Int[AnyArray, "B T"] | None = None,
    segment_ids: Int[AnyArray, "B T"] | None = None,
  ) -> Float[Array, "B T D"]:
    """The last layer's normed activations of every token.

    Without `segment_ids` each row is one document; with them, `positions`
    default to restarting where the segment changes.
    """
    tokens = jnp.asarray(tokens)
    if segment_ids is None:
      segment_ids = jnp.ones_like(tokens)
    segment_ids = jnp.asarray(segment_ids)
    if positions is None:
      positions = _positions(segment_ids)
    positions = jnp.asarray(positions)
    context = make_context(c, positions, positions, segment_ids, segment_ids)
    return run(params, tokens, context, None)[0]

  def head(params: Tree) -> Float[Array, "V D"]:
    """The unembedding: the embedding itself when tied."""
    return params["embed" if c.tie_embeddings else "head"]["embedding"]

  def logits(
    params: Tree, hidden: Float[Array, "B T D"]
  ) -> Float32[Array, "B T V"]:
    """Unnormalised log-probabilities of the next token, float32."""
    with jax.named_scope("head"):
      return jnp.einsum(
        "btd,vd->btv",
        hidden.astype(dtype),
        head(params).astype(dtype),
        preferred_element_type=jnp.float32,
      )

  def init_cache(batch: int, length: int) -> Cache:
    """An empty cache of `length` slots per row, in the compute dtype."""
    shape = (c.num_layers, batch, length, c.num_kv_heads, c.head_dim)
    return {
      "k": jnp.zeros(shape, dtype),
      "v": jnp.zeros(shape, dtype),
      "positions": jnp.full((batch, length), -1, jnp.int32),
    }

  def decode(
    params: Tree,
    tokens: Int[AnyArray, "B T"],
    positions: Int[AnyArray, "B T"],
    cache: Cache,
  ) -> tuple[Float[Array, "B T D"], Cache]:
    """Activations of T more tokens per row, and the cache that holds them.

    Token t of row b goes to slot positions[b, t] and sees the slots at its
    own position and before. Position -1 is padding: neither written nor seen.
    A position beyond the cache gives NaN. Two rows of 3 and 1 tokens, then
    one more token each:

        decode(params, [[5, 6, 7], [8, 0, 0]], [[0, 1, 2], [0, -1, -1]], cache)
        decode(params, [[9], [9]], [[3], [1]], cache)
    """
    tokens, positions = jnp.asarray(tokens), jnp.asarray(positions)
    B, S = cache["positions"].shape
    rows, slots = jnp.arange(B)[:, None], cache_slots(positions, S)
    held = cache["positions"].at[rows, slots].set(positions, mode="drop")
    context = make_context(
      c,
      positions,
      held,
      (positions >= 0).astype(jnp.int32),
      (held >= 0).astype(jnp.int32),
    )
    x, (k, v) = run(params, tokens, context, (cache["k"], cache["v"]))
    x = jnp.where((positions >= S)[:, :, None], jnp.nan, x)
    return x, {"k": k, "v": v, "positions": held}

  return Model(c, lora, init, hidden, head, logits, init_cache, decode)


def _positions(segment_ids: jax.Array) -> jax.Array:
  """Index of each slot within its run of equal segment ids; padding is 0.

  [1 1 1 2 2 0] -> [0 1 2 0 1 0]
  """
  index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
  starts = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
  index = index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
  return jnp.where(segment_ids > 0, index, 0)
