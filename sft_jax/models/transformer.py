"""The decoder: blocks, their stacking, and the Model others hold.

Axes, here and everywhere in the package:
  B batch          T query position   S key position   D model width
  N query heads    K key/value heads  G = N / K        H head width
  F MLP width      E experts          V vocabulary     L layers    R LoRA rank

Flax Linen defines the modules; outside this package parameters are a plain
nested dict, with the layers stacked on a leading L axis.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from sft_jax.common import sharding
from sft_jax.common.batch import AnyArray
from sft_jax.common.trees import Tree
from sft_jax.models import kv_cache as cache_lib
from sft_jax.models.attention import parallel
from sft_jax.models.attention.attention import check_backend
from sft_jax.models.block import (
  Block,
  Context,
  Dtype,
  Embed,
  PerLayer,
  embedding_table,
  make_context,
  norm_of,
)
from sft_jax.models.config import ATTENTION, ModelConfig, layers_of
from sft_jax.models.kv_cache import Cache
from sft_jax.models.lora import lora as lora_lib
from sft_jax.models.remat import check_level, checkpointed


class Model(NamedTuple):
  """Pure functions over a plain tree of parameters; see `build`.

  Attributes:
    config: sizes and switches.
    lora: what the adapters are, or None.
    init: init(key) -> params.
    hidden: hidden(params, tokens, positions=None, segment_ids=None, *,
      dropout_key=None) -> [B, T, D] after the last norm, in the compute dtype.
    head: head(params) -> the unembedding [V, D].
    logits: logits(params, hidden) -> [B, T, V] float32.
    init_cache: init_cache(batch, length, *, int8=False) -> cache.
    decode: decode(params, tokens, positions, cache) -> (hidden, cache).
  """

  config: ModelConfig
  lora: lora_lib.LoraConfig | None
  init: Callable[..., Tree]
  hidden: Callable[..., jax.Array]
  head: Callable[[Tree], jax.Array]
  logits: Callable[[Tree, jax.Array], jax.Array]
  init_cache: Callable[..., Cache]
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
  mesh: Mesh | None = None,
) -> Model:
  """The functions of a model; nothing is allocated.

  Args:
    dtype: of activations and products, float32 or bfloat16.
    param_dtype: of fresh parameters and of their gradients.
    attention: backend, see `attention.BACKENDS`.
    remat: what is kept for the backward pass: one of `remat.LEVELS`.
    scan: one compiled block (or period of different ones) run again and again;
      False unrolls it, which compiles longer and may run faster.
    lora: adapters that `init` adds and the forward pass applies, if they are in
      the parameters.
    mesh: devices that share the rows of a batch, 'context' their slots and
      'tensor' the widths; see `parallel`. None: one device, or XLA finds out.

  Raises ValueError: an unknown dtype, backend or remat policy; heads or experts
  that the mesh does not divide.
  """
  dtype, param_dtype = jnp.dtype(dtype), jnp.dtype(param_dtype)
  for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
    if value not in (jnp.float32, jnp.bfloat16):
      raise ValueError(
        f"build: {name} is {value}; expected float32 or bfloat16. "
        "Set model.dtype to one of them."
      )
  check_level(remat)
  check_backend(attention, mesh)
  parallel.check_model(mesh, config.num_heads, config.num_experts)
  if parallel.is_ring(mesh, config.num_heads):
    if attention not in ("auto", "blocks"):
      raise ValueError(
        f"model.attention: got {attention!r} with more devices in mesh.tensor "
        f"and mesh.context than divide {config.num_heads} heads, expected "
        "'auto' or 'blocks': keys go round by them alone. Set 'auto'."
      )
    attention = "blocks"
  c = config
  # Layers of the body of the scan, and how often it runs.
  width = c.period if scan else c.num_layers
  rounds = c.num_layers // width
  scan = scan and (rounds > 1 or width == 1)
  dtypes = {"dtype": dtype, "param_dtype": param_dtype}
  blocks = {
    sort: Block(c, lora, attention, mesh, **dtypes, sort=sort)
    for sort in dict.fromkeys(c.sorts)
  }
  rows = lora.token_rows if lora else ()
  embed = Embed(c.vocab_size, c.d_model, c.init_std, **dtypes, token_rows=rows)
  positions_embed = Embed(c.max_positions, c.d_model, c.init_std, **dtypes)
  per_layer = PerLayer(c, **dtypes)
  final_norm = norm_of(c, **dtypes)()
  number = lambda kind: c.kinds_of(kind.mixer).index(kind.of_attention)
  kind_of = list(map(number, c.layers))
  # Of the layers with the same mixer, which: where a cache has its state.
  holders = [None if kind.shares else kind.mixer for kind in c.layers]
  slot_of = [
    holders[:i].count(kind.mixer) - kind.shares
    for i, kind in enumerate(c.layers)
  ]
  sharing = None in holders

  def init(key: jax.Array) -> Tree:
    """Fresh parameters: normal(init_std), smaller by sqrt(2 L) where they write
    to the residual stream (GPT-2), norms 1, biases 0."""
    token = jnp.zeros((1, 1), jnp.int32)
    x = jnp.zeros((1, 1, c.d_model), dtype)
    # One token needs no kernel.
    context = make_context(c, token, token, token, token, backend="xla")
    embed_key, head_key, layer_key, lora_key = jax.random.split(key, 4)

    keys = jax.random.split(layer_key, c.num_layers)
    # What a layer may read of others.
    own = jnp.zeros((1, 1, c.per_layer_dim)) if c.per_layer_dim else None
    both = lambda mixer: (jnp.zeros((1, 1, *c.kv_shape(mixer)), dtype),) * 2
    kv = {mixer: both(mixer) for mixer in ATTENTION} if sharing else None

    found: dict[str, list[Any]] = {}
    for sort, block in blocks.items():
      plain = block.clone(backend="xla")
      one = lambda key: plain.init(key, x, context, kv, 0, 0, own)["params"]  # noqa: B023
      at = np.array([i for i, s in enumerate(c.sorts) if s == sort])
      for name, part in jax.vmap(one)(keys[at]).items():
        found.setdefault(name, []).append((at, part))

    def in_order(parts):
      """A module's parameters in all layers that have it."""
      if len(parts) == 1:
        return parts[0][1]
      order = np.argsort(np.concatenate([at for at, _ in parts]))
      stack = lambda *xs: jnp.concatenate(xs)[order]
      return jax.tree.map(stack, *(part for _, part in parts))

    params = {
      "embed": embed.init(embed_key, token)["params"],
      "layers": {name: in_order(parts) for name, parts in found.items()},
      "final_norm": final_norm.init(key, x)["params"],
    }
    if not c.tie_embeddings:
      params["head"] = embed.init(head_key, token)["params"]
    if c.per_layer_dim:
      key = jax.random.fold_in(embed_key, 2)
      params["per_layer"] = per_layer.init(key, token, x)["params"]
    if c.learned_positions:
      key = jax.random.fold_in(embed_key, 1)
      params["positions"] = positions_embed.init(key, token)["params"]
    if lora:
      params = lora_lib.init(lora_key, params, lora)
    return params

  def run(
    params: Tree, tokens, context: Context, kv, dropout_key=None
  ) -> tuple[Any, Any]:
    """Embeds, runs the blocks, norms; threads the cache through."""

    def step(carry, layer, sort=c.sorts[0]):
      (x, kv), (weights, index, kind, slot, *own) = carry, layer
      rngs = {}
      if dropout_key is not None:
        rngs["dropout"] = jax.random.fold_in(dropout_key, index)
      x, kv = blocks[sort].apply(
        {"params": weights}, x, context, kv, slot, kind, *own, rngs=rngs
      )
      return (parallel.constrain(x, mesh, sharding.SLOTS), kv), None

    steps = {sort: partial(step, sort=sort) for sort in blocks}
    if kv is None:
      steps = {
        sort: checkpointed(remat, step, scan=scan)
        for sort, step in steps.items()
      }
      kv = {} if sharing else None
    # Those of `width` layers in a row that have a module.
    lacked, own = layers_of(c), {}
    for name in params["layers"]:
      own[name] = [i for i in lacked.get(name, range(width)) if i < width]

    def steps_in_a_row(carry, layers):
      parts, *numbers = layers
      parts = jax.tree.map(jnp.unstack, parts)
      for i in range(width):
        weights = {}
        for name, part in parts.items():
          if i in own[name]:
            weights[name] = jax.tree.map(
              lambda leaf, at=own[name].index(i): leaf[at],  # noqa: B008
              part,
              is_leaf=lambda x: isinstance(x, tuple),
            )
        layer = (weights, *(number[i] for number in numbers))
        carry, _ = steps[c.sorts[i]](carry, layer)
      return carry, None

    with jax.named_scope("embed"):
      leaves = parallel.gather_table(params["embed"], mesh)
      x: Any = embed.apply({"params": leaves}, tokens)
      if c.scale_embeddings:
        # Rounded first, as the reference does: sqrt(3072) is 55.5 in bfloat16.
        x = x * jnp.asarray(c.d_model**0.5, dtype)
      if c.embed_scale != 1:
        x = x * c.embed_scale
      if c.learned_positions:
        # -1 is padding in a cache; a position past the table gives NaN.
        at = jnp.maximum(context.ids["q_positions"], 0)
        leaves = parallel.gather_table(params["positions"], mesh)
        x = x + positions_embed.apply({"params": leaves}, at)
      x = parallel.constrain(x, mesh, sharding.SLOTS)
      layer_numbers = list(range(c.num_layers))
      numbers: tuple[Any, ...] = (layer_numbers, kind_of, slot_of)
      if c.per_layer_dim:
        leaves = params["per_layer"]
        table = parallel.gather_table(leaves["embed"], mesh)
        leaves = {**leaves, "embed": table}
        numbers += (per_layer.apply({"params": leaves}, tokens, x),)
    carry = (x, kv)
    with jax.named_scope("layers"):
      if scan:
        layers = (params["layers"], *map(jnp.array, numbers))
        body = steps[c.sorts[0]]
        if width > 1:
          cut = lambda x: x.reshape(rounds, -1, *x.shape[1:])
          layers, body = jax.tree.map(cut, layers), steps_in_a_row
        carry, _ = jax.lax.scan(body, carry, layers)
      else:
        carry, _ = steps_in_a_row(carry, (params["layers"], *numbers))
    x, kv = carry
    with jax.named_scope("final_norm"):
      x: Any = final_norm.apply({"params": params["final_norm"]}, x)
      # On the hidden states, which are fewer than logits.
      x = x if c.logit_divisor == 1 else x / c.logit_divisor
    return x, kv

  def hidden(
    params: Tree,
    tokens: Int[AnyArray, "B T"],
    positions: Int[AnyArray, "B T"] | None = None,
    segment_ids: Int[AnyArray, "B T"] | None = None,
    *,
    dropout_key: jax.Array | None = None,
  ) -> Float[Array, "B T D"]:
    """The last layer's normed activations of every token. Without `segment_ids`
    each row is one document; `positions` restart where the segment changes.
    With a `dropout_key` adapters drop some inputs."""
    tokens = jnp.asarray(tokens)
    if segment_ids is None:
      segment_ids = jnp.ones_like(tokens)
    segment_ids = jnp.asarray(segment_ids)
    if positions is None:
      positions = _positions(segment_ids)
    positions = jnp.asarray(positions)
    ids = (positions, positions, segment_ids, segment_ids)
    context = make_context(c, *ids, backend=attention, mesh=mesh)
    return run(params, tokens, context, None, dropout_key)[0]

  def head(params: Tree) -> Float[Array, "V D"]:
    """The unembedding: the embedding itself when tied."""
    leaves = params["embed" if c.tie_embeddings else "head"]
    return embedding_table(parallel.gather_table(leaves, mesh), dtype, rows)

  def logits(
    params: Tree, hidden: Float[Array, "B T D"]
  ) -> Float32[Array, "B T V"]:
    """Unnormalized log-probabilities of the next token, float32."""
    with jax.named_scope("head"):
      z = jnp.einsum(
        "btd,vd->btv",
        hidden.astype(dtype),
        head(params).astype(dtype),
        preferred_element_type=jnp.float32,
      )
      cap = c.logit_softcap
      return z if cap is None else cap * jnp.tanh(z / cap)

  init_cache = partial(cache_lib.init, c, dtype=dtype)

  def decode(
    params: Tree,
    tokens: Int[AnyArray, "B T"],
    positions: Int[AnyArray, "B T"],
    cache: Cache,
  ) -> tuple[Float[Array, "B T D"], Cache]:
    """Activations of T more tokens per row, and the cache that holds them.

    Token t of row b goes to slot positions[b, t] and sees the slots up to its
    own. Position -1 is padding, neither written nor seen; one beyond the cache
    gives NaN. Two rows of 3 and 1 tokens, then one more token each:

        decode(params, [[5, 6, 7], [8, 0, 0]], [[0, 1, 2], [0, -1, -1]], cache)
        decode(params, [[9], [9]], [[3], [1]], cache)
    """
    tokens, positions = jnp.asarray(tokens), jnp.asarray(positions)
    slots = {name: x for name, x in cache.items() if name != "positions"}
    S = cache["positions"].shape[1]
    rows, at = cache_lib.slots_of(positions, S)
    held = cache["positions"].at[rows, at].set(positions, mode="drop")
    context = make_context(
      c,
      positions,
      held,
      (positions >= 0).astype(jnp.int32),
      (held >= 0).astype(jnp.int32),
      cached=True,
    )
    x, slots = run(params, tokens, context, slots)
    x = jnp.where((positions >= S)[:, :, None], jnp.nan, x)
    return x, slots | {"positions": held}

  return Model(c, lora, init, hidden, head, logits, init_cache, decode)


def _positions(segment_ids: jax.Array) -> jax.Array:
  """Index of each slot within its run of equal segment ids; padding is 0.

  [1 1 1 2 2 0] -> [0 1 2 0 1 0]
  """
  index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
  starts = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
  index = index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
  return jnp.where(segment_ids > 0, index, 0)
