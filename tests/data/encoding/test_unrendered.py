"""Rows without turns: raw text in windows, and ids made elsewhere."""

import itertools

import pytest

from sft_jax.data.conversation import Conversation, NothingToTrain, RowError
from sft_jax.data.encoding import encode
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from tiny_tokenizers import byte_level, sentence_piece


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("max_length", [2, 3, 7, 1000])
def test_raw_text_is_predicted_exactly_once(make, max_length, tmp_path):
  one = load_tokenizer(make(tmp_path))
  text = "the cat and the dog\nsat in the house. ü"
  ids = [one.bos_id, *one.encode(text), one.eos_id]
  made = encode.encode(Conversation(text=text), one, max_length=max_length)
  assert all(len(window.tokens) <= max_length for window in made)
  assert made[0].tokens[0] == one.bos_id
  predicted = [
    token
    for window in made
    for token, weight in zip(window.tokens, window.loss_weights, strict=True)
    if weight
  ]
  assert predicted == ids[1:]
  assert all(window.loss_weights[0] == 0 for window in made)
  for a, b in itertools.pairwise(made):
    assert a.tokens[-1] == b.tokens[0]


def test_ids_made_elsewhere_are_trained_as_they_are(tmp_path):
  one = load_tokenizer(byte_level(tmp_path))
  row = Conversation(ids=(5, 6, 7), id_weights=(1.0, 0.0, 0.5))
  (made,) = encode.encode(row, one, max_length=9)
  assert made.tokens.tolist() == [5, 6, 7]
  assert made.loss_weights.tolist() == [0.0, 0.0, 0.5]
  assert {encode.PARTS[part] for part in made.parts} == {"text"}
  assert encode.prompt_ids(row, one) == [5, 6, 7]


def test_ids_that_cannot_be_this_tokenizers(tmp_path):
  one = load_tokenizer(byte_level(tmp_path))
  size = one.vocab_size
  for ids, weights, fault, said in (
    ((5, size), (0.0, 1.0), RowError, f"the id {size}; expected ids from 0"),
    ((5, 6), (0.0, -1.0), RowError, "negative or not finite"),
    ((5, 6), (0.0, float("nan")), RowError, "negative or not finite"),
    # Nothing is before the first to predict it from.
    ((5, 6), (1.0, 0.0), NothingToTrain, "no trained token"),
  ):
    row = Conversation(ids=ids, id_weights=weights)
    with pytest.raises(fault, match=said):
      encode.encode(row, one, max_length=9)
