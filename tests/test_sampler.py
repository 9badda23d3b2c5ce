"""The sampler against fake models whose every next token is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax import sampler
from sft_jax.models import config as config_lib
from sft_jax.models import transformer

V = 16
STOP = 15


def init_cache(batch, length):
  return {
    "token": jnp.zeros((batch, length), jnp.int32),
    "position": jnp.full((batch, length), -1, jnp.int32),
  }


def decode(params, tokens, positions, cache):
  """'Hidden' is the weighted sum of all tokens up to one's own position.

  It reads them from the cache at slot = position, so a token that is lost,
  repeated or written in another slot changes every later one.
  """
  del params
  rows = jnp.arange(tokens.shape[0])[:, None]
  slot = jnp.where(positions < 0, cache["token"].shape[1], positions)
  cache = {
    "token": cache["token"].at[rows, slot].set(tokens, mode="drop"),
    "position": cache["position"].at[rows, slot].set(positions, mode="drop"),
  }
  held = cache["position"][:, None, :]
  seen = (held >= 0) & (held <= positions[:, :, None])
  weight = cache["token"] * (1 + cache["position"])
  history = jnp.sum(jnp.where(seen, weight[:, None, :], 0), axis=-1)
  return history[..., None].astype(jnp.float32), cache


def logits(params, hidden):
  """A row of the table `params` [V, V], chosen by the history modulo V."""
  return params[hidden[..., 0].astype(jnp.int32) % V]


def expected(prompt, max_new_tokens, table, stops=(STOP,)):
  """The greedy reply, by the plainest loop there is."""
  tokens = list(prompt)
  for _ in range(max_new_tokens):
    history = sum(token * (i + 1) for i, token in enumerate(tokens)) % V
    tokens.append(int(np.argmax(table[history])))
    if tokens[-1] in stops:
      return tokens[len(prompt) : -1], True
  return tokens[len(prompt) :], False


def generate(table, prompts, **kwargs):
  kwargs = {"stop_ids": [STOP], "max_new_tokens": 8, **kwargs}
  return sampler.generate(decode, logits, init_cache, table, prompts, **kwargs)


def random_table(seed=0, width=V):
  return jax.random.normal(jax.random.key(seed), (V, width))


@settings(max_examples=25, deadline=None)
@given(
  st.lists(
    st.lists(st.integers(0, V - 1), min_size=1, max_size=9),
    min_size=1,
    max_size=7,
  ),
  st.integers(0, 3),
)
def test_greedy_equals_the_plain_loop(prompts, seed):
  """Ragged prompts, several buckets, a last batch that is not full."""
  table = random_table(seed)
  got = generate(table, prompts, batch_size=3, length_bucket=4)
  for prompt, reply in zip(prompts, got, strict=True):
    assert (reply.tokens, reply.stopped) == expected(prompt, 8, table)


def test_stop_tokens():
  # From history h the next token is h + 1, so the replies are known by hand.
  table = jnp.eye(V)[(jnp.arange(V) + 1) % V]
  # [1]: history 1 -> 2; then 1 + 2*2 = 5 -> 6; then 5 + 6*3 = 23 -> 8.
  assert generate(table, [[1]], stop_ids=[8]) == [([2, 6], True)]
  assert generate(table, [[1]], stop_ids=[6, 8]) == [([2], True)]
  assert generate(table, [[1]], stop_ids=[2]) == [([], True)]
  # The stop token counts among the new tokens.
  got = generate(table, [[1]], stop_ids=[8], max_new_tokens=3)
  assert got == [([2, 6], True)]
  got = generate(table, [[1]], stop_ids=[8], max_new_tokens=2)
  assert got == [([2, 6], False)]
  got = generate(table, [[1]], stop_ids=[], max_new_tokens=3)
  assert got == [([2, 6, 8], False)]
  # A stop token inside a prompt ends nothing.
  assert generate(table, [[1, 2]], stop_ids=[2])[0].tokens[:1] == [6]


def test_stops_early():
  """No step runs once every row has stopped, fillers included."""
  steps = []

  def counting(params, tokens, positions, cache):
    jax.debug.callback(lambda: steps.append(1))
    return decode(params, tokens, positions, cache)

  table = jnp.eye(V)[(jnp.arange(V) + 1) % V]
  got = sampler.generate(
    counting, logits, init_cache, table, [[1], [1]],
    stop_ids=[8], max_new_tokens=1000, batch_size=4,
  )  # fmt: skip
  jax.effects_barrier()
  assert got == [([2, 6], True)] * 2
  assert len(steps) == 3  # The prefill and two decoded tokens.


def test_one_program_per_bucket():
  traces = []

  def traced(params, hidden):
    traces.append(hidden.shape)
    return logits(params, hidden)

  def run(prompts, table):
    kwargs = {"stop_ids": [STOP], "max_new_tokens": 4, "length_bucket": 4}
    sampler.generate(
      decode, traced, init_cache, table, prompts, batch_size=2, **kwargs
    )

  run([[1], [2, 3], [1, 2, 3, 4]], random_table(0))
  first = len(traces)
  run([[7, 7], [3]], random_table(1))  # Same bucket, other weights.
  assert len(traces) == first
  run([[1, 2, 3, 4, 5]], random_table(0))  # The next bucket.
  assert len(traces) == 2 * first


def test_reply_does_not_depend_on_neighbours():
  table = random_table()
  prompts = [[i % V] * (1 + i % 5) for i in range(9)]
  kwargs = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
  whole = generate(table, prompts, **kwargs)
  assert generate(table, prompts, batch_size=2, **kwargs) == whole
  assert generate(table, prompts[:4], batch_size=4, **kwargs) == whole[:4]
  others = [p if i == 4 else [5, 5] for i, p in enumerate(prompts)]
  assert generate(table, others, **kwargs)[4] == whole[4]
  # But rows of equal prompts differ from one another, and so do seeds.
  same = generate(table, [[1]] * 8, temperature=1.0)
  assert len({tuple(reply.tokens) for reply in same}) > 1
  assert generate(table, [[1]] * 8, temperature=1.0, seed=1) != same


def draw(weights, rule, n=4000):
  """Counts of n draws from log(weights)."""
  keys = jax.random.split(jax.random.key(0), n)
  rows = jnp.broadcast_to(jnp.log(jnp.asarray(weights)), (n, len(weights)))
  tokens = jax.jit(sampler.choose, static_argnums=2)(keys, rows, rule)
  return np.bincount(np.asarray(tokens), minlength=len(weights))


@pytest.mark.parametrize(
  ("rule", "shares"),
  [
    (sampler.Rule(1.0), [0.4, 0.3, 0.2, 0.1]),
    # Shares are squared, then normalised.
    (sampler.Rule(0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    (sampler.Rule(1.0, top_k=2), [4 / 7, 3 / 7, 0, 0]),
    (sampler.Rule(1.0, top_k=9), [0.4, 0.3, 0.2, 0.1]),
    # 0.4 + 0.3 is short of 0.75, so the third comes along.
    (sampler.Rule(1.0, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
    (sampler.Rule(1.0, top_p=0.01), [1, 0, 0, 0]),
    # After top-k the shares are 4/7, 3/7: p = 0.5 keeps one, 0.6 two.
    (sampler.Rule(1.0, top_k=2, top_p=0.5), [1, 0, 0, 0]),
    (sampler.Rule(1.0, top_k=2, top_p=0.6), [4 / 7, 3 / 7, 0, 0]),
    (sampler.Rule(1e-30), [1, 0, 0, 0]),
    (sampler.Rule(1.0, vocab_size=3), [4 / 9, 3 / 9, 2 / 9, 0]),
    (sampler.Rule(0.0), [1, 0, 0, 0]),
  ],
)
def test_distribution(rule, shares):
  """Chi-square of the draws; nothing outside the support, ever."""
  n = 4000
  weights = np.array([0.4, 0.3, 0.2, 0.1], np.float32)
  counts = draw(weights, rule, n)
  shares = np.array(shares)
  assert counts[shares == 0].sum() == 0
  want = n * shares[shares > 0]
  chi2 = np.sum((counts[shares > 0] - want) ** 2 / want)
  assert chi2 < 16.27  # The 99.9th percentile at three degrees of freedom.


def test_order_of_tokens_does_not_matter():
  """Truncation is by rank, wherever the tokens stand in the vocabulary."""
  x = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
  kept = jnp.isfinite(sampler.truncate(x, 0, 0.6))
  assert kept.tolist() == [False, True, False, True]
  kept = jnp.isfinite(sampler.truncate(x, 3, 1.0))
  assert kept.tolist() == [False, True, True, True]


def test_padded_vocabulary_is_never_sampled():
  # The padding column is by far the likeliest.
  table = jnp.concatenate([random_table(), jnp.full((V, 1), 50.0)], axis=1)
  for temperature in (0.0, 1.0):
    for reply in generate(
      table, [[1], [2], [3]], vocab_size=V, temperature=temperature
    ):
      assert all(token < V for token in reply.tokens)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformer_equals_full_forward_passes(family):
  """Ragged rows with a cache, against one growing row without one."""
  config = config_lib.config_from_fields(
    family,
    vocab_size=61,
    num_layers=2,
    d_model=24,
    d_ff=40,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    max_positions=64,
    init_std=0.3,
  )
  model = transformer.build(config)
  params = jax.jit(model.init)(jax.random.key(0))
  prompts = [[5], [7, 1, 60, 2, 9], [3, 3, 3], [11, 12, 13, 14, 15, 16, 17]]
  got = sampler.generate(
    model.decode, model.logits, model.init_cache, params, prompts,
    stop_ids=[], max_new_tokens=6, batch_size=3, length_bucket=4,
  )  # fmt: skip

  @jax.jit
  def next_token(tokens, last):
    logits = model.logits(params, model.hidden(params, tokens))
    return jnp.argmax(logits[0, last])

  for prompt, reply in zip(prompts, got, strict=True):
    row = np.zeros((1, 16), np.int32)  # Causal: what follows changes nothing.
    row[0, : len(prompt)] = prompt
    for i in range(len(prompt), len(prompt) + 6):
      row[0, i] = next_token(row, i - 1)
    assert reply.tokens == row[0, len(prompt) : len(prompt) + 6].tolist()
  assert len({token for reply in got for token in reply.tokens}) > 4


def test_no_prompts():
  assert generate(random_table(), []) == []


@pytest.mark.parametrize(
  ("prompts", "kwargs", "match"),
  [
    ([[1], []], {}, "prompt 1 is empty"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ([[1]], {"temperature": -1.0}, "temperature is -1"),
    ([[1]], {"top_k": -1}, "top_k is -1"),
    ([[1]], {"top_p": 0.0}, "top_p is 0"),
    ([[1]], {"top_p": 1.5}, "top_p is 1.5"),
    ([[1]], {"batch_size": 0}, "batch_size is 0"),
    ([[1]], {"length_bucket": 0}, "length_bucket is 0"),
  ],
)
def test_errors(prompts, kwargs, match):
  with pytest.raises(ValueError, match=match):
    generate(random_table(), prompts, **kwargs)
