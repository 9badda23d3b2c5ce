"""Log-probabilities of tokens: those of a softmax over one row's logits."""

import json

import jax
import numpy as np
import pytest

import sft_jax
import tiny
from sft_jax.data.conversation import NothingToTrain


def test_each_token_has_the_logprob_of_its_softmax(tmp_path):
  folder = tiny.model_folder(tmp_path / "model")
  tokenizer = sft_jax.load_tokenizer(folder)
  model, params = sft_jax.load_pretrained(folder)
  rows = [*tiny.ROWS[:2], {"text": "The cat sat."}]
  turns = [("user", "A cat?"), ("assistant", "Yes."), ("user", "And a dog?")]
  turns.append(("assistant", "That too, and a hen."))
  rows.append({"messages": [{"role": r, "content": c} for r, c in turns]})
  tables = sft_jax.logprobs(model, params, tokenizer, rows, batch_size=3)
  assert [set(table["row"]) for table in tables] == [{0}, {1}, {2}, {3}]
  json.dumps(tables)  # Plain data.
  for table in tables:
    ids = np.array(table["id"], np.int32)[None]
    hidden = model.hidden(params, ids)
    logits = np.asarray(model.logits(params, hidden), np.float64)[0]
    all_of = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [all_of[i, token] for i, token in enumerate(ids[0, 1:])]
    assert table["logprob"][0] is None
    np.testing.assert_allclose(table["logprob"][1:], expected, atol=2e-5)
    assert "".join(table["text"]) == tokenizer.decode(
      table["id"], skip_special=False
    )
  (answers,) = tables[3:]
  said = dict.fromkeys(answers["role"], "")
  for role, text in zip(answers["role"], answers["text"], strict=True):
    said[role] += text
  assert said["user"] == "A cat?And a dog?"
  assert said["answer"] == "Yes.That too, and a hen."
  weights = zip(answers["role"], answers["weight"], strict=True)
  assert all((role in ("answer", "stop")) == (w == 1) for role, w in weights)
  split = sft_jax.logprobs(model, params, tokenizer, rows[3:], history="split")
  assert [set(table["row"]) for table in split] == [{0}, {0}]
  assert split[0]["logprob"][1:] == pytest.approx(
    answers["logprob"][1 : len(split[0]["id"])], abs=2e-5
  )
  with pytest.raises(NothingToTrain):
    sft_jax.logprobs(
      model, params, tokenizer, [{"messages": rows[3]["messages"][:1]}]
    )
  jax.clear_caches()
