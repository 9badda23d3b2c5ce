"""Fields under a data set's own names; values in errors are harmless."""

import json

import pytest

from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.formats import fields
from sft_jax.data.formats.formats import to_conversation
from sft_jax.data.store import build
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from tiny_tokenizers import byte_level


def turns(row, columns, **kwargs):
  made = to_conversation(row, columns=columns, **kwargs)
  return [(one.role, one.content) for one in made.messages]


QUESTION = [("user", "2 + 2?"), ("assistant", "4")]


@pytest.mark.parametrize(
  ("row", "columns"),
  [
    ({"q": "2 + 2?", "a": "4"}, {"q": "prompt", "a": "completion"}),
    # A renamed column displaces another of its new name ...
    ({"prompt": "2 + 2?", "answer": "42", "a": "4"}, {"a": "answer"}),
    # ... and two may change places.
    (
      {"prompt": "4", "answer": "2 + 2?"},
      {"prompt": "answer", "answer": "prompt"},
    ),
    # A column that is in the way is renamed to something of no meaning.
    ({"prompt": "2 + 2?", "answer": "4", "output": "x"}, {"output": "raw"}),
    (
      {
        "dialogue": [
          {"speaker": "Customer", "utterance": "2 + 2?"},
          {"speaker": "Agent", "utterance": "4"},
        ]
      },
      {
        "dialogue": "messages",
        "messages": {"speaker": "role", "utterance": "content"},
        "role": {"Customer": "user", "Agent": "assistant"},
      },
    ),
  ],
)
def test_renaming(row, columns):
  assert turns(row, columns) == QUESTION


def test_a_null_that_displaces_is_an_empty_answer():
  row = {"prompt": "2 + 2?", "answer": "42", "solution": None}
  with pytest.raises(ValueError, match="empty answer"):
    turns(row, {"solution": "answer"})


@pytest.mark.parametrize(
  "columns",
  [
    {"a": "prompt", "b": "prompt"},
    {"a": 3},
    {"a": {"b": "c"}},
    {"messages": {"a": "role", "b": "role"}},
  ],
)
def test_malformed_columns(columns):
  with pytest.raises(
    ValueError, match=r"columns of the source: got .* expected"
  ):
    turns({"prompt": "2 + 2?", "answer": "4"}, columns)


def test_the_columns_of_a_source_reach_its_rows(tmp_path):
  theirs = tmp_path / "theirs.jsonl"
  theirs.write_text(json.dumps({"q": "2 + 2?", "a": "4"}))
  ours = tmp_path / "ours.jsonl"
  ours.write_text(json.dumps({"prompt": "2 + 2?", "completion": "4"}))
  store = build.build(
    [
      {"path": str(theirs), "columns": {"q": "prompt", "a": "completion"}},
      {"path": str(ours)},
    ],
    load_tokenizer(byte_level(tmp_path / "tokenizer")),
    RenderOptions(),
    directory=tmp_path / "cache",
    max_length=64,
    log=lambda line: None,
  )
  first, second = store.example(0), store.example(1)
  assert first.tokens.tolist() == second.tokens.tolist()


@pytest.mark.parametrize(
  ("value", "shown"),
  [
    ("ü\x1b[2J", r"'\xfc\x1b[2J'"),
    ("x" * 50, "'" + "x" * 40 + "'..."),
    ({"a": [1, 2], "b": {"c": 1}}, "{'a': [2 items], 'b': {...}}"),
    (b"x", "type bytes"),
    (None, "None"),
    (10**100, "1" + "0" * 39),
  ],
)
def test_shown(value, shown):
  assert fields.shown(value) == shown


def test_shown_is_bounded():
  row = {f"key {i}": "\x00" * 10_000 for i in range(1000)}
  assert len(fields.shown(row)) < 3000
