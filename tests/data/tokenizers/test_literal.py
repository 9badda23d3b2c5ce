"""Special tokens read as text, by every kind of tokenizer."""

import itertools
import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.encoding import encode
from sft_jax.data.formats import formats
from sft_jax.data.readers import files
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from tiny_tokenizers import SHARED, byte_level, metaspace, sentence_piece

# Folders that `tools/real_models.py` of the shared data builds.
REAL = Path(os.environ.get("SFT_JAX_REAL_MODELS", "/nonexistent"))


def unigram(folder):
  """A Unigram model whose pieces of text include its special tokens."""
  pieces = ["<unk>", "<s>", "</s>", "<mask>", "▁a", "▁", *"abms<>/k"]
  model = tokenizers.Tokenizer(
    models.Unigram([(one, -float(i)) for i, one in enumerate(pieces)], unk_id=0)
  )
  model.pre_tokenizer = pre_tokenizers.Metaspace()
  model.add_special_tokens(["<unk>", "<s>", "</s>", "<mask>"])
  return _save(folder, model)


def word_level(folder):
  """Lower-cased words, a token that takes the white space before it, and a
  stop token that no file calls special."""
  vocab = {"<unk>": 0, "a": 1, "<": 2, ">": 3, "s": 4, "mask": 5, "b": 6}
  model = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
  model.normalizer = normalizers.Lowercase()
  model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  model.add_special_tokens(["<s>"])
  model.add_tokens([AddedToken("</s>", normalized=False)])
  model.add_special_tokens([AddedToken("<mask>", lstrip=True)])
  return _save(folder, model)


def _save(folder, model):
  folder.mkdir()
  model.save(str(folder / "tokenizer.json"))
  named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(named))
  return folder


MAKERS = {
  "byte_level": byte_level,
  "metaspace": metaspace,
  "sentence_piece": sentence_piece,
  "unigram": unigram,
  "word_level": word_level,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizers")
  return {
    name: load_tokenizer(make(folder / name)) for name, make in MAKERS.items()
  }


def check(one, parts):
  """Texts said, each with a special token in it, between structure."""
  text, literal, structure = "", [], []
  for said, token in parts:
    literal.append((len(text), len(text) + len(said)))
    text += said + token
    structure.append(one.special_tokens[token])
  ids, offsets = one.encode_with_offsets(text, literal)
  unknown = one.special_tokens.get(one.named_tokens.get("unk_token"))
  forbidden = set(one.special_tokens.values()) - {unknown}
  assert [number for number in ids if number in forbidden] == structure
  # Offsets are in order, and those of structure are its own characters.
  assert all(
    a <= c and b <= d for (a, b), (c, d) in itertools.pairwise(offsets)
  )
  assert all(0 <= a <= b <= len(text) for a, b in offsets)
  ends = {
    b: (i, text[a:b]) for i, (a, b) in zip(ids, offsets, strict=True) if a < b
  }
  at = 0
  for said, token in parts:
    at += len(said + token)
    number, shown = ends[at]
    assert (number, shown.strip()) == (one.special_tokens[token], token)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", MAKERS)
def test_only_structure_becomes_special_tokens(tiny, kind, data):
  one = tiny[kind]
  tokens = [text for text in one.special_tokens if text != "<unk>"]
  # Characters of the placeholders too, which any text may have.
  words = ["a", " b ", "<s", ">", "ü", "\U000f0000", "\U000f0009", *tokens]
  texts = st.lists(st.sampled_from(words), max_size=6).map("".join)
  pairs = st.tuples(texts, st.sampled_from(tokens))
  check(one, data.draw(st.lists(pairs, min_size=1, max_size=4)))


@pytest.mark.parametrize("kind", MAKERS)
def test_text_without_special_tokens_keeps_its_ids(tiny, kind):
  one = tiny[kind]
  text = "<s>a b <table> <b> as</s>"
  assert one.encode_with_offsets(text, [(3, 20)])[0] == one.encode(text)


def test_a_literal_token_is_spelled_in_pieces(tiny):
  one = tiny["byte_level"]
  ids, _ = one.encode_with_offsets("<s>a</s>", [(3, 8)])
  assert one.decode(ids, skip_special=False) == "<s>a</s>"
  assert ids[0] == one.bos_id
  assert one.eos_id not in ids
  # Cut, where the model's own pieces have the token.
  one = tiny["unigram"]
  ids, offsets = one.encode_with_offsets("a<mask>", [(1, 7)])
  texts = ["a<mask>"[a:b] for a, b in offsets]
  assert {"<", "k", ">"} < set(texts)
  assert one.special_tokens["<mask>"] not in ids


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")
@pytest.mark.parametrize("name", ["gpt2", "llama2", "mistral", "qwen2"])
def test_shared_tokenizers_read_their_tokens_as_text(name):
  _check_all(load_tokenizer(SHARED / "tokenizers" / name))


@pytest.mark.slow
@pytest.mark.skipif(
  not REAL.is_dir(), reason="SFT_JAX_REAL_MODELS names no folder"
)
@pytest.mark.parametrize("name", ["gemma270", "smollm2"])
def test_real_models_read_their_tokens_as_text(name):
  _check_all(load_tokenizer(REAL / name))


def _check_all(one):
  unknown = one.named_tokens.get("unk_token")
  tokens = [text for text in one.special_tokens if text != unknown][:20]
  pairs = zip(tokens, reversed(tokens), strict=True)
  check(one, [(f"the {a} and {b}", b) for a, b in pairs])
  for text in ("<table>", "<b>bold</b>", "a < b > c", "[x]"):
    assert text not in one.special_tokens


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")
def test_a_row_of_alpaca_that_spells_a_control_token_trains(tmp_path):
  """Row 2744 asks about a word that many tokenizers have as a special token."""
  one, _ = load_tokenizer(byte_level(tmp_path)).with_new_tokens(["<mask>"])
  path = SHARED / "instruction" / "alpaca_5000.json"
  found = [row for _, row in files.read_rows(path) if "<mask>" in str(row)]
  assert found
  for row in found:
    made = encode.encode_row(
      formats.to_conversation(row), one, RenderOptions(), max_length=4096
    )
    (example,) = made.examples
    assert made.notes == {"escaped control token": 1}
    assert one.special_tokens["<mask>"] not in example.tokens
    assert "<mask>" in one.decode(example.tokens.tolist())
