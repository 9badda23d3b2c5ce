"""The self-check at the start of a run, as the config wants it."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest
from test_selfcheck import TABLE, V, leaks_of, table_loss

from sft_jax.common import sharding
from sft_jax.training import selfcheck, setup_selfcheck


def run_of(mesh) -> Any:
  """A run of the table of test_selfcheck; all that the check asks for."""
  return SimpleNamespace(
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
  return SimpleNamespace(
    selfcheck=mode,
    data=SimpleNamespace(seq_len=16),
    model=SimpleNamespace(dtype="float32"),
  )


def said(mode, mesh, run=None):
  told = []
  params = jax.device_put(TABLE, sharding.replicated(mesh))
  setup_selfcheck.at_start(
    config_of(mode), run or run_of(mesh), params, told.append
  )
  return told


def test_it_runs_where_there_are_several_devices():
  mesh = sharding.make_mesh(4, 2, 1)
  assert leaks_of(run_of(mesh).model.hidden) == set()
  (line,) = said("auto", mesh)
  assert "6 laws hold on 8 devices" in line
  assert said("off", mesh) == []
  with pytest.raises(ValueError, match="selfcheck: got 'yes', expected one"):
    said("yes", mesh)


def test_what_it_finds_stops_the_run():
  mesh = sharding.make_mesh(4, 2, 1)
  run = run_of(mesh)
  run.model.hidden = lambda params, tokens, *_: params["table"][tokens][:, ::-1]
  with pytest.raises(ValueError, match="documents apart: hidden states: got"):
    said("auto", mesh, run)
  assert said("off", mesh, run) == []


def test_every_mode_has_its_word_in_the_base_config():
  assert setup_selfcheck.MODES == ("auto", "on", "off")
  assert set(selfcheck.TOLERANCES) == {"float32", "bfloat16"}
