"""The self-check passes on a sound model, and finds each law that is broken."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from sft_jax.common import sharding
from sft_jax.models import transformer
from sft_jax.models.attention import attention
from sft_jax.models.config import config_from_fields
from sft_jax.step.loss import linear_cross_entropy
from sft_jax.training import selfcheck
from sft_jax.training.build.build import BuiltRun

V, ROWS, T = 61, 16, 16


@functools.cache
def parts():
  """(model, parameters on a mesh of eight, put) of a tiny model."""
  config = config_from_fields(
    "qwen3",
    vocab_size=V,
    num_layers=2,
    d_model=16,
    d_ff=32,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    init_std=0.3,
  )
  mesh = sharding.make_mesh(2, 2, 2)
  model = transformer.build(config)
  shardings = sharding.param_shardings(
    jax.eval_shape(model.init, jax.random.key(0)), mesh
  )
  init = jax.jit(model.init, out_shardings=shardings)
  put = lambda batch: selfcheck.place_batch(batch, mesh)
  return model, init(jax.random.key(0)), put


def loss_fn(params, batch):
  model = parts()[0]
  x = model.hidden(params, batch.tokens, batch.positions, batch.segment_ids)
  return linear_cross_entropy(
    x, model.head(params), batch.targets, batch.loss_weights
  )


def quick():
  model, params, put = parts()
  return {
    one.law: one
    for one in selfcheck.quick(
      loss_fn,
      model.hidden,
      params,
      lambda path: True,
      put=put,
      rows=ROWS,
      length=T,
      vocab_size=V,
      dtype="float32",
    )
  }


def failed(findings):
  return {law for law, one in findings.items() if not one.passed}


def test_a_sound_model_passes_on_eight_devices():
  found = quick()
  assert not failed(found)
  assert len(found) == 6
  assert found["documents apart: hidden states"].difference == 0
  # Rounding is measured, so the comparison is one.
  assert any(one.difference > 0 for one in found.values())
  selfcheck.refuse([*found.values()])


def test_a_mask_that_leaks_is_found(monkeypatch):
  """Sabotage: all documents of a row as one, each sees those before it."""
  mask = attention.mask_bias

  def leaking(q_positions, kv_positions, q_segments, kv_segments, *window):
    ones = [(x > 0).astype(jnp.int32) for x in (q_segments, kv_segments)]
    return mask(q_positions, kv_positions, *ones, *window)

  monkeypatch.setattr(attention, "mask_bias", leaking)
  found = quick()
  assert failed(found) >= {
    "documents apart: hidden states",
    "packed = alone: nats",
    "packed = alone: gradient",
  }
  with pytest.raises(ValueError, match="packed = alone: nats: got"):
    selfcheck.refuse([*found.values()])


# A model of nothing but a table, which compiles at once.
TABLE = {"table": jnp.asarray(np.random.default_rng(1).normal(size=(V, 8)))}


def table_loss(params, batch):
  table = params["table"].astype(jnp.float32)
  return linear_cross_entropy(
    table[batch.tokens], table, batch.targets, batch.loss_weights
  )


def of_table(loss):
  """What `quick` finds of packing and of the order of rows."""
  measure = selfcheck.measurer(loss, TABLE, lambda path: True, lambda b: b)
  packed = selfcheck.toy_batch(ROWS, T, V)
  other = {
    "packed = alone": selfcheck.unpack(packed),
    "rows shuffled": jax.tree.map(lambda x: x[::-1], packed),
  }
  base = measure(packed, 1)
  return {
    one.law: one
    for law, batch in other.items()
    for one in selfcheck.compare(law, base, measure(batch, 1), "float32")
  }


def leaks_of(hidden):
  found = selfcheck.leaks(
    hidden,
    TABLE,
    selfcheck.toy_batch(ROWS, T, V),
    put=lambda b: b,
    vocab_size=V,
  )
  return {one.law for one in found if not one.passed}


def test_a_model_of_a_table_keeps_the_laws():
  assert not failed(of_table(table_loss))
  assert not leaks_of(lambda params, tokens, *_: params["table"][tokens])


def test_a_model_that_looks_ahead_is_found():
  """By however little."""

  def seeing(params, tokens, positions, segments):
    x = params["table"][tokens]
    same = (segments == jnp.roll(segments, -1, axis=1))[..., None]
    return x + 1e-6 * same * jnp.roll(x, -1, axis=1)

  assert leaks_of(seeing) == {"no look ahead: hidden states"}


def test_a_model_that_sees_nothing_is_no_proof():
  blind = lambda params, tokens, *_: jnp.zeros((*tokens.shape, 4))
  assert leaks_of(blind) == {
    "documents apart: the change itself",
    "no look ahead: the change itself",
  }


def test_a_mean_of_rows_means_is_found():
  """Each row divided by its own weight: packing decides what counts."""

  def by_row(params, batch):
    per = batch.loss_weights.sum(1, keepdims=True)
    weights = batch.loss_weights / jnp.where(per > 0, per, 1.0)
    return table_loss(params, batch._replace(loss_weights=weights))

  assert "packed = alone: nats" in failed(of_table(by_row))


def test_a_gradient_that_is_wrong_in_one_parameter_is_found():
  """The loss is right; one parameter's gradient depends on the place."""

  @jax.custom_vjp
  def spoil(scale, first):
    return scale

  spoil.defvjp(
    lambda scale, first: (scale, first),
    lambda first, g: (g * (1 + 0.01 * (first % 2)), None),
  )

  def spoilt(params, batch):
    first = batch.segment_ids[0, 0].astype(jnp.float32)
    return table_loss({"table": spoil(params["table"], first)}, batch)

  found = of_table(spoilt)
  assert failed(found) == {"rows shuffled: gradient"}
  assert found["rows shuffled: gradient"].detail == "table"


def test_cuts_of_the_batch_and_a_loss_that_minds_them():
  batch = selfcheck.toy_batch(ROWS, T, V)

  def per_part(params, batch):
    sums = table_loss(params, batch)
    one = jnp.where(sums.weight > 0, sums.weight, 1.0)
    return sums._replace(
      objective=sums.objective / one,
      nats=sums.nats / one,
      weight=jnp.ones(()),
    )

  for loss, passes in ((table_loss, True), (per_part, False)):
    measure = selfcheck.measurer(loss, TABLE, lambda path: True, lambda b: b)
    base = measure(batch, 1)
    found = selfcheck.compare("cut in 2", base, measure(batch, 2), "float32")
    assert all(one.passed for one in found) == passes


def test_the_distance_of_sketches_is_that_of_trees():
  rng = np.random.default_rng(0)
  draw = lambda: rng.normal(size=(40, 50)).astype(np.float32)
  x, y = draw(), draw()
  near = {"a": jnp.asarray(x), "b": jnp.asarray(y)}
  far = {"a": jnp.asarray(x), "b": jnp.asarray(y + 0.01 * draw())}
  one, other = (jax.device_get(selfcheck.sketch(t)) for t in (near, far))
  share, where = selfcheck.distance(one, other)
  assert where == "b"
  assert 0.003 < share < 0.03
  assert selfcheck.distance(one, one) == (0.0, "")
  broken = one | {"a": one["a"] * np.nan}
  assert np.isnan(selfcheck.distance(one, broken)[0])


def test_alone_holds_the_same_documents():
  packed = selfcheck.toy_batch(ROWS, T, V)
  apart = selfcheck.unpack(packed)
  assert apart.loss_weights.sum() == packed.loss_weights.sum()
  assert (packed.segment_ids > 0).sum() == (apart.segment_ids > 0).sum()
  assert apart.positions[:, 0].max() == 0
  assert apart.segment_ids.max() == 1
  assert packed.segment_ids.max() == 2
  by_row = packed.loss_weights.sum(1)
  assert by_row[ROWS // 2 - 1] > 5 * by_row[0] > 0


def test_stops():
  tokens = np.array([[5, 9, 7, 9, 0], [5, 6, 7, 8, 0]], np.int32)
  weights = np.array([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]], np.float32)
  segments = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]], np.int32)
  assert selfcheck.stops(tokens, weights, segments, (9, 6)).passed
  found = selfcheck.stops(tokens, weights, segments, (9,))
  assert found.difference == pytest.approx(1 / 3)
  assert not found.passed


def test_too_small_a_batch_is_refused():
  with pytest.raises(ValueError, match="got 3 rows of 16 tokens"):
    selfcheck.toy_batch(3, T, V)


def run_of(mesh) -> Any:
  """A run of the table of test_selfcheck; all that the check asks for."""
  nothing: Any = BuiltRun._make([None] * len(BuiltRun._fields))
  return nothing._replace(
    mesh=mesh,
    loss_fn=table_loss,
    trained=lambda path: True,
    model=SimpleNamespace(
      hidden=lambda params, tokens, *_: params["table"][tokens],
      lora=None,
      config=SimpleNamespace(vocab_size=V),
    ),
  )


def config_of(mode) -> Any:
  return ml_collections.ConfigDict(
    {
      "selfcheck": mode,
      "data": {"seq_len": 16},
      "model": {"dtype": "float32"},
    }
  )


def said(mode, mesh, run=None):
  told = []
  params = jax.device_put(TABLE, sharding.replicated(mesh))
  selfcheck.check_at_start(
    config_of(mode), run or run_of(mesh), params, told.append
  )
  return told


def test_it_runs_where_there_are_several_devices():
  mesh = sharding.make_mesh(4, 2, 1)
  assert leaks_of(run_of(mesh).model.hidden) == set()
  (line,) = said("auto", mesh)
  assert "6 laws hold on 8 devices" in line
  assert said("off", mesh) == []


def test_what_it_finds_stops_the_run():
  mesh = sharding.make_mesh(4, 2, 1)
  run = run_of(mesh)
  run.model.hidden = lambda params, tokens, *_: params["table"][tokens][:, ::-1]
  with pytest.raises(ValueError, match="documents apart: hidden states: got"):
    said("auto", mesh, run)
  assert said("off", mesh, run) == []


def test_every_mode_has_its_word_in_the_base_config():
  assert set(selfcheck.TOLERANCES) == {"float32", "bfloat16"}
