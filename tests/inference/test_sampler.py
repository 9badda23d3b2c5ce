"""The sampler against fake models whose every next token is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.common import sharding
from sft_jax.inference import decode as decoding
from sft_jax.inference import sampler
from sft_jax.inference.sampling import Rule
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
  assert len(steps) == 4  # Two prompts that enter, two decoded tokens.


def test_one_program_per_bucket():
  """A bucket of prompts compiles one prefill; decoding compiles once."""
  traces = []

  def traced(params, hidden):
    traces.append(hidden.shape)
    return logits(params, hidden)

  def run(prompts, table, **kwargs):
    kwargs = {"stop_ids": [STOP], "max_new_tokens": 4, **kwargs}
    sampler.generate(
      decode, traced, init_cache, table, prompts, batch_size=2,
      length_bucket=4, **kwargs,
    )  # fmt: skip

  run([[1], [2, 3], [1, 2, 3, 4]], random_table(0))
  assert len(traces) == 2  # A prefill of 4 slots, and decoding.
  # Other weights, seeds, numbers of prompts and of tokens (of one bucket).
  run([[7, 7], [3]], random_table(1))
  run([[7, 7]] * 9, random_table(1), seeds=list(range(9)), max_new_tokens=2)
  assert len(traces) == 2
  run([[1, 2, 3, 4, 5]], random_table(0))  # The next bucket, a longer cache.
  assert len(traces) == 4
  # Short prompts beside long ones share their program for decoding.
  run([[1, 2, 3, 4, 5], [1], [2], [3]], random_table(0))
  assert len(traces) == 5


def test_the_cache_grows_with_the_replies():
  """Nobody attends to slots for tokens that are never written."""
  table, lengths = random_table(5), []

  def seen(params, tokens, positions, cache):
    if tokens.shape[1] == 1:
      lengths.append(cache["token"].shape[1])
    return decode(params, tokens, positions, cache)

  def run(prompts, **kwargs):
    found = sampler.generate(
      seen, logits, init_cache, table, prompts, batch_size=2,
      length_bucket=4, every=3, max_new_tokens=40, **kwargs,
    )  # fmt: skip
    return [(reply.tokens, reply.stopped) for reply in found]

  prompts = [[1, 2], [3], [4, 5, 6], [7]]
  # Every reply ends at once, or none does.
  short = run(prompts, stop_ids=range(V))
  assert short == [([], True)] * 4
  assert lengths == []  # Their prefill ended them.
  long = run(prompts, stop_ids=[])
  assert long == [expected(p, 40, table, ()) for p in prompts]
  # 3 + 3 tokens in buckets of 4; twice; all 4 + 40 of the longest.
  assert lengths == [8, 16, 44]


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


def test_every_token_is_drawn_anew():
  """All tokens alike likely: one number for all steps would repeat one."""
  for reply in generate(
    jnp.zeros((V, V)), [[1]] * 4, temperature=1.0, stop_ids=[]
  ):
    assert len(set(reply.tokens)) > 2


def test_a_seed_of_its_own_makes_a_reply():
  """Whatever its neighbours, its place and the size of the batch."""
  table = random_table()
  prompts = [[i % V] * (1 + i % 5) for i in range(9)]
  seeds = [7 * i for i in range(9)]
  whole = generate(table, prompts, temperature=1.0, seeds=seeds)
  for i in (0, 4, 8):
    alone = generate(table, [prompts[i]], temperature=1.0, seeds=[seeds[i]])
    assert alone == [whole[i]]
  turned = generate(
    table, prompts[::-1], temperature=1.0, seeds=seeds[::-1], batch_size=4
  )
  assert turned[::-1] == whole
  other = generate(table, [prompts[4]], temperature=1.0, seeds=[seeds[4] + 1])
  assert other != [whole[4]]


def test_rows_that_free_up_are_taken():
  """Twelve short replies do not wait for a long one of their batch."""
  decoded = []

  def counting(params, tokens, positions, cache):
    jax.debug.callback(lambda n=tokens.shape[1]: decoded.append(n))
    return decode(params, tokens, positions, cache)

  # 3 * (1 + position) sums to 3, 9, 18, ...: [3] never reaches the stop, 15
  # does at once.
  table = jnp.eye(V)[jnp.array([3] * 15 + [STOP])]
  prompts = [[3], *[[15]] * 12]
  got = sampler.generate(
    counting, logits, init_cache, table, prompts, stop_ids=[STOP],
    max_new_tokens=20, batch_size=4, length_bucket=4,
  )  # fmt: skip
  jax.effects_barrier()
  for prompt, reply in zip(prompts, got, strict=True):
    want = expected(prompt, 20, np.asarray(table))
    assert (reply.tokens, reply.stopped) == want
  # 13 prompts entered, one by one; in batches of four, each waiting for its
  # slowest, the twelve would have cost as much again.
  assert decoded.count(4) == 13
  assert decoded.count(1) <= 20


def test_pieces_add_up():
  table = random_table(2)
  prompts = [[1], [2, 3], [4]]
  pieces = list(
    sampler.stream(
      decode, logits, init_cache, table, prompts, stop_ids=[STOP],
      max_new_tokens=9, every=2,
    )
  )  # fmt: skip
  whole = generate(table, prompts, max_new_tokens=9)
  for i, reply in enumerate(whole):
    mine = [piece for piece in pieces if piece.index == i]
    assert [t for piece in mine for t in piece.tokens] == reply.tokens
    assert [piece.reply for piece in mine[:-1]] == [None] * (len(mine) - 1)
    assert mine[-1].reply == reply
    assert all(len(piece.tokens) <= 2 for piece in mine)


def test_a_reply_is_cut_where_the_host_says():
  table = jnp.eye(V)[(jnp.arange(V) + 1) % V]
  prompts = [[1], [2], [3]]
  whole = generate(table, prompts, stop_ids=[], max_new_tokens=12)

  def cut(index, tokens):
    return 3 if index == 1 and len(tokens) >= 3 else None

  for every in (1, 5, 64):
    got = generate(
      table, prompts, stop_ids=[], max_new_tokens=12, cut=cut, every=every
    )
    assert got[0] == whole[0]
    assert got[1] == (whole[1].tokens[:3], True)
    assert got[2] == whole[2]


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


def tiny_model(**fields):
  config = config_lib.config_from_fields(
    "llama", vocab_size=64, num_layers=2, d_model=32, d_ff=64, num_heads=4,
    num_kv_heads=2, head_dim=8, max_positions=64, init_std=0.3, **fields,
  )  # fmt: skip
  model = transformer.build(config)
  return model, jax.jit(model.init)(jax.random.key(0))


PROMPTS = [[5], [7, 1, 60, 2, 9], [3, 3, 3], [11, 12, 13, 14, 15, 16, 17], [9]]


def replies_of(model, params, prompts, **kwargs):
  kwargs = {"stop_ids": [], "max_new_tokens": 8, "length_bucket": 8, **kwargs}
  return sampler.generate(
    model.decode, model.logits, model.init_cache, params, prompts, **kwargs
  )


def test_unequal_prompts_together_equal_each_alone():
  """Right padding is neither written nor seen; a batch's rows never meet."""
  model, params = tiny_model()
  for choice in ({}, {"temperature": 1.0, "top_p": 0.9}):
    seeds = list(range(len(PROMPTS)))
    whole = replies_of(model, params, PROMPTS, seeds=seeds, **choice)
    for prompt, seed, reply in zip(PROMPTS, seeds, whole, strict=True):
      alone = replies_of(model, params, [prompt], seeds=[seed], **choice)
      assert alone == [reply]


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_a_mesh_samples_the_same_tokens(shape):
  """Rows on data and fsdp, heads on tensor, parameters where they train."""
  model, params = tiny_model()
  want = replies_of(model, params, PROMPTS)
  mesh = sharding.make_mesh(*shape)
  spread = jax.device_put(params, sharding.param_shardings(params, mesh))
  assert replies_of(model, spread, PROMPTS, mesh=mesh) == want
  how = decoding.How(
    *(model.decode, model.logits, model.init_cache, False, Rule(), mesh)
  )
  # Each device holds its share of the rows and no other.
  rows = decoding.start(model=how, B=8, S=16).cache["k"]
  local = rows.addressable_shards[0].data.shape
  assert local[1] == 8 // (shape[0] * shape[1])


def test_an_int8_cache_changes_little():
  """Logits are off by a hundredth or two of their spread, tokens hardly."""
  model, params = tiny_model()
  tokens = np.array([PROMPTS[3], PROMPTS[3][::-1]])
  positions = np.broadcast_to(np.arange(7), (2, 7))

  @functools.partial(jax.jit, static_argnums=2)
  def run(tokens, positions, int8):
    cache = model.init_cache(2, 8, int8=int8)
    hidden, cache = model.decode(params, tokens, positions, cache)
    return model.logits(params, hidden), cache

  plain, _ = run(tokens, positions, False)
  coarse, cache = run(tokens, positions, True)
  assert cache["k"].dtype == jnp.int8
  gap = np.asarray(coarse - plain)
  assert 0 < np.sqrt(np.mean(gap**2)) < 0.03 * np.std(plain)
  few = replies_of(model, params, PROMPTS, max_new_tokens=4, int8_cache=True)
  same = replies_of(model, params, PROMPTS, max_new_tokens=4)
  assert np.mean([a == b for a, b in zip(few, same, strict=True)]) >= 0.6


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
    ([[1]], {"min_p": 1.5}, "min_p is 1.5"),
    ([[1]], {"seeds": [1, 2]}, "expected one for each of 1 prompts"),
    ([[1]], {"every": 65}, "every is 65"),
    ([[1]], {"batch_size": 0}, "batch_size is 0"),
    ([[1]], {"length_bucket": 0}, "length_bucket is 0"),
  ],
)
def test_errors(prompts, kwargs, match):
  with pytest.raises(ValueError, match=match):
    generate(random_table(), prompts, **kwargs)
