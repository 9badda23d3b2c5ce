"""Each verdict refuses its fault by place, and sound data passes."""

import pytest

from fake_store import fake_store
from sft_jax.data.audit import verify

BOS, STOP = 1, 2
SOUND = [
  ([BOS, 7, 8, STOP], [0, 0, 1, 1]),
  # Only the first reply of the two is trained; the last turn is a prompt.
  ([BOS, 7, STOP, 9, 9], [0, 1, 1, 0, 0]),
]


def _verify(examples, **kwargs):
  verify(
    fake_store(examples, **kwargs), vocab_size=10, stop_ids=(STOP,), bos_id=BOS
  )


def test_sound_data_passes():
  _verify(SOUND)


def test_nothing_to_train():
  with pytest.raises(ValueError, match="got no row with anything"):
    _verify([])


@pytest.mark.parametrize("token", [10, -1])
def test_token_outside_the_vocabulary(token):
  with pytest.raises(
    ValueError, match=rf"jsonl:3: got token id {token}, expected below 10"
  ):
    _verify([*SOUND, ([BOS, token, STOP], [0, 1, 1])])


def test_two_bos():
  with pytest.raises(ValueError, match="jsonl:3: got two BOS"):
    _verify([*SOUND, ([BOS, BOS, 5, STOP], [0, 0, 1, 1])])


def test_reply_without_a_stop_token():
  fault = [*SOUND, ([BOS, 7, 8, 9], [0, 0, 1, 1])]
  with pytest.raises(ValueError, match="jsonl:3: the last trained token is 9"):
    _verify(fault)
  _verify(fault, text=True)  # raw text ends where it ends
