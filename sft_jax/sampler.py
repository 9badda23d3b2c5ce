"""Sampling: a prefill, then one decoded token at a time; token ids only.

The model arrives as three functions (`decode`, `logits`, `init_cache`; see
docs/design.md), so this file knows no model, no text and no template.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key

from sft_jax.batch import AnyArray

EMPTY = -1  # Position of a slot that holds nothing; see `decode`.


class Sampled(NamedTuple):
  """One reply.

  Attributes:
    tokens: what the model emitted, without the stop token.
    stopped: True if it emitted a stop token, False if it ran out of tokens.
  """

  tokens: list[int]
  stopped: bool


class Rule(NamedTuple):
  """How the next token is chosen; hashable, so it is compiled in.

  Attributes:
    temperature: 0 takes the likeliest token and ignores the two others.
    top_k: keeps the k likeliest tokens (ties with the k-th too); 0 keeps all.
    top_p: of those, keeps the fewest whose share is at least p; 1 keeps all.
    vocab_size: ids from here on are padding and never chosen; None: no such.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  vocab_size: int | None = None


class _State(NamedTuple):
  """What the decoding loop carries; column `step` of `out` is next."""

  step: Int32[Array, ""]
  token: Int32[Array, "B"]
  position: Int32[Array, "B"]  # Of `token`.
  done: Bool[Array, "B"]
  stopped: Bool[Array, "B"]
  out: Int32[Array, "B steps"]  # EMPTY where nothing was emitted.
  cache: Any


def truncate(
  logits: Float[Array, "*B V"], top_k: int, top_p: float
) -> Float[Array, "*B V"]:
  """Sets the logits of tokens outside the top k, then top p, to -inf.

  With shares 0.5, 0.3, 0.2 and `top_p=0.6`, the first two remain: a token is
  kept while the tokens before it hold less than p (Holtzman et al. 2020,
  arXiv:1904.09751). Tokens that tie with the last one kept are kept.
  """
  if not top_k and top_p >= 1:
    return logits
  ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
  kept = jnp.full(ordered.shape, True)
  if top_k:
    kept &= jnp.arange(ordered.shape[-1]) < top_k
  shares = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
  if top_p < 1:
    kept &= jnp.cumsum(shares, axis=-1) - shares < top_p
  lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits < lowest, -jnp.inf, logits)


def choose(
  keys: Key[Array, "B"], logits: Float[Array, "B V"], rule: Rule
) -> Int32[Array, "B"]:
  """Returns the next token of each row, drawn with that row's own key."""
  if rule.vocab_size is not None:
    real = jnp.arange(logits.shape[-1]) < rule.vocab_size
    logits = jnp.where(real, logits, -jnp.inf)
  if rule.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  # From the maximum down, so that a tiny temperature cannot overflow.
  logits -= jnp.max(logits, axis=-1, keepdims=True)
  logits = truncate(logits / rule.temperature, rule.top_k, rule.top_p)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


# Functions and numbers that shape the program are static: JAX's own cache then
# keeps one program per model, rule and (batch, length) bucket.
@functools.partial(
  jax.jit,
  static_argnames=("decode", "logits", "init_cache", "max_new_tokens", "rule"),
)
def sample_batch(
  params: Any,
  tokens: Int32[AnyArray, "B T"],
  lengths: Int32[AnyArray, "B"],
  rows: Int32[AnyArray, "B"],
  stop_ids: Int32[AnyArray, "stops"],
  seed: Int32[AnyArray, ""],
  *,
  decode: Callable,
  logits: Callable,
  init_cache: Callable,
  max_new_tokens: int,
  rule: Rule,
) -> tuple[Int32[Array, "B steps"], Bool[Array, "B"]]:
  """Continues right-padded prompts until each row stops or is full.

  Args:
    tokens: prompts, each at the left of its row.
    lengths: tokens of each prompt, at least 1.
    rows: a number that names each row's random stream; -1 marks a filler row,
      which counts as stopped from the start.

  Returns:
    The emitted tokens, EMPTY from the stop token on; and who stopped.
  """
  B, T = tokens.shape
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)

  def head(hidden, step):
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    return choose(step_keys, logits(params, hidden)[:, 0], rule)

  def emit(state: _State, token) -> _State:
    stop = jnp.isin(token, stop_ids) & ~state.done
    done = state.done | stop
    out = state.out.at[:, state.step].set(jnp.where(done, EMPTY, token))
    return state._replace(
      step=state.step + 1,
      token=token,
      position=state.position + 1,
      done=done,
      stopped=state.stopped | stop,
      out=out,
    )

  def more(state: _State):
    return (state.step < max_new_tokens) & ~jnp.all(state.done)

  def advance(state: _State) -> _State:
    # A row that is done writes nothing, so that it cannot disturb its cache.
    position = jnp.where(state.done, EMPTY, state.position)
    hidden, cache = decode(
      params, state.token[:, None], position[:, None], state.cache
    )
    return emit(state._replace(cache=cache), head(hidden, state.step))

  # Prefill: all prompt tokens at once; only the last of each needs logits.
  slots = jnp.arange(T, dtype=jnp.int32)
  positions = jnp.where(slots < lengths[:, None], slots, EMPTY)
  cache = init_cache(B, T + max_new_tokens)
  hidden, cache = decode(params, tokens, positions, cache)
  last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
  state = _State(
    step=jnp.int32(0),
    token=jnp.zeros(B, jnp.int32),
    position=jnp.asarray(lengths) - 1,
    done=jnp.asarray(rows) < 0,
    stopped=jnp.zeros(B, bool),
    out=jnp.full((B, max_new_tokens), EMPTY, jnp.int32),
    cache=cache,
  )
  state = jax.lax.while_loop(more, advance, emit(state, head(last, state.step)))
  return state.out, state.stopped


def generate(
  decode: Callable,
  logits: Callable,
  init_cache: Callable,
  params: Any,
  prompts: Sequence[Sequence[int]],
  *,
  stop_ids: Iterable[int],
  max_new_tokens: int,
  vocab_size: int | None = None,
  temperature: float | int = 0.0,
  top_k: int = 0,
  top_p: float | int = 1.0,
  seed: int = 0,
  batch_size: int | None = None,
  length_bucket: int = 64,
) -> list[Sampled]:
  """Samples one reply per prompt, in the order of the prompts.

  Prompts of like length run together: `batch_size` rows, padded on the right
  to a multiple of `length_bucket`, so few programs are compiled, each once per
  process. A row draws from `fold_in(fold_in(key(seed), row), step)`, so its
  reply depends on its index and the seed, never on its neighbours (to the
  rounding of the model's own arithmetic).

  Args:
    decode, logits, init_cache: the model's functions, the same objects at
      each call (programs are cached by their identity).
    prompts: token ids, each at least one.
    stop_ids: every id that ends a reply; empty: only `max_new_tokens` does.
    max_new_tokens: most tokens of a reply, its stop token included.
    vocab_size, temperature, top_k, top_p: see `Rule`.
    batch_size: rows at once; None: all, at most 64.

  Raises:
    ValueError: a number out of range, or an empty prompt.
  """
  stops = np.asarray(sorted(set(stop_ids)), np.int32)
  if batch_size is None:
    batch_size = min(max(len(prompts), 1), 64)
  for name, value, fine, expected in (
    ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
    ("temperature", temperature, temperature >= 0, "at least 0 (0: greedy)"),
    ("top_k", top_k, top_k >= 0, "at least 0 (0: off)"),
    ("top_p", top_p, 0 < top_p <= 1, "in (0, 1] (1: off)"),
    ("batch_size", batch_size, batch_size >= 1, "at least 1"),
    ("length_bucket", length_bucket, length_bucket >= 1, "at least 1"),
  ):
    if not fine:
      raise ValueError(
        f"sampler.generate: {name} is {value}; expected {expected}. Change it."
      )
  for i, prompt in enumerate(prompts):
    if not len(prompt):
      raise ValueError(
        f"sampler.generate: prompt {i} is empty; expected at least one token "
        "to continue from. Give it the BOS token."
      )
  rule = Rule(float(temperature), top_k, float(top_p), vocab_size)
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  results: dict[int, Sampled] = {}
  for start in range(0, len(order), batch_size):
    chosen = order[start : start + batch_size]
    longest = len(prompts[chosen[-1]])
    T = -(-longest // length_bucket) * length_bucket
    # Filler rows keep the shape: one token each, done before they begin.
    tokens = np.zeros((batch_size, T), np.int32)
    lengths = np.ones(batch_size, np.int32)
    rows = np.full(batch_size, -1, np.int32)
    for b, i in enumerate(chosen):
      tokens[b, : len(prompts[i])] = prompts[i]
      lengths[b], rows[b] = len(prompts[i]), i
    out, stopped = jax.device_get(
      sample_batch(
        params, tokens, lengths, rows, stops, np.int32(seed),
        decode=decode, logits=logits, init_cache=init_cache,
        max_new_tokens=max_new_tokens, rule=rule,
      )
    )  # fmt: skip
    for b, i in enumerate(chosen):
      results[i] = Sampled(out[b][out[b] != EMPTY].tolist(), bool(stopped[b]))
  return [results[i] for i in range(len(prompts))]
