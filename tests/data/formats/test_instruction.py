"""Rows of a question and its answer, or of a better and a worse answer."""

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


# -- Preferences: the chosen side is trained, and only its answer -------------

USER = {"role": "user", "content": "2 + 2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}
EARLIER = [
  {"role": "user", "content": "Hi"},
  {"role": "assistant", "content": "Hello."},
]


@pytest.mark.parametrize(
  "row",
  [
    {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    {"question": "2 + 2?", "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"instruction": "2 + 2?", "input": "", "chosen": "4", "rejected": "5"},
    {
      "conversations": [{"from": "human", "value": "2 + 2?"}],
      "chosen": {"from": "gpt", "value": "4"},
      "rejected": {"from": "gpt", "value": "5"},
    },
    # The prompt within both sides, and told again beside them.
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": "2 + 2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    # As UltraFeedback has it: the messages are the chosen side once more.
    {
      "prompt": "2 + 2?",
      "messages": [USER, GOOD],
      "chosen": [USER, GOOD],
      "rejected": [USER, BAD],
    },
    {
      "prompt": "2 + 2?",
      "messages": None,
      "chosen": [USER, GOOD],
      "rejected": None,
    },
  ],
)
def test_every_form_of_a_preference(row):
  made = to_conversation(row).messages
  assert [(one.role, one.content, one.loss_weight) for one in made] == [
    ("user", "2 + 2?", 0.0),
    ("assistant", "4", 1.0),
  ]


@pytest.mark.parametrize(
  "row",
  [
    {"prompt": [*EARLIER, USER], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]},
    {
      "instruction": "2 + 2?",
      "history": [["Hi", "Hello."]],
      "chosen": "4",
      "rejected": "5",
    },
  ],
)
def test_what_both_sides_share_is_the_prompt(row):
  made = to_conversation(row).messages
  assert [one.loss_weight for one in made] == [0.0, 0.0, 0.0, 1.0]


def test_a_system_prompt_on_one_side_alone():
  system = {"role": "system", "content": "Be brief."}
  row = {"prompt": "2 + 2?", "chosen": [system, USER, GOOD]}
  roles = [one.role for one in to_conversation(row).messages]
  assert roles == ["system", "user", "assistant"]


@pytest.mark.parametrize(
  ("row", "said"),
  [
    ({"chosen": "Human: Hi", "rejected": "Human: Ho"}, "no prompt"),
    ({"prompt": "3 + 3?", "chosen": [USER, GOOD]}, "does not begin"),
    (
      {"prompt": "2 + 2?", "messages": [USER, BAD], "chosen": [USER, GOOD]},
      "a messages with which chosen does not begin",
    ),
    ({"messages": [USER, BAD], "chosen": [GOOD]}, "an assistant turn at the"),
    ({"prompt": "a", "question": "b", "chosen": "4"}, "prompt and question"),
    (
      {"prompt": "2 + 2?", "response": "4", "chosen": "4"},
      "prompt_completion and preference",
    ),
  ],
)
def test_unclear_preferences(row, said):
  with pytest.raises(RowError, match=said):
    to_conversation(row)
