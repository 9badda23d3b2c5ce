"""Replies in the places of answers; a whole run is in test_distillation."""

from types import SimpleNamespace

import numpy as np
import pytest

from sft_jax.data import packing
from sft_jax.data.encoding.encode import Example
from sft_jax.inference import on_policy


def example(prompt, answer):
  weights = [0.0] * len(prompt) + [0.5] * len(answer)
  roles = [2] * len(prompt) + [4] * (len(answer) - 1) + [7]
  return Example(
    np.int32(prompt + answer), np.float32(weights), np.uint8(roles)
  )


def pair(better, shown):
  fields = ("tokens", "loss_weights", "roles")
  joined = [
    np.concatenate([getattr(x, name) for x in (better, shown)])
    for name in fields
  ]
  return Example(*joined, rejected=len(shown.tokens))


TEXT = Example(
  np.arange(10, 14, dtype=np.int32),
  np.float32([0, 1, 1, 1]),
  np.full(4, 8, np.uint8),
)


@pytest.fixture
def stream():
  examples = [
    example([5, 6, 7], [20, 21, 2]),
    TEXT,
    example([8, 9], [30, 3]),
    pair(example([5, 6], [20, 2]), example([5, 6, 33], [20, 2])),
  ]
  return SimpleNamespace(
    seq_len=20,
    num_steps=3,
    store=SimpleNamespace(example=lambda i: examples[i]),
    rows_of=lambda step: [[0, 1], [2, 0], [3]],
    row=lambda ids, made: packing.pack_row(made, 20, pairs=len(ids) == 1),
  )


def test_replies_follow_their_prompts_and_a_round_is_kept(
  tmp_path, monkeypatch, stream
):
  asked = []

  def sample(model, params, tokenizer, prompts, **choices):
    """As many tokens as the prompt's first id, of the weights' number."""
    asked.append((prompts, choices))
    for i, prompt in enumerate(prompts):
      tokens = [params["w"]] * prompt[0]
      reply = SimpleNamespace(tokens=tokens, stopped=True)
      yield SimpleNamespace(index=i, reply=reply)

  monkeypatch.setattr(on_policy, "sample", sample)
  make = lambda every: on_policy.OnPolicy(
    stream, None, SimpleNamespace(stop_ids=(2, 3)),
    every=every, seed=1, folder=tmp_path,
  )  # fmt: skip
  own = make(2)
  batch = own.batch(0, {"w": 100}, [0, 1, 2])
  w = lambda n: [100] * n
  # A reply has its answer's slots and its share of those that are free.
  assert batch.tokens.tolist() == [
    [5, 6, 7, *w(5), 2, 10, 11, 12, 13, *[0] * 7],
    [8, 9, *w(7), 5, 6, 7, *w(5), 2, 0, 0],
    [5, 6, *w(5), 2, 5, 6, 33, *w(5), 2, *[0] * 3],
  ]
  weights = batch.loss_weights
  assert weights[0].tolist() == ([0, 0, *[0.5] * 6, 0, 1, 1, 1, *[0] * 8])
  assert batch.roles[0, :9].tolist() == [2, 2, 4, 4, 4, 4, 4, 7, 0]
  assert batch.segment_ids[2].tolist() == [*[1] * 8, *[2] * 9, *[0] * 3]
  trained = [batch.targets[2][(weights[2] > 0) & side] for side in (
    batch.segment_ids[2] == 1, batch.segment_ids[2] == 2)]  # fmt: skip
  assert trained[0].tolist() == trained[1].tolist() == [*w(5), 2]
  # The second step of the round: other weights change nothing.
  again = own.batch(1, {"w": 7}, [0, 1, 2])
  assert (again.tokens == batch.tokens).all()
  resumed = make(2).batch(1, {"w": 7}, [1])
  assert (resumed.tokens == again.tokens[1:2]).all()
  assert (own.batch(2, {"w": 7}, [0]).tokens[0, 3:8] == 7).all()
  assert len(asked) == 2
  assert len(asked[0][0]) == 2 * len(asked[1][0]) == 8
  seeds = asked[0][1]["seeds"] + asked[1][1]["seeds"]
  assert len(set(seeds)) == len(seeds)
  with pytest.raises(ValueError, match="Put it back"):
    make(3).batch(4, {"w": 7}, [0])
