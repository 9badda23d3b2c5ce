"""Perplexity from sums, and two models compared token by token."""

import dataclasses
import math

import jax
import numpy as np
import pytest

import tiny
from sft_jax.data import packing
from sft_jax.data.encoding.encode import Example
from sft_jax.evals import forgetting
from sft_jax.models import transformer


def test_a_uniform_guess_among_v_has_perplexity_v():
  found = forgetting.perplexity(10 * math.log(64), 10)
  assert found.value == pytest.approx(64)


def test_perplexity_is_of_sums_not_a_mean_of_batches():
  parts = [(math.log(2), 1), (3 * math.log(8), 3)]
  nats, tokens = (sum(side) for side in zip(*parts, strict=True))
  found = forgetting.perplexity(nats, tokens)
  assert found.value == pytest.approx(2 ** (10 / 4))


@pytest.mark.parametrize("sums", [(1.0, 0), (math.nan, 3), (math.inf, 3)])
def test_no_figure_from_nothing(sums):
  with pytest.raises(ValueError, match="expected a finite sum"):
    forgetting.perplexity(*sums)


def models():
  """Two of one shape, other in all parameters."""
  model = transformer.build(tiny.SPECK)
  return model, *(model.init(jax.random.key(seed)) for seed in (0, 1))


def examples():
  rng = np.random.default_rng(0)
  found = []
  for n in (5, 70, 9, 2, 33):
    weights = rng.integers(0, 2, n).astype(np.float32)
    weights[0], weights[-1] = 0, 1
    tokens = rng.integers(0, tiny.SPECK.vocab_size, n).astype(np.int32)
    found.append(Example(tokens, weights, np.zeros(n, np.uint8)))
  return found


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_two_models_against_float64_by_hand(batch_size):
  model, ours, theirs = models()
  nats = kl = kept = right = still = weight = 0.0
  for one in examples():

    def log_p(params, one=one):
      z = model.logits(params, model.hidden(params, one.tokens[None]))
      z = np.asarray(z, np.float64)[0]
      return z - np.log(np.exp(z).sum(-1, keepdims=True))

    p, q = log_p(theirs), log_p(ours)
    for i in range(1, len(one.tokens)):
      w, y = one.loss_weights[i], one.tokens[i]
      was, now = p[i - 1], q[i - 1]
      nats -= w * now[y]
      kl += w * (np.exp(was) * (was - now)).sum()
      kept += w * (was.argmax() == now.argmax())
      right += w * (was.argmax() == y)
      still += w * (was.argmax() == now.argmax() == y)
      weight += w
  found = forgetting.compare_models(
    model, ours, (model, theirs), examples(), batch_size=batch_size
  )
  assert found.base is not None
  got = (found.nats, found.weight, *found.base)
  np.testing.assert_allclose(
    got, (nats, weight, kl, kept, right, still), rtol=1e-5
  )
  left = forgetting.base_agreement(found.base, found.weight)
  assert left["kl"] == pytest.approx(kl / weight, rel=1e-5)
  assert left["top1_agreement"] == pytest.approx(kept / weight)
  alone = forgetting.compare_models(
    model, ours, None, examples(), batch_size=batch_size
  )
  assert alone.base is None
  assert alone.nats == pytest.approx(nats, rel=1e-5)


def test_models_of_other_vocabularies_are_not_compared():
  model, ours, theirs = models()
  wider = dataclasses.replace(model.config, vocab_size=32)
  other = model._replace(config=wider)
  with pytest.raises(ValueError, match="expected the same of both"):
    forgetting.compare_models(
      model, ours, (other, theirs), examples(), batch_size=2
    )
  with pytest.raises(ValueError, match="no examples"):
    forgetting.compare_models(model, ours, None, [], batch_size=2)


def test_batches_hold_every_example_once():
  rows = [row for batch in packing.padded_batches(examples(), 2) for row in zip(
    *(batch.tokens, batch.targets, batch.loss_weights, batch.segment_ids),
    strict=True,
  )]  # fmt: skip
  assert len(rows) == 6
  for one, (tokens, targets, weights, segments) in zip(
    examples(), rows, strict=False
  ):
    n = len(one.tokens)
    assert tokens[:n].tolist() == one.tokens.tolist()
    assert targets[: n - 1].tolist() == one.tokens[1:].tolist()
    assert weights[: n - 1].tolist() == one.loss_weights[1:].tolist()
    assert not weights[n - 1 :].any()
    assert segments.sum() == n
  assert not rows[-1][2].any()
