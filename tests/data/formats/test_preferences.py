"""Of a preference row the chosen side is trained, and only its answer."""

import pytest

from sft_jax.data.conversation import RowError
from sft_jax.data.formats.formats import to_conversation

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
def test_every_form(row):
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


def test_a_system_prompt_on_one_side_of_the_telling():
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
def test_unclear_rows(row, said):
  with pytest.raises(RowError, match=said):
    to_conversation(row)
