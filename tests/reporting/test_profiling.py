"""A profile holds the steps that were asked for, by the names of the code."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

import sft_jax
import tiny
from sft_jax.reporting import throughput


def trace_of(folder):
  (path,) = folder.glob("plugins/profile/*/*.trace.json.gz")
  return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_a_run_writes_a_trace_that_reads_like_the_code(tmp_path, capsys):
  model = tiny.model_folder(tmp_path / "model")
  rows = tiny.rows_file(tmp_path / "rows.jsonl")
  config = tiny.config(
    *(tmp_path, model, rows),
    steps=5,
    export=False,
    checkpoint__every=0,
    profile__start=2,
    profile__steps=2,
  )
  folder = sft_jax.train(config).workdir / "profile"
  assert f"Profile of steps from 2 on: {folder}" in capsys.readouterr().out
  steps = [e["args"] for e in trace_of(folder) if e.get("name") == "train"]
  assert sorted(args["step_num"] for args in steps) == ["2", "3"]
  # The device's side holds the program with the scopes of its operations.
  (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
  text = path.read_bytes()
  for scope in (
    *(b"embed", b"layers", b"attn", b"attention", b"mlp", b"final_norm"),
    *(b"token_groups", b"loss_head", b"optimizer", b"row_chain"),
  ):
    assert b"/" + scope + b"/" in text or b"(" + scope + b")/" in text, scope


def make(folder, start, steps, left):
  said = []
  return said, throughput.Profile(
    folder, start=start, steps=steps, left=left, log=said.append
  )


def take(profile, numbers):
  for number in numbers:
    with profile.step(number, lambda: jnp.ones(2)):
      jax.block_until_ready(jnp.ones(3) + number)


def test_off_means_nothing(tmp_path):
  said, profile = make(tmp_path / "p", 1, 0, range(1, 9))
  take(profile, range(1, 9))
  profile.close()
  assert said == []
  assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("left", [range(5, 9), range(1, 3)])
def test_a_step_that_is_not_taken_is_said(tmp_path, left):
  """The run is resumed after it, or ends before it."""
  said, profile = make(tmp_path / "p", 3, 2, left)
  take(profile, left)
  profile.close()
  (line,) = said
  assert "none, as step 3 is not one of those left" in line
  assert not (tmp_path / "p").exists()


def test_a_run_that_ends_early_keeps_what_it_has(tmp_path):
  _, profile = make(tmp_path / "p", 2, 9, range(1, 9))
  take(profile, (1, 2, 3))
  profile.close()
  steps = [e for e in trace_of(tmp_path / "p") if e.get("name") == "train"]
  assert len(steps) == 2


def test_the_first_process_alone_traces(tmp_path, monkeypatch):
  monkeypatch.setattr(throughput.jax, "process_index", lambda: 1)
  said, profile = make(tmp_path / "p", 1, 2, range(1, 9))
  take(profile, (1, 2, 3))
  assert said == []
  assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(("start", "steps"), [(0, 1), (3, -1)])
def test_steps_that_cannot_be_are_refused(tmp_path, start, steps):
  with pytest.raises(ValueError, match=r"profile: got start"):
    make(tmp_path, start, steps, range(1, 9))
