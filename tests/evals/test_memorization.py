"""Memorization against searches by hand, and exposure by its definition."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sft_jax
import tiny
from sft_jax.evals import memorization
from sft_jax.evals.memorization import Answers, draw_canaries

sequences = st.lists(st.integers(0, 2), max_size=12)


def _in(run, answers) -> bool:
  return any(
    run == answer[i : i + len(run)]
    for answer in answers
    for i in range(len(answer) - len(run) + 1)
  )


@settings(max_examples=300, deadline=None)
@given(st.lists(sequences, max_size=5), sequences)
def test_matches_are_those_of_a_search_by_hand(answers, reply):
  want = []
  for end in range(1, len(reply) + 1):
    runs = [n for n in range(1, end + 1) if _in(reply[end - n : end], answers)]
    want.append(max(runs, default=0))
  index = Answers(answers)
  assert index.matches(reply) == want
  assert index.overlap(reply) == max(want, default=0) / max(len(reply), 1)
  for n in (1, 2, 3):
    grams = [reply[i : i + n] for i in range(len(reply) - n + 1)]
    new = [not _in(gram, answers) for gram in grams]
    expected = sum(new) / len(new) if new else None
    assert index.novelty(reply, n) == expected


def test_words():
  index = Answers([s.split() for s in ("the red cup", "a cup of tea")])
  assert index.overlap(["the", "red", "cup"]) == 1
  assert index.overlap(["she", "drank", "a", "cup", "of", "milk"]) == 3 / 6
  # Nothing is found across the seam of two answers.
  assert index.overlap(["red", "cup", "a", "cup"]) == 2 / 4
  assert index.novelty(["a", "cup", "of", "milk"], 2) == 1 / 3
  assert index.overlap([]) == 0


def test_exposure():
  assert memorization.exposure(1.0, [2.0, 3.0, 4.0]) == 2  # Rank 1 of 4.
  assert memorization.exposure(2.5, [2.0, 3.0, 4.0]) == 1  # Rank 2 of 4.
  assert memorization.exposure(9.0, [2.0, 3.0, 4.0]) == 0
  # A model that tells nothing apart exposes nothing.
  assert memorization.exposure(2.0, [2.0] * 7) == 0


def test_a_canary_never_seen_is_exposed_by_chance_alone():
  rng = np.random.default_rng(0)
  found = [
    memorization.exposure(x[0], x[1:]) for x in rng.normal(size=(4000, 256))
  ]
  # One in 2 ** e is exposed by e bits or more (Carlini et al., section 4.2).
  for bits in (1, 2, 4):
    share = np.mean(np.array(found) >= bits)
    assert abs(share - 2.0**-bits) < 4 * math.sqrt(2.0**-bits / 4000)


@pytest.mark.parametrize("losses", [[], [math.nan], [math.inf, 1.0]])
def test_exposure_refuses_what_says_nothing(losses):
  with pytest.raises(ValueError, match="expected finite losses"):
    memorization.exposure(1.0, losses)


words = st.lists(st.sampled_from("abc"), max_size=8).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(words, max_size=4), st.lists(words, max_size=4))
def test_repeats_are_means_over_the_replies_that_say_something(known, said):
  known = [text.split() for text in known]
  found = memorization.repeats(said, Answers(known), n=2)
  replies = [text.split() for text in said if text.split()]
  if not replies:
    assert found is None
    return
  assert found is not None
  longest = [
    max(
      j - i
      for i in range(len(one))
      for j in range(i, len(one) + 1)
      if _in(one[i:j], known) or i == j
    )
    for one in replies
  ]
  shares = [n / len(one) for n, one in zip(longest, replies, strict=True)]
  assert found.replies == len(replies)
  assert found.overlap == pytest.approx(np.mean(shares))
  assert found.whole == np.mean([_in(one, known) for one in replies])
  fresh = [
    np.mean([not _in(one[i : i + 2], known) for i in range(len(one) - 1)])
    for one in replies
    if len(one) > 1
  ]
  if fresh:
    assert found.novelty == pytest.approx(np.mean(fresh))
  else:
    assert found.novelty is None


N = 12


def test_they_are_a_function_of_the_seed_and_their_place():
  assert draw_canaries(N, 3) == draw_canaries(2 * N, 3)[:N]
  assert draw_canaries(N, 3) != draw_canaries(N, 4)
  for canary in draw_canaries(N, 3):
    codes = [canary.code, *canary.others]
    assert len(set(codes)) == memorization.ALTERNATIVES + 1
    assert all(len(code.replace(" ", "")) == 9 for code in codes)
  firsts = [canary.code for canary in draw_canaries(200, 0)]
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
    eval__behaviors=str(tiny.rows_file(folder / "items.jsonl", items)),
    eval__max_new_tokens=24,
    eval__answer_words=10_000,
  )
  return sft_jax.train(config)


def test_what_is_planted_is_found_and_what_is_not_is_chance(trained):
  found = trained.metrics["memorization"]["canaries"]
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
    f"The code of box {one.box} is {one.code}." for one in draw_canaries(3, 0)
  ]


def test_replies_learnt_by_heart_are_found_and_a_fresh_models_are_not(trained):
  found = trained.metrics["memorization"]["repeats"]
  before, after = (found[side]["replies"] for side in ("before", "after"))
  # The answers are of three words: none has a run of four.
  assert after == {"replies": 8, "overlap": 1.0, "whole": 1.0, "novelty": None}
  # Random weights say no word of an answer.
  assert before is None or before["overlap"] < 0.2
  # 16 rows and three canaries, three copies of each: a copy is no more text.
  said = found["after"]
  assert said["answers"] == said["rows"] == said["rows_of"] == 19
  read = json.loads((trained.workdir / "evals" / "after.json").read_text())
  for reply in read["behaviors"]["replies"]:
    assert reply["overlap"] == 1.0
