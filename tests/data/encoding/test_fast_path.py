"""Alike conversations are encoded as the careful way encodes them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.conversation import Conversation, Message
from sft_jax.data.encoding import encode, fast_path
from sft_jax.data.formats import formats
from sft_jax.data.readers import files
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from tiny_tokenizers import (
  CHATML,
  FORGETFUL,
  GLUED,
  SHARED,
  byte_level,
  load_all,
  metaspace,
  sentence_piece,
)

# Strips what is said, branches on it, and has text of its own after it.
FICKLE = (
  "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
  "{% if 'cat' in m.content %}Cats!{% endif %}{{ m.content | trim }}"
  "{% if m.role == 'user' %}\n[end]{% endif %}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n"
  "{% if 'dog' in messages[-1].content %}Dogs!{% endif %}{% endif %}"
)
MAKERS = {
  "chatml": (byte_level, CHATML),
  "chatml_pieces": (sentence_piece, CHATML),
  "chatml_metaspace": (metaspace, CHATML),
  "forgetful": (byte_level, FORGETFUL),
  "glued": (byte_level, GLUED),
  "glued_metaspace": (metaspace, GLUED),
  "fickle": (byte_level, FICKLE),
}
OPTIONS = (
  RenderOptions(),
  RenderOptions(history="split"),
  RenderOptions(train_on="last_turn", over_long="truncate"),
  RenderOptions(control_tokens="escape"),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  return load_all(tmp_path_factory.mktemp("tokenizers"), MAKERS)


def _encoded(conversation, tokenizer, options, tokenized=None):
  try:
    row = encode.encode_row(
      conversation, tokenizer, options, max_length=60, tokenized=tokenized
    )
  except ValueError as error:
    return str(error)
  examples = [
    [
      np.asarray(getattr(one, field.name)).tolist()
      for field in dataclasses.fields(one)
    ]
    for one in row.examples
  ]
  return examples, row.dropped, row.notes


def assert_equal(conversations, tokenizer, options):
  """The number of conversations that were encoded by comparison."""
  alike = fast_path.tokenize_rows(conversations, tokenizer, options)
  for conversation, made in zip(conversations, alike, strict=True):
    if made is not None:
      got = _encoded(conversation, tokenizer, options, made)
      assert got == _encoded(conversation, tokenizer, options)
  return sum(made is not None for made in alike)


said = st.lists(
  st.sampled_from(
    [
      "the",
      "cat",
      "dog",
      " ",
      "\n",
      "\n\n",
      "?\n",
      "ü",
      "😀",
      ".",
      "<",
      "|im_end|>",
      "[end]",
    ]
  ),
  min_size=1,
  max_size=5,
).map("".join)


@settings(max_examples=25, deadline=None)
@given(
  rows=st.lists(st.lists(said, min_size=2, max_size=5), min_size=1, max_size=4),
  options=st.sampled_from(OPTIONS),
)
@pytest.mark.parametrize("kind", MAKERS)
def test_any_words_are_encoded_the_same(tiny, kind, rows, options):
  conversations = [
    Conversation(
      tuple(
        Message(("user", "assistant")[i % 2], text)
        for i, text in enumerate(texts)
      )
    )
    for texts in rows
  ]
  assert_equal(conversations, tiny[kind], options)


def _chat(*texts, **kwargs):
  turns = [
    Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)
  ]
  return Conversation(tuple(turns), **kwargs)


def test_most_are_alike(tiny):
  rows = [_chat("the cat", "a dog"), _chat("a house\n", "the town")]
  rows += [_chat("one", "two", "three", "four")]
  for kind in ("chatml", "chatml_pieces", "chatml_metaspace"):
    assert assert_equal(rows, tiny[kind], RenderOptions()) == 3
  # A template that changes its mind with what is said.
  fickle = [_chat("a hen", "a pen"), _chat("a cat", "a pen")]
  fickle += [_chat("a dog", "a pen")]
  assert assert_equal(fickle, tiny["fickle"], RenderOptions()) == 1


def test_what_is_more_than_text_takes_care(tiny):
  plain = _chat("the cat", "a dog")
  first, second = plain.messages
  for changed in (
    dataclasses.replace(second, reasoning="a cat"),
    dataclasses.replace(second, weight=0.5),
    dataclasses.replace(second, content="<think>a</think>b"),
    dataclasses.replace(second, name="Ann"),
  ):
    row = dataclasses.replace(plain, messages=(first, changed))
    assert (
      assert_equal([plain, row, plain], tiny["chatml"], RenderOptions()) == 2
    )
  with_tools = dataclasses.replace(plain, tools=({"name": "look"},))
  text = Conversation(text="the cat")
  assert fast_path.tokenize_rows(
    [with_tools, text], tiny["chatml"], RenderOptions()
  ) == [None, None]
  bad = _chat("the <|im_end|>", "a dog")
  assert fast_path.tokenize_rows([bad], tiny["chatml"], RenderOptions()) == [
    None
  ]
  row = encode.encode_row(bad, tiny["chatml"], RenderOptions(), max_length=60)
  assert row.notes == {"escaped control token": 1}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")
@pytest.mark.parametrize(
  "name",
  [
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "meta-llama-Llama-3.1-8B-Instruct",
    "google-gemma-2-2b-it",
    "microsoft-Phi-3.5-mini-instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "deepseek-ai-DeepSeek-V3.1",
    "HuggingFaceTB-SmolLM3-3B",
  ],
)
def test_real_rows_by_real_templates(name, tmp_path):
  import json

  import tokenizers

  stops = {
    "google": "<end_of_turn>",
    "meta": "<|eot_id|>",
    "micros": "<|end|>",
    "mistra": "</s>",
    "deepse": "<｜end▁of▁sentence｜>",
  }
  stop = next((s for k, s in stops.items() if name.startswith(k)), "<|im_end|>")
  model = tokenizers.Tokenizer.from_file(
    str(SHARED / "tokenizers" / "mistral" / "tokenizer.json")
  )
  model.add_special_tokens([stop, "<|im_start|>", "[INST]", "[/INST]"])
  model.save(str(tmp_path / "tokenizer.json"))
  template = (SHARED / "chat_templates" / f"{name}.jinja").read_text()
  (tmp_path / "chat_template.jinja").write_text(template)
  (tmp_path / "generation_config.json").write_text(
    json.dumps({"eos_token_id": model.token_to_id(stop)})
  )
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
  )
  tokenizer = load_tokenizer(tmp_path)
  options = RenderOptions({"date": "2026-01-31"}, generation_prompt="omit")
  rows = []
  for file in ("instruction/t0_sample.jsonl", "instruction/alpaca_5000.json"):
    for _, (_, row) in zip(
      range(15), files.read_rows(SHARED / file), strict=False
    ):
      rows.append(formats.to_conversation(row))
  asked = [m.content for row in rows for m in row.messages][:12]
  rows += [_chat(*asked[:4]), _chat(*asked[4:8]), _chat(*asked[6:12])]
  number = assert_equal(rows, tokenizer, options)
  assert number >= 20
