"""Where a token would join a prompt to its reply, the two are apart."""

import pytest

from sft_jax.data.chat.loss_spans import Rendered
from sft_jax.data.chat.options import DEFAULT
from sft_jax.data.conversation import Conversation, RowError
from sft_jax.data.encoding import boundaries
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from tiny_tokenizers import CHATML, GLUED, byte_level, metaspace

ROW = Conversation(text="x", source="rows.jsonl:3")
PROMPT = "<s>user: Hello\nassistant: "
REPLY = "the cat</s>"


def encode(text, spans, tokenizer, options=DEFAULT):
  return boundaries.encode_rendered(
    Rendered(text, spans), tokenizer, options, ROW
  )


def test_a_joined_reply_follows_the_prompt_of_inference(tmp_path):
  one = load_tokenizer(metaspace(tmp_path, GLUED))
  prompt = one.encode(PROMPT)
  whole = one.encode(PROMPT + REPLY)
  # Without care a token would hold the prompt's last space and the reply.
  assert whole[: len(prompt)] != prompt
  span = (len(PROMPT), len(PROMPT + REPLY), 0.5)
  (made,) = encode(PROMPT + REPLY, (span,), one)
  assert made.ids[: len(prompt)] == prompt
  reply = made.ids[len(prompt) :]
  assert one.decode(reply, skip_special=False) == REPLY
  assert made.weights.tolist() == [0.0] * len(prompt) + [0.5] * len(reply)
  assert one.decode(made.ids, skip_special=False) == PROMPT + REPLY


def test_a_clean_seam_keeps_the_ids_of_the_whole(tmp_path):
  one = load_tokenizer(byte_level(tmp_path, CHATML))
  text = "<|im_start|>the cat<|im_end|>\n"
  ids = one.encode(text)
  (made,) = encode(text, ((12, len(text) - 1, 1.0),), one)
  assert made.ids == ids
  assert made.weights.tolist() == [0.0] + [1.0] * (len(ids) - 2) + [0.0]


def test_the_span_must_end_at_the_first_stop_token(tmp_path):
  one = load_tokenizer(byte_level(tmp_path, CHATML))
  text = "<|im_start|>the<|im_end|>cat<|im_end|>"
  for span in ((12, len(text), 1.0), (12, 15, 1.0)):
    with pytest.raises(RowError, match=r"rows.jsonl:3: got a trained turn"):
      encode(text, (span,), one)


def test_a_reply_that_cannot_be_apart_is_refused(tmp_path, monkeypatch):
  one = load_tokenizer(metaspace(tmp_path, GLUED))
  # Encoded by itself alone, the reply gets a space that it does not have.
  monkeypatch.setattr(boundaries, "_ANCHORS", ("",))
  span = (len(PROMPT), len(PROMPT + REPLY), 1.0)
  with pytest.raises(RowError, match="cannot be encoded apart"):
    encode(PROMPT + REPLY, (span,), one)
