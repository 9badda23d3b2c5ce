"""Losses of pairs: float64 formulas, every logit at once, and TRL's own."""

import collections
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.common import sharding
from sft_jax.common.batch import Batch
from sft_jax.data.encoding.encode import Example
from sft_jax.data.packing import pack_row, stack_rows
from sft_jax.step import preferences
from sft_jax.step.loss import linear_cross_entropy
from sft_jax.step.preferences import Preference

D, V, T, MOST = 8, 19, 40, 6
CHOICES = [
  Preference("dpo", 0.3, sft=0.2),
  Preference("dpo", 0.3, 0.1),
  Preference("ipo", 0.2),
  Preference("robust", 0.5, 0.2),
  Preference("simpo", 2.0, margin=0.7),
  Preference("orpo", 0.4),
  Preference("kto", 0.6),
]
NAMES = [f"{c.loss}{c.label_smoothing or ''}" for c in CHOICES]


def formula(choice, c, r, ref_c, ref_r, n, m, z0):
  """The loss of a pair in float64, from the sums of log p of its sides."""
  b, e = choice.beta, choice.label_smoothing
  log_sigmoid = lambda x: -np.logaddexp(0, -x)
  z = b * ((c - ref_c) - (r - ref_r))
  if choice.loss == "simpo":
    z = b * (c / n - r / m) - choice.margin
  own = {
    "dpo": lambda: -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z),
    "robust": lambda: (
      (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e)
    ),
    "ipo": lambda: ((c - ref_c) / n - (r - ref_r) / m - 1 / (2 * b)) ** 2,
    "orpo": lambda: (
      -c / n
      - b
      * log_sigmoid(
        np.log(np.exp(c / n) / (1 - np.exp(c / n)))
        - np.log(np.exp(r / m) / (1 - np.exp(r / m)))
      )
    ),
    "kto": lambda: (
      0.5
      * (
        1
        - 1 / (1 + np.exp(-b * (c - ref_c - z0)))
        + 1
        - 1 / (1 + np.exp(-b * (z0 - r + ref_r)))
      )
    ),
  }
  own["simpo"] = own["dpo"]
  return own[choice.loss]() - choice.sft * c / n


def pair(rng, first, second):
  """An Example of two sides of so many tokens, half of them trained."""
  parts = []
  for n in (first, second):
    weights = np.zeros(n, np.float32)
    weights[n // 2 :] = 1
    parts.append((rng.integers(1, V, n).astype(np.int32), weights))
  tokens, weights = (np.concatenate(x) for x in zip(*parts, strict=True))
  roles = np.zeros(first + second, np.uint8)
  return Example(tokens, weights, roles, rejected=second)


def made_batch(rows=4):
  rng = np.random.default_rng(3)
  sizes = iter(itertools.product((4, 7), (5, 9)))
  examples = [[pair(rng, *next(sizes)) for _ in range(2)] for _ in range(2)]
  examples += [[pair(rng, 6, 4)], []] + [[]] * (rows - 4)
  scales = [[1.0, 3.0], [0.5, 1.0], [2.0], []]
  return stack_rows(
    [
      pack_row(row, T, scales=scales[i % 4], pairs=True)
      for i, row in enumerate(examples)
    ]
  )


def predicted(seed):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  # Hidden states are a function of the token, so that rows may move.
  return draw(V, D), draw(V, D)


def run(choice, batch, table, head, old=None, rows=None, most=MOST):
  """The sums of a batch whose hidden states are rows of a table."""
  kwargs = {"chunk_tokens": 4, "rows": rows}
  both = lambda t, h: (t[batch.tokens] + t[batch.targets] * 0.1, h)
  reference = None
  if choice.loss not in preferences.WITHOUT_REFERENCE:
    assert old is not None
    reference = preferences.document_logps(both(*old), batch, most, **kwargs)
  chosen = preferences.chosen_only(batch)
  measured = linear_cross_entropy(
    *both(table, head), batch.targets, chosen.loss_weights, **kwargs
  )
  return preferences.objective(
    *(choice, both(table, head), batch, reference, measured, most), **kwargs
  )


def brute_force(choice, batch, table, head, old, z0=None):
  """(sum, weight) of all pairs, in float64, each document by itself."""

  def logp(row, segment, table, head):
    slots = (batch.segment_ids[row] == segment) & (batch.loss_weights[row] != 0)
    table, head = np.float64(table), np.float64(head)
    hidden = table[batch.tokens[row]] + 0.1 * table[batch.targets[row]]
    z = hidden @ head.T
    log_p = z - np.logaddexp.reduce(z, axis=-1, keepdims=True)
    at = np.flatnonzero(slots)
    weight = batch.loss_weights[row][at].sum()
    return log_p[at, batch.targets[row][at]].sum(), len(at), weight

  found = []
  for row in range(len(batch.tokens)):
    for k in range(1, batch.segment_ids[row].max() // 2 + 1):
      sides = (2 * k - 1, 2 * k)
      (c, n, w), (r, m, v) = (logp(row, s, table, head) for s in sides)
      ref_c, ref_r = (logp(row, s, *old)[0] for s in sides)
      found.append((c, r, ref_c, ref_r, n, m, (w + v) / (n + m)))
  ratios = [x for c, r, a, b, *_ in found for x in (c - a, r - b)]
  z0 = max(np.mean(ratios), 0) if z0 is None else z0
  each = [(formula(choice, *x[:6], z0), x[6]) for x in found]
  return sum(w * x for x, w in each), sum(w for _, w in each), found, z0


@pytest.fixture(scope="module")
def case():
  batch = made_batch()
  table, head = predicted(0)
  noise = predicted(1)
  old = (table + 0.3 * noise[0], head + 0.3 * noise[1])
  return batch, table, head, old


@pytest.mark.parametrize("choice", CHOICES, ids=NAMES)
def test_a_loss_is_its_formula_and_its_gradient_the_slope(case, choice):
  batch, table, head, old = case
  if choice.loss == "kto":  # The other way round its origin is below 0.
    (table, head), old = old, (table, head)
  want, weight, found, z0 = brute_force(choice, batch, table, head, old)
  assert z0 > 0.1 or choice.loss != "kto"

  def value(table, head):
    sums = run(choice, batch, table, head, old)
    return sums.objective, sums

  (got, sums), slopes = jax.jit(
    jax.value_and_grad(value, (0, 1), has_aux=True)
  )(table, head)
  assert float(got) == pytest.approx(want, rel=1e-5)
  assert float(sums.count) == pytest.approx(weight)
  assert float(sums.named["preference"]) == pytest.approx(want, rel=1e-5)
  # Central differences of the float64 formula, along random directions.
  for seed in (5, 6):
    along = predicted(seed)
    step = 1e-5
    moved = [
      [np.float64(x) + s * step * np.float64(d) for x, d in
       zip((table, head), along, strict=True)]
      for s in (1, -1)
    ]  # fmt: skip
    # z0 of KTO is a constant of the gradient.
    up, down = (brute_force(choice, batch, *x, old, z0)[0] for x in moved)
    slope = sum(
      float((g * d).sum()) for g, d in zip(slopes, along, strict=True)
    )
    assert slope == pytest.approx((up - down) / (2 * step), rel=2e-4)
  # Metrics: rewards of both sides, and the chosen sides' nats alone.
  if choice.loss == "dpo":
    rewards = [
      (w, choice.beta * (c - a), choice.beta * (r - b))
      for c, r, a, b, _, _, w in found
    ]
    wanted = {
      "reward_chosen": sum(w * c for w, c, _ in rewards),
      "reward_rejected": sum(w * r for w, _, r in rewards),
      "reward_margin": sum(w * (c - r) for w, c, r in rewards),
      "reward_accuracy": sum(w * (c > r) for w, c, r in rewards),
    }
    for name, x in wanted.items():
      assert float(sums.named[name]) == pytest.approx(x, rel=1e-4, abs=1e-5)
    chosen = batch.loss_weights[batch.segment_ids % 2 == 1].sum()
    assert float(sums.weight) == pytest.approx(chosen)


def test_packing_cutting_and_sharding_change_nothing(case):
  """Pairs alone in rows, in two micro-batches, and over 4 devices."""
  batch, table, head, old = case
  choice = CHOICES[0]
  loss = lambda t, h, b, rows=None: run(choice, b, t, h, old, rows).objective
  whole, slopes = jax.value_and_grad(loss, (0, 1))(table, head, batch)
  cut = lambda rows: jax.tree.map(lambda x: x[rows], batch)
  parts = [
    jax.value_and_grad(loss, (0, 1))(table, head, cut(rows))
    for rows in ([0, 3], [1, 2])
  ]
  mesh = sharding.make_mesh(4, 1, 1, devices=jax.devices()[:4])
  rows = sharding.row_sharding(mesh)
  spread = jax.device_put(batch, rows)
  there = jax.jit(
    jax.value_and_grad(lambda t, h, b: loss(t, h, b, rows), (0, 1))
  )(table, head, spread)
  added = jax.tree.map(lambda a, b: a + b, *parts)
  for other in (added, there):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
      (whole, slopes),
      other,
    )


def test_one_sided_rows_are_desirable_or_not(case):
  """KTO over rows of one answer each: good ones pull up, bad ones down."""
  _, table, head, old = case
  rng = np.random.default_rng(0)
  good, bad = (pair(rng, 6, 0), pair(rng, 0, 6))
  batch = stack_rows([pack_row([good, bad], T, pairs=True)])
  assert sorted(set(batch.segment_ids[0])) == [0, 1, 4]
  choice = Preference("kto", 0.5)
  for one in (good, bad):
    row = stack_rows([pack_row([one], T, pairs=True)])
    loss = lambda h, row=row: run(choice, row, table, h, old).objective
    slope = jax.grad(loss)(head)
    assert float(loss(head - 0.01 * slope)) < float(loss(head))
    likelier = lambda h, row=row: preferences.document_logps(
      (table[row.tokens] + 0.1 * table[row.targets], h), row, 1
    ).sum()
    rises = float(likelier(head - 0.01 * slope) - likelier(head))
    assert rises > 0 if one is good else rises < 0
    assert float(run(choice, row, table, head, old).count) == 1


@pytest.fixture(scope="module")
def drawn():
  """Trained tokens [5, 2], and per-token log p [5, 2, 8] of two models."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(2, 9, (5, 2))
  there = np.arange(8) < tokens[..., None]
  new, old = (
    np.float32(-rng.uniform(0.1, 1.5, (5, 2, 8)) * there) for _ in range(2)
  )
  return tokens, new, old


def ours(choice, drawn):
  """Loss per pair, summed, and its slope along each token's log p."""
  tokens, new, old = drawn
  reference = jnp.asarray(old.sum(-1))
  total = lambda x: choice.losses(
    x, reference, jnp.asarray(tokens, jnp.float32)
  ).sum()
  return jax.value_and_grad(total)(jnp.asarray(new.sum(-1)))


@pytest.mark.parametrize("name", preferences.LOSSES)
def test_losses_are_trls(drawn, name):
  """TRL's own code on the same log-probabilities: values, slopes, to 1e-4."""
  torch = pytest.importorskip("torch")
  pytest.importorskip("trl")
  tokens, new, old = drawn
  per_token = torch.tensor(new, requires_grad=True)
  sums, before = per_token.sum(-1), torch.tensor(old.sum(-1))
  # TRL's DPO knows neither label smoothing nor the other term.
  choice = {x.loss: x for x in CHOICES}[name]
  choice = Preference("dpo", 0.3) if name == "dpo" else choice
  beta = choice.beta
  same = lambda x: x
  known = SimpleNamespace(
    beta=beta, label_smoothing=choice.label_smoothing, aux_loss_enabled=False,
    ld_alpha=None, precompute_ref_logps=True, use_weighting=False,
    f_divergence_type="reverse_kl", loss_weights=[1.0], loss_type=name,
    loss_types=["sigmoid" if name == "dpo" else name], alpha=0.0,
    simpo_gamma=choice.margin, model=SimpleNamespace(training=True),
    calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0,
    _metrics={"train": collections.defaultdict(list)}, _total_train_tokens=0,
    _tp_size=1,
    accelerator=SimpleNamespace(
      device="cpu", gather=same, gather_for_metrics=same
    ),
  )  # fmt: skip
  if name in ("simpo", "orpo"):
    mean = sums / torch.tensor(tokens)
    if name == "simpo":
      from trl.experimental.cpo.cpo_trainer import CPOTrainer

      losses, *_ = CPOTrainer.cpo_loss(known, mean[:, 0], mean[:, 1])
      want = losses.sum()
    else:
      from trl.experimental.orpo.orpo_trainer import ORPOTrainer

      found = ORPOTrainer.odds_ratio_loss(known, mean[:, 0], mean[:, 1])
      want = (-mean[:, 0] - found[0]).sum()
  else:
    # A batch of chosen, then rejected; the first token is predicted by none.
    flat = per_token.transpose(0, 1).reshape(10, 8)
    mask = torch.tensor(new != 0).transpose(0, 1).reshape(10, 8)
    mask = torch.nn.functional.pad(mask, (1, 0)).long()
    zeros = torch.zeros(10, 8)
    output = SimpleNamespace(
      log_probs=flat, entropy=zeros, mean_logits=zeros, is_top1=zeros > 1
    )
    inputs = {
      "input_ids": mask, "attention_mask": mask, "completion_mask": mask,
      "ref_chosen_logps": before[:, 0], "ref_rejected_logps": before[:, 1],
    }  # fmt: skip
    if name == "kto":
      from trl import KTOTrainer as Trainer

      documents = before.T.reshape(10)
      # TRL's answers of other rows are, as ours, those of the batch.
      known._compute_kl_logps = lambda model, batch: flat.sum(-1)
      inputs = {k: x for k, x in inputs.items() if "chosen" not in k}
      inputs = {k: x for k, x in inputs.items() if "rejected" not in k} | {
        "label": torch.arange(10) < 5,
        "ref_logps": documents, "ref_KL_logps": documents,
      }  # fmt: skip
    else:
      from trl import DPOTrainer as Trainer
    want = 5 * Trainer._compute_loss(known, lambda **_: output, inputs, False)
  want.backward()
  value, slope = ours(choice, drawn)
  assert float(value) == pytest.approx(float(want.detach()), rel=1e-4)
  grad = per_token.grad.numpy()
  np.testing.assert_allclose(slope, grad[..., 0], rtol=1e-4, atol=1e-6)


def test_batch_fields_are_as_they_were():
  """A batch without pairs is packed as before."""
  rng = np.random.default_rng(0)
  one = pair(rng, 5, 0)
  plain = pack_row([one, one], T)
  assert isinstance(plain, Batch)
  assert sorted(set(plain.segment_ids[0].tolist())) == [0, 1, 2]
