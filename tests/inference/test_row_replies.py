"""Replies to held-out rows: those that a conversation would get."""

import json

import pytest

import tiny
from sft_jax.data.conversation import Conversation, Message
from sft_jax.inference import generate
from sft_jax.training.build import build, setup_rows


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  folder = tmp_path_factory.mktemp("row_replies")
  model = tiny.model_folder(folder / "model")
  text = {"text": "A raw text has no prompt."}
  held = tiny.rows_file(folder / "held.jsonl", [text, *tiny.ROWS[8:]])
  rows = tiny.rows_file(folder / "rows.jsonl", tiny.ROWS[:8])
  config = tiny.config(
    folder, model, rows, data__eval=str(held), eval__max_new_tokens=6
  )
  run = build.setup(config, lambda line: None)
  params = {**run.state.params, **run.state.frozen}
  return config, run, params


def test_a_row_gets_the_reply_that_its_conversation_gets(found):
  config, run, params = found
  (made,) = setup_rows.replies(config, run, params).values()
  assert len(made) == config.eval.samples == 3
  for row, answered in zip(tiny.ROWS[8:], made, strict=False):
    asked = Conversation((Message("user", row["instruction"]),))
    (reply,) = generate.generate(
      run.model, params, run.tokenizer, [asked], max_new_tokens=6
    )
    said = run.tokenizer.decode(reply.tokens, skip_special=False)
    assert answered["reply"] == said
    assert answered["stopped"] == reply.stopped
    assert row["instruction"] in answered["prompt"]
    # The row's own reply is whole: up to its stop token.
    stops = [
      run.tokenizer.decode([stop], skip_special=False)
      for stop in run.tokenizer.stop_ids
    ]
    assert answered["row"] in [row["output"] + stop for stop in stops]
  # The raw text is the first row, and is passed over.
  assert made[0]["where"] == "held.jsonl:2"
  json.dumps(made)


def test_behaviours_make_it_superfluous(found):
  config, run, params = found
  assert setup_rows.replies(config, run._replace(items=[1]), params) == {}
  assert setup_rows.replies(config, run._replace(held_out=None), params) == {}


def test_samples_are_paired():
  old = {"where": "w", "prompt": "p", "reply": "a", "stopped": False}
  new = {**old, "reply": "b", "stopped": True}
  (sample,) = setup_rows.samples({"replies": [old]}, {"replies": [new]})
  assert sample["before"] == {"text": "a", "stopped": False}
  assert sample["after"] == {"text": "b", "stopped": True}
  assert setup_rows.samples({}, {}) == []
  # Forced on with another number of samples.
  assert setup_rows.samples({}, {"replies": [new]}) == []
