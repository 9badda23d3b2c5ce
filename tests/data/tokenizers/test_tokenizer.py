"""Tokenizers: exact ids, exact offsets, the folder's own special tokens."""

import base64
import itertools
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.data.chat.template import chat_template
from sft_jax.data.tokenizers import tokenizer
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from tiny_tokenizers import (
  SHARED,
  SPECIAL,
  byte_level,
  metaspace,
  sentence_piece,
)

needs_shared = pytest.mark.skipif(
  not SHARED.is_dir(), reason="needs the shared data folder"
)
MAKERS = {
  "byte_level": byte_level,
  "metaspace": metaspace,
  "sentence_piece": sentence_piece,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizers")
  return {
    name: load_tokenizer(make(folder / name)) for name, make in MAKERS.items()
  }


@pytest.mark.parametrize("kind", MAKERS)
def test_what_the_folder_says(tiny, kind):
  one = tiny[kind]
  ids = [one.special_tokens[text] for text in SPECIAL[1:]]
  assert (one.bos_id, one.eos_id, one.pad_id) == (ids[0], ids[1], None)
  assert one.stop_ids == (ids[1], ids[3])
  assert one.named_tokens["unk_token"] == "<unk>"
  assert one.vocab_size > max(ids)
  assert one.chat_template == (one.folder / "chat_template.jinja").read_text()
  assert {file.name for file in one.files} >= {
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
  }


@pytest.mark.parametrize("kind", MAKERS)
def test_special_tokens_are_read_out_of_text_and_none_is_added(tiny, kind):
  one = tiny[kind]
  start, end = (one.special_tokens[text] for text in SPECIAL[3:])
  ids = one.encode("<|im_start|>the cat<|im_end|>\n<|im_end|>")
  assert ids[0] == start
  assert [i for i in ids if i in (start, end)] == [start, end, end]
  assert one.bos_id not in one.encode("the cat")
  assert one.decode(ids) == "the cat\n"
  assert one.decode(ids, skip_special=False) == (
    "<|im_start|>the cat<|im_end|>\n<|im_end|>"
  )


def test_a_post_processor_adds_no_bos(tmp_path):
  """The template writes BOS; a tokenizer of Llama would put another before."""
  folder = byte_level(tmp_path)
  model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
  )
  assert model.encode("the cat").ids[0] == 1
  model.save(str(folder / "tokenizer.json"))
  one = load_tokenizer(folder)
  ids = one.encode("the cat")
  assert not {1, 2} & set(ids)
  assert one.encode_with_offsets("the cat")[0] == ids
  assert one.encode_with_offsets("the cat", [(0, 3)])[0] == ids
  assert one.encode_batch(["the cat"]) == [ids]


def test_an_evil_regular_expression_ends_in_an_error(tmp_path, capfd):
  """Backtracking without end, as a tokenizer.json of others may have it."""
  folder = byte_level(tmp_path)
  path = folder / "tokenizer.json"
  state = json.loads(path.read_text())
  evil = {"type": "Split", "pattern": {"Regex": "(a+)+$"}}
  parts = [evil | {"behavior": "Isolated", "invert": False}]
  parts.append(state["pre_tokenizer"])
  state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
  path.write_text(json.dumps(state))
  one = load_tokenizer(folder)
  assert one.encode("the cat")
  text = "a" * 60 + "b"
  for encode in (
    one.encode,
    one.encode_with_offsets,
    lambda t: one.encode_batch([t]),
  ):
    with pytest.raises(ValueError, match=r"its tokenizer gave up on .*aaa"):
      encode(text)
  capfd.readouterr()  # The library's own trace of the panic.


def _replace(pattern, content):
  return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
  ("normalizer", "said"),
  [
    ([_replace({"String": "a"}, "a" * 20)] * 4, "160000 characters of one"),
    ([_replace({"Regex": ""}, "a" * 20)] * 2, "441 characters of one"),
    ([_replace({"String": ""}, "a" * 300)], "301 characters of one"),
    # The sizes of its trie: 4 GiB, and 4 bytes; then a text of 300.
    ([(b"\xf0\xff\xff\xff" + b"\0" * 16)], "precompiled map of 20 bytes, not"),
    ([(b"\4\0\0\0" + b"\0" * 4 + b"a" * 300)], "300 characters of one"),
    (["none"], "expected a file of the tokenizers library"),
    ([{"type": "Prepend", "prepend": "a" * 999}] * 3, "1e.09 characters of"),
    # A trie of 64 bytes that leads nowhere: the library panics.
    ([(b"\x40\0\0\0" + b"\x5a" * 64 + b"abc\0")], "its tokenizer gave up on"),
  ],
)
def test_a_tokenizer_that_would_fill_the_memory(tmp_path, normalizer, said):
  path = byte_level(tmp_path) / "tokenizer.json"
  state = json.loads(path.read_text())
  normalizer = [
    {
      "type": "Precompiled",
      "precompiled_charsmap": base64.b64encode(one).decode(),
    }
    if isinstance(one, bytes)
    else one
    for one in normalizer
  ]
  state["normalizer"] = {"type": "Sequence", "normalizers": normalizer}
  path.write_text(json.dumps(state))
  with pytest.raises(ValueError, match=said):
    load_tokenizer(tmp_path)


def _changed(folder: Path, **changes) -> Path:
  path = byte_level(folder) / "tokenizer.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  return folder


def test_a_tokenizer_that_ends_its_child_is_refused_by_name(
  tmp_path, monkeypatch
):
  class Dead:
    limits = "1 s or 2 MiB"
    ask = staticmethod(lambda path: None)

  monkeypatch.setattr(tokenizer, "TRIAL", Dead)
  with pytest.raises(ValueError, match=r"tmp.*exceeds 1 s or 2 MiB, or crash"):
    load_tokenizer(byte_level(tmp_path))


def test_a_tokenizer_that_changes_after_its_trial_is_refused(
  tmp_path, monkeypatch
):
  ask = tokenizer.TRIAL.ask
  monkeypatch.setattr(
    tokenizer.TRIAL, "ask", lambda path: [*ask(path)[:1], "another"]
  )
  with pytest.raises(ValueError, match="files that change while they are read"):
    load_tokenizer(byte_level(tmp_path))


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "makes no tokens"),
    (
      {"model": {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}},
      "ids up to 4294967295",
    ),
    (
      {"decoder": {"type": "Strip", "content": "a", "start": 9, "stop": 9**9}},
      "its tokenizer gave up on",
    ),
  ],
)
def test_tokenizers_that_cannot_be_used(tmp_path, changes, said, capfd):
  with pytest.raises(ValueError, match=said):
    load_tokenizer(_changed(tmp_path, **changes))
  assert not capfd.readouterr().err  # The panic was the child's.


def test_an_unknown_word_is_named_and_dropout_gives_the_same_ids(tmp_path):
  model = {"type": "WordLevel", "vocab": {"the": 0}, "unk_token": "?"}
  one = load_tokenizer(_changed(tmp_path / "a", model=model))
  with pytest.raises(ValueError, match=r"gave up on 'cat'.*Missing"):
    one.encode("cat")
  plain = load_tokenizer(byte_level(tmp_path / "b"))
  state = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
  dropping = load_tokenizer(
    _changed(tmp_path / "c", model=state["model"] | {"dropout": 0.5})
  )
  assert dropping.encode("the cat sat" * 9) == plain.encode("the cat sat" * 9)


def test_a_text_that_a_normalizer_may_blow_up_is_refused(tmp_path):
  normalizer = _replace({"String": "a"}, "a" * 200)
  one = load_tokenizer(_changed(tmp_path, normalizer=normalizer))
  assert one.encode("aa")
  text = "b" * (2**28 // 200 + 1)
  for encode in (one.encode, lambda text: one.encode_batch([text])):
    with pytest.raises(ValueError, match="expected at most 1342177"):
      encode(text)


WORDS = ["the cat", " ", "\n", "ü", "😀", "a", "house."]
texts = (
  st.lists(st.sampled_from([*SPECIAL[1:], *WORDS]))
  .map("".join)
  # These tokenizers put a space before text, and take one that is there.
  .filter(lambda text: not text.startswith(" "))
)


@settings(max_examples=60, deadline=None)
@given(text=texts)
@pytest.mark.parametrize("kind", MAKERS)
def test_round_trip_and_offsets(tiny, kind, text):
  one = tiny[kind]
  ids, offsets = one.encode_with_offsets(text)
  assert ids == one.encode(text)
  assert len(ids) == len(offsets)
  assert all(0 <= i < one.vocab_size for i in ids)
  assert one.decode(ids, skip_special=False) == text
  # In order, and together they cover the text.
  ends = [0, *(end for _, end in offsets)]
  assert all(a <= b for a, b in itertools.pairwise(ends))
  assert ends[-1] == len(text)
  for i, (start, end) in zip(ids, offsets, strict=True):
    if i in one.special_tokens.values():
      assert one.special_tokens[text[start:end]] == i


def test_templates_from_the_config(tmp_path):
  folder = byte_level(tmp_path / "a", template=None)
  assert load_tokenizer(folder).chat_template is None
  path = folder / "tokenizer_config.json"
  config = json.loads(path.read_text())
  path.write_text(json.dumps(config | {"chat_template": "A"}))
  assert load_tokenizer(folder).chat_template == "A"
  named = [
    {"name": "default", "template": "B"},
    {"name": "tool_use", "template": "C"},
  ]
  path.write_text(json.dumps(config | {"chat_template": named}))
  assert load_tokenizer(folder).chat_template == "B"
  path.write_text(json.dumps(config | {"chat_template": named[1:]}))
  one = load_tokenizer(folder)
  assert (one.chat_template, one.chat_templates) == (None, {"tool_use": "C"})
  with pytest.raises(ValueError, match=r"\['tool_use'\]; expected one named d"):
    chat_template(one)
  (folder / "chat_template.json").write_text('{"chat_template": "D"}')
  assert load_tokenizer(folder).chat_template == "D"
  more = folder / "additional_chat_templates"
  more.mkdir()
  (more / "rag.jinja").write_text("E")
  (folder / "chat_template.jinja").write_text("F")
  one = load_tokenizer(folder)
  assert one.chat_templates == {"tool_use": "C", "default": "F", "rag": "E"}
  assert one.chat_template == "F"
  one.write_files(tmp_path / "copy")
  assert load_tokenizer(tmp_path / "copy").chat_templates == one.chat_templates


def test_tokens_that_only_the_config_declares(tmp_path):
  folder = byte_level(tmp_path / "a")
  size = load_tokenizer(folder).vocab_size
  path = folder / "tokenizer_config.json"
  config = json.loads(path.read_text())
  token = {"content": "<|pad|>", "special": True, "normalized": False}
  declared = config | {
    "added_tokens_decoder": {str(size): token},
    "pad_token": token,
  }
  path.write_text(json.dumps(declared))
  one = load_tokenizer(folder)
  assert (one.pad_id, one.vocab_size) == (size, size + 1)
  assert one.encode("<|pad|>") == [size]
  declared["added_tokens_decoder"] = {str(size + 5): token}
  path.write_text(json.dumps(declared))
  with pytest.raises(ValueError, match=f"expected {size + 5}"):
    load_tokenizer(folder)
  path.write_text(json.dumps(config | {"pad_token": "<|none|>"}))
  with pytest.raises(ValueError, match=r"special token '<\|none\|>'"):
    load_tokenizer(folder)


def test_missing_and_broken_files(tmp_path):
  with pytest.raises(ValueError, match="no such folder"):
    load_tokenizer(tmp_path / "none")
  (tmp_path / "vocab.json").write_text("{}")
  with pytest.raises(ValueError, match=r"\['vocab.json'\]; expected tokenizer"):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.model").write_text("junk")
  with pytest.raises(ValueError, match="expected a SentencePiece model"):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="expected a file of the tokenizers"):
    load_tokenizer(tmp_path)
  folder = byte_level(tmp_path / "a")
  (folder / "generation_config.json").write_text('{"eos_token_id": 99999}')
  with pytest.raises(ValueError, match="eos_token_id 99999"):
    load_tokenizer(folder)


def test_the_fingerprint_changes_with_what_changes_ids(tmp_path):
  folder = byte_level(tmp_path / "a")
  seen = {load_tokenizer(folder).fingerprint}
  path = folder / "generation_config.json"
  path.write_text('{"eos_token_id": [2, 4], "temperature": 0.5}')
  assert load_tokenizer(folder).fingerprint in seen
  path.write_text('{"eos_token_id": 4}')
  seen.add(load_tokenizer(folder).fingerprint)
  with (folder / "chat_template.jinja").open("a") as template:
    template.write(" ")
  seen.add(load_tokenizer(folder).fingerprint)
  assert len(seen) == 3


def test_vocab_and_merges(tmp_path):
  whole = load_tokenizer(byte_level(tmp_path / "whole"))
  model = json.loads((tmp_path / "whole" / "tokenizer.json").read_text())
  folder = tmp_path / "parts"
  shutil.copytree(tmp_path / "whole", folder)
  (folder / "tokenizer.json").unlink()
  (folder / "vocab.json").write_text(json.dumps(model["model"]["vocab"]))
  merges = [" ".join(pair) for pair in model["model"]["merges"]]
  (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
  path = folder / "tokenizer_config.json"
  config = json.loads(path.read_text())
  config["additional_special_tokens"] = ["<|im_start|>"]
  path.write_text(json.dumps(config))
  parts = load_tokenizer(folder)
  text = "<|im_start|>The cat, ü 😀\n\n  and 123<|im_end|>"
  assert parts.encode_with_offsets(text) == whole.encode_with_offsets(text)
  assert parts.decode(parts.encode(text), skip_special=False) == text
  assert parts.special_tokens.items() >= {"<s>": 1, "</s>": 2}.items()
  assert {"vocab.json", "merges.txt"} <= {file.name for file in parts.files}
  path.write_text(json.dumps({**config, "tokenizer_class": "OddTokenizer"}))
  with pytest.raises(ValueError, match="tokenizer_class 'OddTokenizer'"):
    load_tokenizer(folder)
  path.write_text(json.dumps(config))
  (folder / "merges.txt").write_text("nothing here")
  with pytest.raises(ValueError, match=r"expected the vocab\.json and merges"):
    load_tokenizer(folder)


@needs_shared
@pytest.mark.parametrize(
  ("folder", "cases", "stop"),
  [("gpt2", "gpt-2", 50256), ("qwen2", "qwen2", 151643)],
)
def test_vocab_and_merges_give_the_ids_that_llama_cpp_expects(
  folder, cases, stop
):
  one = load_tokenizer(SHARED / "tokenizers" / folder)
  assert one.stop_ids == (stop,)
  path = SHARED / "tokenizers" / "cases"
  texts = (path / f"{cases}.inp").read_text().split("\n__ggml_vocab_test__\n")
  expected = (path / f"{cases}.out").read_text().split("\n")
  assert len(texts) == 47 <= len(expected)
  for text, ids in zip(texts, expected, strict=False):
    assert one.encode(text) == [int(i) for i in ids.split()], text


@needs_shared
def test_other_files_are_refused_by_name():
  with pytest.raises(ValueError, match=r"got \['tokenizer_llama3.tiktoken'\]"):
    load_tokenizer(SHARED / "tokenizers" / "llama3")


@needs_shared
def test_formats_of_other_libraries_get_a_word_of_their_own(tmp_path):
  (tmp_path / "tekken.json").write_text("{}")
  for folder, name in (
    (tmp_path, r"tekken\.json"),
    (SHARED / "tokenizers" / "llama3", r"tokenizer_llama3\.tiktoken"),
  ):
    with pytest.raises(ValueError, match=f"{name} is a format of Mistral's or"):
      load_tokenizer(folder)


def test_a_tokenizer_json_by_itself(tmp_path):
  """Its post-processor has the BOS, and the model's config the EOS."""
  folder = byte_level(tmp_path)
  model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  model.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").unlink()
  (folder / "generation_config.json").unlink()
  (folder / "config.json").write_text('{"eos_token_id": [4, 2]}')
  one = load_tokenizer(folder)
  assert (one.bos_id, one.eos_id, one.stop_ids) == (1, 4, (2, 4))
  assert one.named_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
  # A null is an answer.
  config = folder / "tokenizer_config.json"
  config.write_text('{"bos_token": null, "eos_token": null}')
  one = load_tokenizer(folder)
  assert (one.bos_id, one.eos_id, one.stop_ids) == (None, None, (2, 4))


def test_lists_of_special_tokens_of_every_age(tmp_path):
  """transformers has called them by four names, and two kinds of file."""
  size = load_tokenizer(byte_level(tmp_path / "a")).vocab_size
  named = {"bos_token": "<s>", "eos_token": "</s>"}
  new = {"<|a|>": size, "<|b|>": size + 1}
  token = {"special": True, "normalized": False}
  decoder = {str(n): token | {"content": text} for text, n in new.items()}
  ages = [
    # Before tokenizer_config.json listed tokens.
    ({}, {**named, "additional_special_tokens": [*new]}, new),
    (named, {"additional_special_tokens": [{"content": t} for t in new]}, new),
    ({**named, "additional_special_tokens": [*new]}, {}, new),
    # Version 4.
    ({**named, "added_tokens_decoder": decoder}, {}, {}),
    # Version 4's named tokens, and version 5's list.
    ({**named, "extra_special_tokens": {"image_token": "<|a|>"}}, {}, new),
    ({**named, "extra_special_tokens": [*new]}, {}, new),
    ({**named, "model_specific_special_tokens": {"a": "<|a|>"}}, {}, new),
  ]
  for i, (config, listed, added) in enumerate(ages):
    folder = byte_level(tmp_path / str(i))
    for name, value in (
      ("tokenizer_config", config),
      ("special_tokens_map", listed),
      ("added_tokens", added),
    ):
      path = folder / f"{name}.json"
      path.unlink(missing_ok=True)
      if value:
        path.write_text(json.dumps(value))
    one = load_tokenizer(folder)
    assert (one.bos_id, one.eos_id) == (1, 2), config
    assert one.encode("<|a|>b<|b|>")[:1] == [size], config
    assert one.vocab_size == size + 2


@pytest.mark.parametrize("kind", MAKERS)
def test_new_tokens_are_written_and_read_back(tmp_path, kind):
  folder = MAKERS[kind](tmp_path / "a")
  old = load_tokenizer(folder)
  texts = ["<|turn|>", "<|im_start|>", "<|done|>"]
  one, new = old.with_new_tokens(texts, stop=["<|done|>"])
  size = old.vocab_size
  assert new == {"<|turn|>": size, "<|done|>": size + 1}
  assert one.vocab_size == size + 2
  assert one.special_tokens.items() >= new.items()
  assert one.stop_ids == (*old.stop_ids, size + 1)
  assert (one.bos_id, one.eos_id) == (old.bos_id, old.eos_id)
  assert one.fingerprint != old.fingerprint
  text = "<|turn|>the cat<|im_start|><|done|>"
  ids = one.encode(text)
  assert (ids[0], ids[-1]) == (size, size + 1)
  assert one.encode("the cat") == old.encode("the cat")
  # Again, and with a template, through files.
  again, more = one.with_new_tokens(["<|turn|>", "<|more|>"])
  assert more == {"<|more|>": size + 2}
  again = again.with_chat_template("{{ messages[0].content }}")
  again.write_files(tmp_path / "b")
  (tmp_path / "b" / "generation_config.json").write_text(
    json.dumps({"eos_token_id": list(again.stop_ids)})
  )
  read = load_tokenizer(tmp_path / "b")
  assert read.chat_template == again.chat_template
  assert read.stop_ids == again.stop_ids
  assert read.vocab_size == again.vocab_size
  assert read.special_tokens == again.special_tokens
  for one in (text + "<|more|>", "the cat"):
    assert read.encode(one) == again.encode(one)
  literal, _ = again.encode_with_offsets(text, [(0, len(text))])
  assert not set(literal) & {size, size + 1}
  with pytest.raises(ValueError, match=r"got no token '<\|x\|>'"):
    old.with_new_tokens([], stop=["<|x|>"])
  with pytest.raises(ValueError, match=r"model\.new_tokens: got ' a'"):
    old.with_new_tokens([" a"])


def test_transformers_reads_new_tokens_as_they_are_here(tmp_path):
  transformers = pytest.importorskip("transformers", reason="live oracle")
  one, new = load_tokenizer(byte_level(tmp_path / "a")).with_new_tokens(
    ["<|turn|>", "<|done|>"], stop=["<|done|>"]
  )
  one.write_files(tmp_path / "b")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
  text = "<s><|turn|>the cat<|im_start|> ü<|done|>\n"
  assert theirs.encode(text, add_special_tokens=False) == one.encode(text)
  assert len(theirs) == one.vocab_size
  assert {*new} <= {*theirs.all_special_tokens}
  ids = one.encode(text)
  assert theirs.decode(ids, skip_special_tokens=True) == one.decode(ids)
