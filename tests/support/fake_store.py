"""A store in memory, for tests of what comes after the cache."""

import hashlib

import numpy as np

from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.encoding.encode import Example
from sft_jax.data.sources import Source
from sft_jax.data.store.files import INDEX, RUN
from sft_jax.data.store.shards import to_runs
from sft_jax.data.store.stats import DatasetStats
from sft_jax.data.store.store import Store, count

USER, ANSWER = TOKEN_ROLES.index("user"), TOKEN_ROLES.index("answer")


def fake_store(
  examples, *, source=None, weights=(1.0,), text=False, sources=None
):
  """A store of [(tokens, loss_weights)], all trained in part.

  Args:
    examples: pairs of equally long lists.
    source: number of each example's source; all 0 by default.
    weights: repeats of each source.
    sources: these sources, instead of `weights`.
    text: whether all rows are raw text.
  """
  index = np.zeros(len(examples), INDEX)
  index["length"] = [len(tokens) for tokens, _ in examples]
  index["start"] = np.cumsum(index["length"]) - index["length"]
  index["row"] = index["content"] = np.arange(len(examples))
  index["trained"] = [np.count_nonzero(w) for _, w in examples]
  index["last_trained"] = [max(np.flatnonzero(w)) for _, w in examples]
  index["source"] = 0 if source is None else source
  index["text"] = index["may_run_on"] = text
  places = [f"rows.jsonl:{i + 1}".encode() for i in range(len(examples))]
  index["place_length"] = [len(place) for place in places]
  index["place"] = np.cumsum(index["place_length"]) - index["place_length"]
  tokens = np.array([t for tokens, _ in examples for t in tokens], np.int32)
  runs = [
    to_runs(
      Example(
        np.array(tokens, np.int32),
        np.array(weights, np.float32),
        np.where(np.array(weights) > 0, ANSWER, USER).astype(np.uint8),
      )
    )
    for tokens, weights in examples
  ]
  index["runs"] = [len(one) for one in runs]
  index["run"] = np.cumsum(index["runs"]) - index["runs"]
  sources = sources or tuple(
    Source(f"{i}.jsonl", w) for i, w in enumerate(weights)
  )
  all_runs = np.concatenate([np.empty(0, RUN), *runs])
  stats = count(index, all_runs, sources, DatasetStats())
  for entry in stats.sources.values():
    entry.rows_in = entry.rows_trained
  return Store(
    tokens=tokens,
    runs=all_runs,
    places=np.frombuffer(b"".join(places), np.uint8),
    index=index,
    sources=sources,
    fingerprint=hashlib.sha256(tokens.tobytes()).hexdigest(),
    fingerprint_inputs={},
    stats=stats,
  )


def random_store(number, *, longest, seed=0, **kwargs):
  """A store of random examples, no two of which begin with the same token.

  Tokens count up from 1000 times the example's number (from 1), so that a
  token tells its example and position.
  """
  rng = np.random.default_rng(seed)
  examples = []
  for i in range(1, number + 1):
    length = int(rng.integers(2, longest + 1))
    weights = rng.choice([0.0, 0.5, 1.0], length)
    weights[0], weights[-1] = 0, 1
    examples.append((list(range(1000 * i, 1000 * i + length)), weights))
  return fake_store(examples, **kwargs)
