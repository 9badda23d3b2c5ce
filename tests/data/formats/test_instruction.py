"""Rows of a question and its answer, with all that may stand beside them."""

import pytest

from sft_jax.data.conversation import Message, NothingToTrain, RowError
from sft_jax.data.formats.formats import to_conversation


def turns(row):
  return [
    (one.role, one.content, one.loss_weight)
    for one in to_conversation(row).messages
  ]


QUESTION = ("user", "2 + 2?", 0.0)
ANSWER = ("assistant", "4", 1.0)


@pytest.mark.parametrize(
  "row",
  [
    {"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": "4"},
    {
      "prompt": "2 + 2?",
      "completion": [{"role": "assistant", "content": "4"}],
    },
    {
      "prompt": [{"from": "human", "value": "2 + 2?"}],
      "completion": {"from": "gpt", "value": "4"},
    },
  ],
)
def test_strings_and_turns_mix(row):
  assert turns(row) == [QUESTION, ANSWER]


def test_turns_of_a_prompt_are_not_trained():
  row = {
    "prompt": [
      {"role": "user", "content": "Hi"},
      {"role": "assistant", "content": "Hello."},
      {"role": "user", "content": "2 + 2?"},
      {"role": "assistant", "content": "3", "weight": 0.5},
      {"role": "user", "content": "2 + 2?"},
    ],
    "completion": [{"role": "assistant", "content": "4"}],
  }
  assert [weight for _, _, weight in turns(row)] == [0, 0, 0, 0.5, 0, 1]


def test_history_comes_first_and_is_trained():
  row = {
    "instruction": "2 + 2?",
    "output": "4",
    "system": "Be brief.",
    "history": [["Hi", "Hello."], ["1 + 1?", "<think>Hm.</think>2"]],
  }
  assert turns(row) == [
    ("system", "Be brief.", 0.0),
    ("user", "Hi", 0.0),
    ("assistant", "Hello.", 1.0),
    ("user", "1 + 1?", 0.0),
    ("assistant", "2", 1.0),
    QUESTION,
    ANSWER,
  ]
  made = to_conversation(row).messages
  assert made[4].reasoning == "Hm."


@pytest.mark.parametrize("key", ["input", "context"])
@pytest.mark.parametrize("asking", ["instruction", "prompt", "question"])
def test_what_a_question_is_about_is_kept(key, asking):
  row = {asking: "Who?", key: "Ann ran.", "response": "Ann."}
  assert turns(row)[0] == ("user", "Who?\n\nAnn ran.", 0.0)


def test_a_system_prompt_by_another_name():
  row = {"system_prompt": "Be.", "question": "2 + 2?", "response": "4"}
  assert turns(row) == [("system", "Be.", 0.0), QUESTION, ANSWER]
  with pytest.raises(RowError, match="system and system_prompt"):
    to_conversation({**row, "system": "Do."})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_rows_own_reasoning(key):
  row = {"prompt": "2 + 2?", "response": "4", key: "Twos."}
  assert to_conversation(row).messages[1] == Message("assistant", "4", "Twos.")


def test_no_answer_and_an_empty_one():
  with pytest.raises(NothingToTrain):
    to_conversation({"prompt": "2 + 2?", "answer": None})
  # Among turns it is a defect.
  empty = [{"role": "assistant", "content": ""}]
  with pytest.raises(RowError, match="an empty assistant turn"):
    to_conversation({"prompt": "2 + 2?", "completion": empty})
