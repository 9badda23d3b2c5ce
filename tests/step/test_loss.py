"""The chunked loss against float64 NumPy, and its invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.common import sharding
from sft_jax.step.loss import (
  NATS,
  BaseSums,
  Objective,
  linear_cross_entropy,
)

B, T, D, V, G = 3, 10, 8, 17, 4


@pytest.fixture
def case():
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(B, T, D)).astype(np.float32) * 2
  head = rng.normal(size=(V, D)).astype(np.float32)
  targets = rng.integers(0, V, (B, T)).astype(np.int32)
  weights = rng.choice([0, 0.5, 1, 2], size=(B, T)).astype(np.float32)
  return tuple(map(jnp.asarray, (hidden, head, targets, weights)))


def reference(hidden, head, targets, weights, softcap=None, objective=NATS):
  """Values in float64 from all logits at once; gradients by differences.

  Returns:
    {objective, nats, weight, correct, entropy, d_hidden, d_head, and per
    token: nll, hit}.
  """
  h, e, w = (np.asarray(x, np.float64) for x in (hidden, head, weights))
  y = np.asarray(targets)

  def logits(h, e):
    z = h @ e.T
    return softcap * np.tanh(z / softcap) if softcap else z

  def log_p(z):
    top = z.max(-1, keepdims=True)
    log_z = np.log(np.exp(z - top).sum(-1, keepdims=True)) + top
    return z - log_z, log_z[..., 0]

  def at_target(x):
    return np.take_along_axis(x, y[..., None], -1)[..., 0]

  z = logits(h, e)
  logp, _ = log_p(z)
  p = np.exp(logp)
  factor = at_target(p) if objective.dft else 1.0  # A constant.

  def value(h, e):
    logp, log_z = log_p(logits(h, e))
    share = objective.label_smoothing
    nll = -(1 - share) * at_target(logp) - share * logp.mean(-1)
    return (w * (factor * nll + objective.z_loss * log_z**2)).sum()

  def differences(f, x, step=1e-5):
    slope = np.zeros_like(x)
    for i in np.ndindex(x.shape):
      moved = [x.copy(), x.copy()]
      moved[0][i] += step
      moved[1][i] -= step
      slope[i] = (f(moved[0]) - f(moved[1])) / (2 * step)
    return slope

  hit = z.argmax(-1) == y
  return {
    "objective": value(h, e),
    "nats": -(w * at_target(logp)).sum(),
    "weight": w.sum(),
    "correct": (w * hit).sum(),
    "entropy": -(w[..., None] * p * logp).sum(),
    "d_hidden": differences(lambda x: value(x, e), h),
    "d_head": differences(lambda x: value(h, x), e),
    "nll": -at_target(logp),
    "hit": hit,
  }


@pytest.fixture
def base():
  """Another model's hidden states and head."""
  rng = np.random.default_rng(5)
  hidden = rng.normal(size=(B, T, D)).astype(np.float32) * 2
  head = rng.normal(size=(V, D)).astype(np.float32)
  return jnp.asarray(hidden), jnp.asarray(head)


def check(case, want, rtol=1e-6, **choices):
  """Asserts values, and gradients, whose cotangent must scale."""

  def loss(hidden, head):
    sums = linear_cross_entropy(hidden, head, *case[2:], **choices)
    return 3 * sums.objective, sums

  run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  (_, sums), grads = run(*case[:2])
  for name in ("objective", "nats", "weight", "correct", "entropy"):
    got = getattr(sums, name)
    np.testing.assert_allclose(got, want[name], rtol=rtol, err_msg=name)
  for got, name in zip(grads, ("d_hidden", "d_head"), strict=True):
    most = np.abs(want[name]).max()
    np.testing.assert_allclose(got, 3 * want[name], atol=2 * rtol * most)
  return sums


@pytest.mark.parametrize(
  ("chunk_tokens", "softcap"), [(1, None), (7, None), (1000, None), (7, 1.5)]
)
def test_equals_the_dense_float64_reference(case, chunk_tokens, softcap):
  want = reference(*case, softcap)
  sums = check(case, want, chunk_tokens=chunk_tokens, softcap=softcap)
  np.testing.assert_allclose(sums.objective, sums.nats, rtol=1e-6)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(
  "objective",
  [
    Objective(z_loss=0.1),
    Objective(label_smoothing=0.2),
    Objective(dft=True),
    Objective(0.05, 0.1, True),
  ],
)
def test_each_objective_is_its_formula(case, objective, softcap):
  """The nats stay the plain ones; only what is minimised changes."""
  want = reference(*case, softcap, objective)
  # The exponential in DFT's factor makes of an error of z a relative one.
  rtol = 1e-5 if objective.dft else 1e-6
  choices = {"softcap": softcap, "objective": objective}
  sums = check(case, want, rtol, chunk_tokens=7, **choices)
  assert abs(sums.objective / sums.nats - 1) > 1e-3


def divergence(case, base, softcap=None):
  """The comparison with the base, in float64 from all logits at once.

  Returns:
    (BaseSums, KL as a function of hidden and head).
  """
  y, w = np.asarray(case[2]), np.asarray(case[3], np.float64)

  def log_p(h, e):
    z = np.asarray(h, np.float64) @ np.asarray(e, np.float64).T
    z = softcap * np.tanh(z / softcap) if softcap else z
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))

  was, now = log_p(*base), log_p(*case[:2])
  kl = lambda h, e: (w * (np.exp(was) * (was - log_p(h, e))).sum(-1)).sum()
  right = was.argmax(-1) == y
  return BaseSums(
    kl(*case[:2]),
    (w * (was.argmax(-1) == now.argmax(-1))).sum(),
    (w * right).sum(),
    (w * (right & (now.argmax(-1) == y))).sum(),
  ), kl


def half_changed(case, base):
  """A base that predicts as the model does in every second row."""
  rows = jnp.arange(B)[:, None, None] % 2 == 0
  return jnp.where(rows, case[0], case[0] + 0.3 * base[0]), case[1]


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize(
  ("chunk_tokens", "softcap"), [(1, None), (7, None), (1000, None), (7, 1.5)]
)
def test_the_comparison_with_the_base(case, base, chunk_tokens, softcap, alike):
  base = half_changed(case, base) if alike else base
  want, _ = divergence(case, base, softcap)
  sums = linear_cross_entropy(
    *case, base=base, chunk_tokens=chunk_tokens, softcap=softcap
  )
  for name, got, right in zip(want._fields, sums.base, want, strict=True):
    np.testing.assert_allclose(got, right, rtol=1e-5, err_msg=name)
  assert not alike or 0 < want.both_correct <= want.base_correct < sums.weight
  plain = linear_cross_entropy(
    *case, chunk_tokens=chunk_tokens, softcap=softcap
  )
  assert plain.base is None
  np.testing.assert_array_equal(plain.nats, sums.nats)
  np.testing.assert_array_equal(plain.objective, sums.objective)


def test_nothing_is_lost_of_a_model_compared_with_itself(case):
  sums = linear_cross_entropy(*case, base=case[:2], chunk_tokens=7)
  assert sums.base.kl == 0
  assert sums.base.top1_agreement == sums.weight
  assert sums.base.both_correct == sums.base.base_correct == sums.correct


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("others", [{}, {"label_smoothing": 0.1, "dft": True}])
def test_the_gradient_of_the_divergence(case, base, others, softcap):
  """By differences of the float64 sums, beside any other objective."""
  k = 0.7
  want = reference(*case, softcap, Objective(**others))
  sums, kl = divergence(case, base, softcap)
  step = 1e-5
  for name, at in (("d_hidden", 0), ("d_head", 1)):
    slope = np.zeros(case[at].shape)
    for i in np.ndindex(slope.shape):
      sides = []
      for sign in (1, -1):
        moved = [np.array(x, np.float64) for x in case[:2]]
        moved[at][i] += sign * step
        sides.append(kl(*moved))
      slope[i] = (sides[0] - sides[1]) / (2 * step)
    want[name] = want[name] + k * slope
  want["objective"] += k * sums.kl
  choices = {"softcap": softcap, "objective": Objective(**others, kl=k)}
  check(case, want, 1e-5, chunk_tokens=7, base=base, **choices)


def test_the_base_receives_no_gradient(case, base):
  def loss(hidden, base):
    return linear_cross_entropy(
      hidden, *case[1:], base=base, objective=Objective(kl=1.0)
    ).objective

  of_base = jax.grad(loss, 1)(case[0], base)
  assert not any(x.any() for x in of_base)


def test_keeping_to_a_base_that_is_not_there_is_an_error(case):
  with pytest.raises(ValueError, match="without a base; expected its hidden"):
    linear_cross_entropy(*case, objective=Objective(kl=0.1))


def test_no_logits_of_a_batch_exist_beside_a_base():
  """Every array of the compiled program is below a batch's logits."""
  tokens, width, vocabulary, chunk = 512, 16, 1024, 32
  put = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)

  def loss(hidden, head, base, targets, weights):
    return linear_cross_entropy(
      *(hidden, head, targets, weights),
      base=base, objective=Objective(kl=0.1), chunk_tokens=chunk,
    ).objective  # fmt: skip

  text = (
    jax.jit(jax.grad(loss, (0, 1)))
    .lower(
      *(put(1, tokens, width), put(vocabulary, width)),
      (put(1, tokens, width), put(vocabulary, width)),
      *(put(1, tokens, dtype=jnp.int32), put(1, tokens)),
    )
    .as_text()
  )
  assert f"{chunk}x{vocabulary}xf32" in text
  assert f"{tokens}x{vocabulary}x" not in text


def test_groups_are_sums_over_their_members(case):
  """A token may be in two groups, or in none."""
  rng = np.random.default_rng(1)
  groups = rng.integers(-1, G, (B, T, 2)).astype(np.int32)
  groups[..., 1] = np.where(
    groups[..., 0] == groups[..., 1], -1, groups[..., 1]
  )
  want = reference(*case)
  sums = linear_cross_entropy(
    *case, jnp.asarray(groups), num_groups=G, chunk_tokens=7
  )
  w = np.asarray(case[3])
  for group in range(G):
    mine = w * (groups == group).any(-1)
    got = [x[group] for x in sums.groups]
    hits = (mine * want["hit"]).sum()
    np.testing.assert_allclose(
      got, [(mine * want["nll"]).sum(), mine.sum(), hits], rtol=1e-6
    )
  np.testing.assert_allclose(sums.nats, want["nats"], rtol=1e-6)


def test_without_gradients_gives_the_same_sums(case):
  value = linear_cross_entropy(*case, chunk_tokens=9)
  want = reference(*case)
  np.testing.assert_allclose(value.nats, want["nats"], rtol=1e-6)
  np.testing.assert_allclose(value.entropy, want["entropy"], rtol=1e-6)


def test_untrained_slots_do_not_matter(case, base):
  """Whatever stands at weight 0, even NaN, changes no bit of anything."""
  hidden, head, targets, weights = case
  poisoned = lambda x: jnp.where(weights[..., None] == 0, jnp.nan, x)
  other = jnp.where(weights == 0, 0, targets)

  def gradients(hidden, targets, base_hidden):
    return jax.value_and_grad(
      lambda h, e: (
        linear_cross_entropy(
          h, e, targets, weights,
          base=(base_hidden, base[1]),
          objective=Objective(kl=0.5),
          chunk_tokens=4,
        ).objective
      ),
      (0, 1),
    )(hidden, head)  # fmt: skip

  a = gradients(hidden, targets, base[0])
  b = gradients(poisoned(hidden), other, poisoned(base[0]))
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert not np.asarray(a[1][0])[np.asarray(weights) == 0].any()


def test_only_trained_tokens_pay(case):
  """The compiled loop takes as many rounds as the trained tokens fill."""
  hidden, head, targets, _ = case
  rounds = []

  def count(_):
    rounds.append(1)

  class Counting(Objective):
    """Tells when a chunk is worked off."""

    def loss(self, z, log_z, nll):
      jax.debug.callback(count, nll[0])
      return super().loss(z, log_z, nll)

  @jax.jit
  def loss(weights):
    sums = linear_cross_entropy(
      hidden, head, targets, weights, chunk_tokens=4, objective=Counting()
    )
    return sums.nats

  for trained, expected in ((0, 0), (1, 1), (4, 1), (5, 2), (30, 8)):
    weights = np.zeros(B * T, np.float32)
    weights[np.random.default_rng(trained).permutation(B * T)[:trained]] = 1
    rounds.clear()
    loss(jnp.asarray(weights.reshape(B, T))).block_until_ready()
    jax.effects_barrier()
    assert len(rounds) == expected
  assert loss._cache_size() == 1


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)])
def test_devices_do_not_matter(sizes, capfd):
  """Rows spread as unevenly as can be: a device has none, another only such."""
  rng = np.random.default_rng(0)
  B, D, V = 8, 16, 32
  hidden = rng.normal(size=(B, T, D)).astype(np.float32)
  head = rng.normal(size=(V, D)).astype(np.float32)
  targets = rng.integers(0, V, (B, T)).astype(np.int32)
  weights = (rng.random((B, T)) < np.linspace(0, 1, B)[:, None]) * 1.0
  weights = weights.astype(np.float32)
  groups = rng.integers(-1, G, (B, T, 2)).astype(np.int32)
  base_hidden = rng.normal(size=(B, T, D)).astype(np.float32)
  base_head = rng.normal(size=(V, D)).astype(np.float32)

  def loss(rows, hidden, head, base_hidden, base_head, *others):
    sums = linear_cross_entropy(
      *(hidden, head, *others),
      base=(base_hidden, base_head),
      num_groups=G,
      objective=Objective(z_loss=1e-2, kl=0.3),
      chunk_tokens=4,
      rows=rows,
    )
    return sums.objective, sums

  run = jax.jit(
    jax.value_and_grad(loss, (1, 2), has_aux=True), static_argnums=0
  )
  of_base = base_hidden, base_head
  want = run(None, hidden, head, *of_base, targets, weights, groups)
  mesh = sharding.make_mesh(*sizes)
  rows = sharding.row_sharding(mesh)
  put = lambda x: jax.device_put(x, rows)
  where = sharding.place_parameter("head/embedding", head.shape, mesh).spec
  spread = jax.device_put(head, jax.NamedSharding(mesh, where))
  of_base = put(base_hidden), jax.device_put(base_head, spread.sharding)
  args = (put(targets), put(weights), put(groups))
  got = run(rows, put(hidden), spread, *of_base, *args)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    *(got, want),
  )
  assert "rematerialization" not in capfd.readouterr().err


def test_the_head_is_gathered_and_added_up_once():
  """Nothing as large as the head crosses devices inside the loop."""
  mesh = sharding.make_mesh(2, 4, 1)
  rows = sharding.row_sharding(mesh)
  put = lambda shape, spec, dtype=jnp.float32: jax.ShapeDtypeStruct(
    shape, dtype, sharding=jax.NamedSharding(mesh, spec)
  )
  where = sharding.place_parameter("head/embedding", (64, 16), mesh).spec

  def loss(hidden, head, targets, weights):
    return linear_cross_entropy(
      hidden, head, targets, weights, chunk_tokens=4, rows=rows
    ).objective

  text = (
    jax.jit(jax.grad(loss, (0, 1)))
    .lower(
      put((8, T, 16), rows.spec),
      put((64, 16), where),
      put((8, T), rows.spec, jnp.int32),
      put((8, T), rows.spec),
    )
    .compile()
    .as_text()
  )
  inside = [
    line
    for name, block in _computations(text)
    if "body" in name or "region" in name
    for line in block
  ]
  moves = [
    line
    for line in inside
    if any(f" {kind}" in line for kind in ("all-reduce(", "all-gather("))
  ]
  assert not moves
  assert text.count(" all-gather(") >= 1


def _computations(text):
  """(name, lines) of each computation of a compiled program."""
  found, lines = [], []
  for line in text.splitlines():
    if line.endswith("{"):
      lines = []
      found.append((line.split()[0], lines))
    else:
      lines.append(line)
  return found


def test_predicting_the_target_costs_nothing_copying_costs_much():
  """Guards the shift: logits on the target, then on the input token."""
  targets = jnp.arange(1, 9, dtype=jnp.int32)[None] % V
  ones = jnp.ones((1, 8), jnp.float32)
  head = 50 * jnp.eye(V)
  right = linear_cross_entropy(jnp.eye(V)[targets], head, targets, ones)
  copied = linear_cross_entropy(jnp.eye(V)[targets - 1], head, targets, ones)
  assert right.nats < 1e-3
  assert right.correct == 8
  assert right.entropy < 1e-3
  assert copied.nats > 100
  assert copied.correct == 0


def test_bfloat16_sums_stay_near_float32(case):
  low = [x.astype(jnp.bfloat16) for x in case[:2]]
  sums = linear_cross_entropy(*low, *case[2:])
  assert sums.nats.dtype == jnp.float32
  want = reference(*low, *case[2:])["nats"]
  np.testing.assert_allclose(sums.nats, want, rtol=1e-3)


def test_a_frozen_head_costs_no_gradient(case):
  """The same gradient of the hidden states, a product of V D less per token."""
  hidden, head, targets, weights = case

  def loss(hidden, head):
    return linear_cross_entropy(hidden, head, targets, weights).objective

  def products(gradient):
    text = jax.jit(gradient).lower(hidden, head).as_text()
    return text.count("stablehlo.dot_general")

  frozen, both = jax.grad(loss), jax.grad(loss, (0, 1))
  other = jax.grad(loss, 1)
  assert products(both) - products(frozen) == 1
  # A frozen part of the model below: only the head trains.
  assert products(both) - products(other) == 1
  np.testing.assert_array_equal(
    jax.jit(frozen)(hidden, head), jax.jit(both)(hidden, head)[0]
  )
  np.testing.assert_array_equal(
    jax.jit(other)(hidden, head), jax.jit(both)(hidden, head)[1]
  )


def dense(case):
  """z, log p and the arrays of a case, for losses written without chunks."""
  hidden, head, targets, weights = case
  z = hidden @ head.T
  return z, jax.nn.log_softmax(z), jax.nn.one_hot(targets, V), weights


def check_own(case, loss, formula, **choices):
  """A loss of one's own against its dense formula, with both gradients."""

  def chunked(hidden, head):
    sums = linear_cross_entropy(
      *(hidden, head, *case[2:]), objective=loss, chunk_tokens=7, **choices
    )
    return 3 * sums.objective, sums

  def whole(hidden, head):
    return 3 * formula(*dense((hidden, head, *case[2:])))

  run = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))
  (value, sums), got = run(*case[:2])
  right, want = jax.value_and_grad(whole, (0, 1))(*case[:2])
  np.testing.assert_allclose(value, right, rtol=1e-5)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
  plain = linear_cross_entropy(*case)
  for name in ("nats", "weight", "correct", "entropy"):
    np.testing.assert_allclose(
      getattr(sums, name), getattr(plain, name), rtol=1e-5
    )
  assert plain.named is None
  return sums


def own_nats(hidden, head, targets, weights, segment_ids):
  log_p = jax.nn.log_softmax(hidden @ head.T)
  nll = -jnp.take_along_axis(log_p, targets[:, None], 1)[:, 0]
  later = weights * (segment_ids > 1)
  return (weights * nll).sum(), {"later": (later * nll).sum()}


@pytest.mark.parametrize("devices", [1, 8])
def test_a_loss_of_ones_own_is_its_dense_formula(case, devices):
  if devices > 1:
    case = tuple(
      x if i == 1 else jnp.concatenate([x, x[:1]]) for i, x in enumerate(case)
    )
  segments = np.arange(T)[None] // 4 + np.zeros((len(case[0]), 1), int)
  mesh = sharding.make_mesh(2, 2, 2) if devices > 1 else None
  formula = lambda z, log_p, hot, w: -(w * (hot * log_p).sum(-1)).sum()
  sums = check_own(
    *(case, own_nats, formula),
    extras={"segment_ids": jnp.asarray(segments)},
    rows=sharding.row_sharding(mesh) if mesh else None,
  )
  np.testing.assert_allclose(sums.objective, sums.nats, rtol=1e-6)
  _, log_p, hot, w = dense(case)
  later = -(w * (segments > 1) * (hot * log_p).sum(-1)).sum()
  np.testing.assert_allclose(sums.named["later"], later, rtol=1e-5)


def test_a_loss_that_asks_for_unknown_arrays_is_refused(case):
  def loss(hidden, head, targets, weights, segment_ids, *, marks):
    return (weights * marks).sum(), {}

  with pytest.raises(ValueError, match=r"\['marks'\], expected some of"):
    linear_cross_entropy(*case, objective=loss)
