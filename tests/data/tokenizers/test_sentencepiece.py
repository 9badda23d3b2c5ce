"""SentencePiece: where its space goes, and the ids that others expect."""

import pytest

from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from tiny_tokenizers import SHARED, sentence_piece


def test_sentencepiece_puts_its_space_before_the_first_text_only(tmp_path):
  modern = load_tokenizer(sentence_piece(tmp_path / "a"))
  legacy = load_tokenizer(sentence_piece(tmp_path / "b", legacy=True))
  first = modern.encode("the cat")
  assert legacy.encode("the cat") == first
  assert legacy.encode("<s>the cat") == [modern.bos_id, *first]
  assert modern.encode("<s> the cat") == [modern.bos_id, *first]
  assert modern.encode("<s>the cat")[1:] != first


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")
def test_llama2_gives_the_ids_that_llama_cpp_expects(tmp_path):
  cases = SHARED / "tokenizers" / "cases"
  source = SHARED / "tokenizers" / "llama2" / "tokenizer.model"
  (tmp_path / "tokenizer.model").write_bytes(source.read_bytes())
  one = load_tokenizer(tmp_path)
  texts = (cases / "llama-spm.inp").read_text().split("\n__ggml_vocab_test__\n")
  expected = (cases / "llama-spm.out").read_text().split("\n")
  assert len(texts) == 47 <= len(expected)
  for text, ids in zip(texts, expected, strict=False):
    assert one.encode(text) == [int(i) for i in ids.split()], text
