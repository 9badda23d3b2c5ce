"""Rows of token ids: what labels train, and what they cannot mean."""

import pytest

from sft_jax.data.conversation import NothingToTrain, RowError
from sft_jax.data.formats.formats import to_conversation

IDS = [5, 6, 7, 8]


@pytest.mark.parametrize(
  ("columns", "weights"),
  [
    ({"labels": [-100, -100, 7, 8]}, (0, 0, 1, 1)),
    # The first is predicted from nothing.
    ({"labels": IDS}, (0, 1, 1, 1)),
    ({"labels": IDS, "attention_mask": [1, 1, 1, 1]}, (0, 1, 1, 1)),
    ({"labels": IDS, "position_ids": [0, 1, 2, 3]}, (0, 1, 1, 1)),
    ({"completion_mask": [0, 0, 1, 1]}, (0, 0, 1, 1)),
    (
      {"completion_mask": [0, 1, 1, 1], "assistant_masks": [0, 0, 1, 1]},
      (0, 0, 1, 1),
    ),
  ],
)
def test_what_is_trained(columns, weights):
  made = to_conversation({"input_ids": IDS, **columns}, source="a.jsonl:1")
  assert made.ids == tuple(IDS)
  assert made.id_weights == weights
  assert (made.messages, made.text, made.source) == ((), None, "a.jsonl:1")


@pytest.mark.parametrize(
  ("ids", "labels", "mask"),
  [
    ([5, 6, 0, 0], [-100, 6, -100, -100], [1, 1, 0, 0]),
    ([0, 0, 5, 6], [-100, -100, -100, 6], [0, 0, 1, 1]),
  ],
)
def test_padding_is_cut_off(ids, labels, mask):
  row = {"input_ids": ids, "labels": labels, "attention_mask": mask}
  made = to_conversation(row)
  assert (made.ids, made.id_weights) == ((5, 6), (0.0, 1.0))


@pytest.mark.parametrize(
  ("columns", "said"),
  [
    ({}, "input_ids alone"),
    ({"labels": [6, 7, 8, -100]}, "labels shifted by one"),
    ({"labels": [-100, 7, 8, 0]}, "labels shifted by one"),
    ({"labels": [5, 6, 9, 8]}, r"labels\[2\]: got 9 where input_ids has 7"),
    ({"labels": [5, 6, 7]}, "3 labels for 4 input_ids"),
    ({"labels": IDS, "attention_mask": [1, 0, 1, 1]}, "padding between"),
    ({"labels": IDS, "attention_mask": [1, 1, 1, 0]}, "trained padding"),
    ({"labels": IDS, "position_ids": [0, 1, 0, 1]}, "do not count up"),
    ({"labels": "5 6"}, "labels of type str"),
    ({"input_ids": [], "labels": []}, "no input_ids"),
    ({"input_ids": [5, -6, 7, 8], "labels": [-100] * 3 + [8]}, "the id -6"),
    ({"input_ids": [5, "6", 7, 8], "labels": IDS}, r"input_ids\[1\] '6'"),
    ({"input_ids": [5, 2**70, 7, 8], "labels": IDS}, r"input_ids\[1\]"),
  ],
)
def test_refusals(columns, said):
  with pytest.raises(RowError, match=said):
    to_conversation({"input_ids": IDS, **columns})


@pytest.mark.parametrize(
  "columns",
  [
    {"labels": [-100] * 4},
    {"labels": [5, -100, -100, -100]},
    {"labels": [-100] * 4, "attention_mask": [0] * 4},
  ],
)
def test_nothing_trained(columns):
  with pytest.raises(NothingToTrain, match="nothing trained"):
    to_conversation({"input_ids": IDS, **columns})
