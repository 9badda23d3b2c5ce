"""Each finding names its fault by place, and sound data passes."""

import numpy as np
import pytest

from fake_store import fake_store, random_store
from sft_jax.data.audit import checks, token_checks

BOS, STOP, PAD = 1, 2, 3
KNOWN = token_checks.Facts(
  vocab_size=10, stop_ids=(STOP,), bos_id=BOS, pad_id=PAD
)
SOUND = [
  ([BOS, 7, 8, STOP], [0, 0, 1, 1]),
  # Only the first reply of the two is trained; the last turn is a prompt.
  ([BOS, 7, STOP, 9, 9], [0, 1, 1, 0, 0]),
]


def judge(examples, known=KNOWN, **kwargs):
  """Findings that fail, by name."""
  findings = checks.check_store(fake_store(examples, **kwargs), known)
  return {finding.name: finding for finding in findings if finding.count}


def test_sound_data_passes():
  assert not judge(SOUND)


@pytest.mark.parametrize(
  ("of", "key"),
  [
    ("train", "data.train: got 0 rows in 0.jsonl"),
    ("held out", "data.eval: got 0 rows in 0.jsonl and nothing to measure"),
    ("general text", "eval.general_text: got 0 rows in 0.jsonl"),
  ],
)
def test_nothing_to_train_or_to_measure(of, key):
  (found,) = checks.check_store(fake_store([]), KNOWN, of=of)
  assert key in found.message


def test_a_source_of_which_nothing_is_trained():
  found = judge(SOUND, source=[0, 0], weights=(1.0, 1.0))
  assert found["nothing"].places == ("1.jsonl",)
  assert "in 1.jsonl" in found["nothing"].message


@pytest.mark.parametrize("token", [10, -1])
def test_token_outside_the_vocabulary(token):
  found = judge([*SOUND, ([BOS, token, STOP], [0, 1, 1])])
  said = f"jsonl:3: got token id {token}, expected below 10"
  assert said in found.pop("vocabulary").message
  assert not found


def test_two_bos():
  found = judge([*SOUND, ([BOS, BOS, 5, STOP], [0, 0, 1, 1])])
  assert "jsonl:3: got two BOS" in found.pop("bos").message
  assert not found


def test_missing_bos():
  """Wrong where others have it or the tokenizer adds it; else a choice."""
  bare = ([7, 8, STOP], [0, 1, 1])
  found = judge([*SOUND, bare, bare])["bos"]
  assert found.count == 2
  assert found.places == ("rows.jsonl:3", "rows.jsonl:4")
  assert "got token 7 at the start, expected BOS" in found.message
  assert not judge([bare])
  assert judge([bare], KNOWN._replace(adds_bos=True))["bos"].count == 1
  assert not judge([bare], KNOWN._replace(adds_bos=True), text=True)


def test_turn_without_a_stop_token():
  last = ([BOS, 7, 8, 9], [0, 0, 1, 1])
  first = ([BOS, 7, 8, 9, 5, STOP], [0, 0, 1, 0, 1, 1])
  found = judge([*SOUND, last, first]).pop("stop")
  assert "jsonl:3: a trained turn ends in token 9" in found.message
  assert found.places == ("rows.jsonl:3", "rows.jsonl:4")
  assert not judge([last], text=True), "raw text ends where it ends"


def test_a_cut_answer_may_run_on_but_not_the_turn_before():
  store = fake_store([([BOS, 7, STOP, 9, 8], [0, 1, 1, 0, 1])])
  store.index["may_run_on"] = True
  assert not any(v.count for v in checks.check_store(store, KNOWN))
  store = fake_store([([BOS, 7, 9, 9, 8], [0, 1, 0, 0, 1])])
  store.index["may_run_on"] = True
  assert [v.name for v in checks.check_store(store, KNOWN) if v.count] == [
    "stop"
  ]


def test_padding():
  trained = ([BOS, 7, STOP, PAD, PAD, STOP], [0, 1, 1, 1, 1, 1])
  assert judge([*SOUND, trained])["pad"].places == ("rows.jsonl:3",)
  # Where one token is both, it ends a turn once, and is trained when it does.
  both = KNOWN._replace(pad_id=STOP)
  assert not judge(SOUND, both)
  again = ([BOS, 7, STOP, STOP, STOP], [0, 1, 1, 1, 1])
  masked = ([BOS, 7, 8, STOP], [0, 0, 1, 0])
  found = judge([*SOUND, again, masked], both)
  assert found.pop("pad").places == ("rows.jsonl:3", "rows.jsonl:4")
  assert not found


@pytest.mark.parametrize("chunk", [7, 50])
def test_chunks_do_not_matter(monkeypatch, chunk):
  store = random_store(40, longest=20)
  # Gaps between the examples, as a split leaves them.
  store, _ = store.split(0.5, seed=0)
  known = KNOWN._replace(vocab_size=25_000, stop_ids=(1,), bos_id=None)
  whole = checks.check_store(store, known)
  assert whole[1].count
  assert whole[3].count
  monkeypatch.setattr(token_checks, "_CHUNK", chunk)
  assert checks.check_store(store, known) == whole
  got = [batch.tokens for batch in token_checks.batches(store)]
  rows = range(len(store.index))
  want = np.concatenate([store.example(row).tokens for row in rows])
  assert (np.concatenate(got) == want).all()
  assert len(got) > 1


def test_overlap_by_prompt_and_by_text():
  """The same prompt with another answer; the same text in another frame."""
  text = list(range(100, 140))
  train = [
    ([BOS, 7, 8, 9, STOP], [0, 0, 0, 1, 1]),
    ([BOS, *text, 60, STOP], [0] * 41 + [1, 1]),
  ]
  held = [
    ([BOS, 7, 8, 5, STOP], [0, 0, 0, 1, 1]),
    ([BOS, 70, *text, 61, STOP], [0] * 42 + [1, 1]),
    ([BOS, 7, 8, 8, 9, STOP], [0, 0, 0, 0, 1, 1]),
    ([BOS, *range(200, 240), STOP], [0] * 40 + [1, 1]),
  ]
  stores = fake_store(train), fake_store(held)
  found = checks.overlap(*stores, own_files=True)
  assert (found.name, found.count) == ("overlap", 2)
  assert found.places == ("rows.jsonl:1", "rows.jsonl:2")
  assert "1 by their prompt and 1 by runs of 13" in found.message
  # Of a share of the training files, only the same prompt is a fault.
  assert checks.overlap(*stores, own_files=False).places == ("rows.jsonl:1",)


def test_refusal_names_the_switch_that_overrides_it():
  findings = checks.check_store(fake_store([([7, 8], [0, 1])]), KNOWN)
  told = []
  with pytest.raises(ValueError, match=r"data.allow=\('stop',\)"):
    checks.refuse(findings, allow=(), log=told.append)
  assert not told
  checks.refuse(findings, allow=("stop",), log=told.append)
  assert "a trained turn ends in token 8" in told[0]
  with pytest.raises(ValueError, match=r"got \['stops'\]; expected names"):
    checks.refuse(findings, allow=("stops",), log=told.append)
