"""Canaries: drawn by seed, ranked by loss, and one run that learns them."""

import json

import numpy as np
import pytest

import sft_jax
import tiny
from sft_jax.evals import canaries

N = 12


def test_they_are_a_function_of_the_seed_and_their_place():
  assert canaries.draw(N, 3) == canaries.draw(2 * N, 3)[:N]
  assert canaries.draw(N, 3) != canaries.draw(N, 4)
  for canary in canaries.draw(N, 3):
    codes = [canary.code, *canary.others]
    assert len(set(codes)) == canaries.ALTERNATIVES + 1
    assert all(len(code.replace(" ", "")) == 9 for code in codes)
  firsts = [canary.code for canary in canaries.draw(200, 0)]
  assert len(set(firsts)) == 200


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Questions that are trained on are asked again; three canaries."""
  folder = tmp_path_factory.mktemp("canaries")
  items = [
    {
      "group": "by heart",
      "messages": [{"role": "user", "content": row["instruction"]}],
      "checks": [{"check": "exact", "text": row["output"]}],
    }
    for row in tiny.ROWS[:8]
  ]
  config = tiny.config(
    folder,
    tiny.model_folder(folder / "model"),
    tiny.rows_file(folder / "rows.jsonl"),
    steps=120,
    checkpoint__every=0,
    export=False,
    log__every=60,
    data__canaries=3,
    data__canary_copies=3.0,
    data__seq_len=96,
    optim__learning_rate=5e-3,
    eval__behaviours=str(tiny.rows_file(folder / "items.jsonl", items)),
    eval__max_new_tokens=24,
    eval__answer_words=10_000,
  )
  return sft_jax.train(config)


def test_what_is_planted_is_found_and_what_is_not_is_chance(trained):
  found = trained.metrics["memorisation"]["canaries"]
  before, after = found["before"], found["after"]
  planted, kept_back = (
    [one["exposure"] for one in after[kind]]
    for kind in ("planted", "kept_back")
  )
  assert [one["box"] for one in after["planted"]] == [1, 2, 3]
  assert after["most"] == 8
  assert min(planted) == 8, "all that can be seen"
  # One in 64 stands out by 6 bits, by chance: it is the mean that tells.
  assert max(kept_back) < 8
  assert np.mean(kept_back) < 4
  # Before training neither stands out.
  chance = [one["exposure"] for one in before["planted"] + before["kept_back"]]
  assert np.mean(chance) < 3.5
  lines = (trained.workdir / "canaries.jsonl").read_text().splitlines()
  assert [json.loads(line)["messages"][1]["content"] for line in lines] == [
    f"The code of box {one.box} is {one.code}." for one in canaries.draw(3, 0)
  ]


def test_replies_learnt_by_heart_are_found_and_a_fresh_models_are_not(trained):
  found = trained.metrics["memorisation"]["repeats"]
  before, after = (found[side]["replies"] for side in ("before", "after"))
  # The answers are of three words: none has a run of four.
  assert after == {"replies": 8, "overlap": 1.0, "whole": 1.0, "novelty": None}
  # Random weights say no word of an answer.
  assert before is None or before["overlap"] < 0.2
  # 16 rows and three canaries, three copies of each: a copy is no more text.
  said = found["after"]
  assert said["answers"] == said["rows"] == said["rows_of"] == 19
  read = json.loads((trained.workdir / "evals" / "after.json").read_text())
  for reply in read["behaviours"]["replies"]:
    assert reply["overlap"] == 1.0
