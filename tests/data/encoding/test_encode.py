"""Law 1 in ids: before every trained token stands what inference holds."""

import datetime
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.conversation import (
  Conversation,
  Message,
  NothingToTrain,
  RowError,
  ToolCall,
)
from sft_jax.data.encoding import encode
from sft_jax.data.formats import formats
from sft_jax.data.readers import files
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from tiny_rows import chat, runs
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

MAKERS = {
  "byte_level": (byte_level, CHATML),
  "sentence_piece": (sentence_piece, CHATML),
  # The prompt ends in a space that the reply's first token would swallow.
  "glued_metaspace": (metaspace, GLUED),
  "glued_sentence_piece": (sentence_piece, GLUED),
  "glued_byte_level": (byte_level, GLUED),
  "forgetful": (byte_level, FORGETFUL),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  return load_all(tmp_path_factory.mktemp("tokenizers"), MAKERS)


def assert_law_1(conversation, tokenizer, **kwargs):
  """Checks every trained turn against the prompt that inference would use.

  Independent of the code under test: only prompt_ids (what the sampler is
  given) and decode are used.
  """
  examples = encode.encode(conversation, tokenizer, max_length=10_000, **kwargs)
  assistants = [
    index
    for index, message in enumerate(conversation.messages)
    if message.loss_weight > 0
  ]
  spans = [
    (one.tokens.tolist(), *span)
    for one in examples
    for span in runs(one.loss_weights)
  ]
  assert len(spans) == len(assistants)
  for (tokens, start, end), index in zip(spans, assistants, strict=True):
    so_far = Conversation(conversation.messages[:index], conversation.tools)
    prompt = encode.prompt_ids(so_far, tokenizer)
    assert tokens[:start] == prompt
    # It stops, by itself and only at its end.
    stops = [t in tokenizer.stop_ids for t in tokens[start:end]]
    assert stops == [False] * (end - start - 1) + [True]
    # And the text that inference shows is what the turn says.
    shown = tokenizer.decode(tokens[:end], skip_special=False)
    before = tokenizer.decode(prompt, skip_special=False)
    assert shown.startswith(before)
    assert conversation.messages[index].content in shown[len(before) :]
  for one in examples:
    assert one.tokens.dtype == np.int32
    assert one.loss_weights.dtype == np.float32
    assert one.loss_weights[0] == 0
    bos = tokenizer.bos_id
    assert one.tokens.tolist().count(bos) <= 1
  return examples


words = st.lists(
  st.sampled_from(["the", "cat", "dog", " ", "  ", "\n", "ü", "😀", "x", "."]),
  min_size=1,
).map("".join)


@settings(max_examples=25, deadline=None)
@given(said=st.lists(words, min_size=2, max_size=6))
@pytest.mark.parametrize("kind", MAKERS)
def test_law_1_for_any_words(tiny, kind, said):
  turns = [f"{'ua'[i % 2]}:{text}" for i, text in enumerate(said)]
  if len(turns) % 2:
    turns.append("a:the end")
  assert_law_1(chat(*turns), tiny[kind])


def test_the_whole_truth_of_a_small_row(tiny):
  one = tiny["byte_level"]
  (made,) = encode.encode(chat("u:the cat", "a:the dog"), one, max_length=99)
  start = one.special_tokens["<|im_start|>"]
  end = one.special_tokens["<|im_end|>"]
  prompt = [
    start,
    *one.encode("user\nthe cat"),
    end,
    *one.encode("\n"),
    start,
    *one.encode("assistant\n"),
  ]
  reply = one.encode("the dog")
  after = one.encode("\n")
  assert made.tokens.tolist() == [*prompt, *reply, end, *after]
  assert made.loss_weights.tolist() == (
    [0] * len(prompt) + [1] * (len(reply) + 1) + [0] * len(after)
  )


def test_a_stable_chat_is_one_example_and_a_rewritten_one_is_split(tiny):
  turns = ("u:the cat", "a:the dog", "u:a house", "a:the town")
  assert len(assert_law_1(chat(*turns), tiny["byte_level"])) == 1
  split = assert_law_1(chat(*turns), tiny["byte_level"], history="split")
  assert len(split) == 2
  thinking = chat(
    "u:the cat",
    Message("assistant", "the dog", reasoning="a cat"),
    "u:a house",
    Message("assistant", "the town", reasoning="a dog"),
  )
  assert len(assert_law_1(thinking, tiny["forgetful"])) == 2
  # Tokens that join prompt and reply cannot share one pass either.
  assert len(assert_law_1(chat(*turns), tiny["glued_metaspace"])) == 2
  with pytest.raises(RowError, match="a token that joins"):
    encode.encode(
      chat(*turns), tiny["glued_metaspace"], max_length=99, history="keep"
    )


def test_tool_traces_and_weights(tiny):
  call = Message("assistant", "", tool_calls=(ToolCall("look", {"b": 1}),))
  trace = Conversation(
    (
      Message("user", "the cat"),
      call,
      Message("tool", "the mat"),
      Message("assistant", "the house", weight=0.5),
    ),
    ({"name": "look"},),
  )
  (made,) = assert_law_1(trace, tiny["byte_level"])
  (first, second) = runs(made.loss_weights)
  assert set(made.loss_weights[slice(*first)]) == {1.0}
  assert set(made.loss_weights[slice(*second)]) == {0.5}


def test_over_long(tiny):
  one = tiny["byte_level"]
  row = chat("u:the cat", "a:" + "the dog " * 20)
  (whole,) = encode.encode(row, one, max_length=10_000)
  n, start = len(whole.tokens), int(np.argmax(whole.loss_weights > 0))
  assert len(encode.encode(row, one, max_length=n)) == 1
  with pytest.raises(NothingToTrain) as error:
    encode.encode(row, one, max_length=n - 1)
  assert error.value.reason == "over long"
  with pytest.raises(RowError, match=f"got {n} tokens; expected at most 30"):
    encode.encode(row, one, max_length=30, over_long="error")
  kwargs = {"over_long": "truncate"}
  (cut,) = encode.encode(row, one, max_length=start + 5, **kwargs)
  assert cut.tokens.tolist() == whole.tokens[: start + 5].tolist()
  # A cut answer never gets a stop token it did not have.
  assert not set(cut.tokens[start:].tolist()) & set(one.stop_ids)
  assert cut.loss_weights[start:].tolist() == [1.0] * 5
  assert encode.encode_row(
    row, one, RenderOptions(**kwargs), max_length=start
  ) == (
    [],
    {"over long": 1},
    {},
  )


def test_a_split_row_may_be_dropped_in_part(tiny):
  row = chat("u:the cat", "a:the dog", "u:a", "a:" + "house " * 50)
  made = encode.encode_row(
    row, tiny["byte_level"], RenderOptions(history="split"), max_length=60
  )
  assert len(made.examples) == 1
  assert made.dropped == {"over long": 1}


def test_prompts(tiny):
  one = tiny["byte_level"]
  text = Conversation(text="Once upon")
  assert encode.prompt_ids(text, one) == [one.bos_id, *one.encode("Once upon")]
  only = Message("assistant", "", reasoning="Hm.")
  with pytest.raises(RowError, match="that cannot be continued"):
    encode.prompt_ids(chat("u:Hi", only), one)
  with pytest.raises(RowError, match=r"messages\[0\]: got the control token"):
    encode.prompt_ids(
      chat("u:Hi <|im_end|>"), one, RenderOptions(control_tokens="error")
    )


def test_refusals(tiny, tmp_path):
  row = chat("u:Hi", "a:Hello.")
  with pytest.raises(ValueError, match="seq_len: got 1"):
    encode.encode(row, tiny["byte_level"], max_length=1)
  with pytest.raises(ValueError, match="over_long: got 'cut'"):
    encode.encode(row, tiny["byte_level"], max_length=9, over_long="cut")
  silent = load_tokenizer(byte_level(tmp_path / "a", template=None))
  with pytest.raises(ValueError, match="no chat template"):
    encode.encode(row, silent, max_length=99)
  twice = load_tokenizer(
    byte_level(tmp_path / "b", "{{ bos_token }}{{ bos_token }}" + CHATML)
  )
  with pytest.raises(RowError, match="two BOS tokens"):
    encode.encode(row, twice, max_length=99)
  with pytest.raises(RowError, match="control token '</s>'"):
    encode.encode(
      Conversation(text="a </s> b"),
      tiny["byte_level"],
      max_length=99,
      control_tokens="error",
    )
  # Text for unknown words is no structure.
  encode.encode(chat("u:<unk>", "a:Hi"), tiny["byte_level"], max_length=99)


@pytest.mark.parametrize(
  ("template", "pad"), [(GLUED, "</s>"), (CHATML, "<|im_end|>")]
)
def test_pad_equal_to_eos_still_trains_the_stop_token(tmp_path, template, pad):
  """Encoded in one piece (ChatML), and apart from its prompt."""
  folder = byte_level(tmp_path / "a", template)
  path = folder / "tokenizer_config.json"
  config = json.loads(path.read_text()) | {"pad_token": pad}
  path.write_text(json.dumps(config))
  one = load_tokenizer(folder)
  (made,) = encode.encode(chat("u:Hi", "a:Hello."), one, max_length=99)
  assert one.pad_id == one.special_tokens[pad]
  last = np.flatnonzero(made.loss_weights)[-1]
  assert made.tokens[last] == one.pad_id
  assert made.loss_weights[last] == 1


STOPS = {
  "Qwen-Qwen2.5-7B-Instruct": "<|im_end|>",
  "Qwen-Qwen3-0.6B": "<|im_end|>",
  "Qwen3.5-4B": "<|im_end|>",
  "meta-llama-Llama-3.1-8B-Instruct": "<|eot_id|>",
  "meta-llama-Llama-3.2-3B-Instruct": "<|eot_id|>",
  "google-gemma-2-2b-it": "<end_of_turn>",
  "microsoft-Phi-3.5-mini-instruct": "<|end|>",
  "mistralai-Mistral-Nemo-Instruct-2407": "</s>",
  "Mistral-Small-3.2-24B-Instruct-2506": "</s>",
  "deepseek-ai-DeepSeek-V3.1": "<｜end▁of▁sentence｜>",
  "ibm-granite-granite-3.3-2B-Instruct": "<|end_of_text|>",
  "HuggingFaceTB-SmolLM3-3B": "<|im_end|>",
  "Kimi-K2-Instruct": "<|im_end|>",
  "LFM2-8B-A1B": "<|im_end|>",
}
TOOLS = {
  "Qwen-Qwen2.5-7B-Instruct",
  "Qwen-Qwen3-0.6B",
  "Qwen3.5-4B",
  "meta-llama-Llama-3.1-8B-Instruct",
  "Mistral-Small-3.2-24B-Instruct-2506",
  "deepseek-ai-DeepSeek-V3.1",
}


class _Stopped(datetime.datetime):
  @classmethod
  def now(cls, tz=None):
    return cls(2026, 1, 31)


def _trace():
  schema = {
    "type": "function",
    "function": {
      "name": "look",
      "description": "Looks.",
      "parameters": {
        "type": "object",
        "properties": {"at": {"type": "string", "description": "What."}},
        "required": ["at"],
      },
    },
  }
  call = ToolCall("look", {"at": "the <cat> & ü"}, "abcdefghi")
  return Conversation(
    (
      Message("user", "Where is the cat?"),
      Message("assistant", "", tool_calls=(call,)),
      Message("tool", "the mat", name="look", tool_call_id="abcdefghi"),
      Message("assistant", "It is on the mat."),
    ),
    (schema,),
  )


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")
@pytest.mark.parametrize("name", STOPS)
def test_ids_equal_transformers(name, tmp_path, monkeypatch):
  """Ids of real templates against apply_chat_template, on real vocabulary."""
  transformers = pytest.importorskip("transformers")
  import tokenizers

  model = tokenizers.Tokenizer.from_file(
    str(SHARED / "tokenizers" / "mistral" / "tokenizer.json")
  )
  # As in the real vocabularies, what ends a prompt is a token of its own.
  model.add_special_tokens(
    [STOPS[name], "</think>", "[/INST]", "[/TOOL_RESULTS]"]
  )
  model.save(str(tmp_path / "tokenizer.json"))
  template = (SHARED / "chat_templates" / f"{name}.jinja").read_text()
  (tmp_path / "chat_template.jinja").write_text(template)
  (tmp_path / "generation_config.json").write_text(
    json.dumps({"eos_token_id": model.token_to_id(STOPS[name])})
  )
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
  )
  ours = load_tokenizer(tmp_path)
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(tmp_path / "tokenizer.json"),
    bos_token="<s>",
    eos_token="</s>",
    unk_token="<unk>",
    chat_template=template,
  )
  # Theirs reads the clock, so it is stopped on the day that is pinned.
  monkeypatch.setattr(
    transformers.utils.chat_template_utils, "datetime", _Stopped
  )
  kwargs = {"date": "2026-01-31"}

  def reference(messages, tools, prompt):
    return theirs.apply_chat_template(
      messages,
      tools=tools,
      add_generation_prompt=prompt,
      tokenize=True,
      return_dict=False,
    )

  rows = [chat("u:Hi ü", "a:Hello, <b>you</b>.", "u:Bye", "a:Good\n\nbye!")]
  if name in TOOLS:
    # DeepSeek's template shows calls, but no tools: those are refused.
    shows = "tools" in template
    rows += [_trace() if shows else Conversation(_trace().messages)]
  if "Qwen3" in name:
    rows += [
      chat(
        "u:Hi",
        Message("assistant", "Hello.", reasoning="A greeting."),
        "u:Bye",
        Message("assistant", "Goodbye.", reasoning="A farewell."),
      )
    ]
  for row in rows:
    plain = [{"role": m.role, "content": m.content} for m in row.messages]
    for one, message in zip(plain, row.messages, strict=True):
      if message.reasoning is not None:
        one["reasoning_content"] = message.reasoning
      if message.tool_calls:
        (call,) = message.tool_calls
        function = {"name": call.name, "arguments": call.arguments}
        one["tool_calls"] = [
          {"type": "function", "id": call.id, "function": function}
        ]
      if message.role == "tool":
        one |= {"name": message.name, "tool_call_id": message.tool_call_id}
    tools = list(row.tools) or None
    options = {"max_length": 10_000, "template_kwargs": kwargs}
    made = encode.encode(row, ours, **options, history="split")
    for index, one in zip((1, 3), made, strict=True):
      prompt = reference(plain[:index], tools, True)
      full = reference(plain[: index + 1], tools, False)
      ((start, end),) = runs(one.loss_weights)
      assert one.tokens[:start].tolist() == prompt
      so_far = Conversation(row.messages[:index], row.tools)
      assert prompt == encode.prompt_ids(so_far, ours, RenderOptions(kwargs))
      assert one.tokens.tolist() == full
      assert one.tokens[end - 1] in ours.stop_ids
    whole = encode.encode(row, ours, **options)
    if len(whole) == 1:
      assert whole[0].tokens.tolist() == full


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")
def test_the_real_model_on_real_rows():
  one = load_tokenizer(SHARED / "pretrained" / "stories260k_hf")
  rows = files.read_rows(SHARED / "instruction" / "alpaca_5000.json")
  for _, (where, row) in zip(range(40), rows, strict=False):
    assert_law_1(formats.to_conversation(row, source=where), one)
  turns = ("u:Hi", "a:Once upon a time", "u:And then?", "a:The end.")
  assert len(assert_law_1(chat(*turns), one)) == 2


def said(example, tokenizer):
  """[(part, text)] of the runs of one part."""
  runs = itertools.groupby(
    zip(example.roles.tolist(), example.tokens.tolist(), strict=True),
    key=lambda pair: pair[0],
  )
  return [
    (
      TOKEN_ROLES[part],
      tokenizer.decode([number for _, number in run], skip_special=False),
    )
    for part, run in runs
  ]


def test_who_says_each_token(tiny):
  one = tiny["byte_level"]
  call = ToolCall("look", {"at": "the cat"})
  row = Conversation(
    (
      Message("system", "the cat"),
      Message("user", " the cat\n"),
      Message("assistant", "the dog", "a house", (call,)),
      Message("tool", "the cat"),
      Message("assistant", "the dog"),
    ),
    ({"name": "look"},),
  )
  (made,) = encode.encode(row, one, max_length=999)
  assert made.roles.dtype == np.uint8
  told = [(part, text.strip()) for part, text in said(made, one)]
  assert [pair for pair in told if pair[0] != "template"] == [
    ("system", "the cat"),
    ("user", "the cat"),
    ("reasoning", "a house"),
    ("answer", "the dog"),
    ("tool_call", '<call>look {"at": "the cat"}</call>'),
    ("stop", "<|im_end|>"),
    ("tool", "the cat"),
    ("answer", "the dog"),
    ("stop", "<|im_end|>"),
  ]
  # A text of its own: all of it is text.
  (text,) = encode.encode(Conversation(text="the cat"), one, max_length=99)
  assert said(text, one) == [
    ("template", "<s>"),
    ("text", "the cat"),
    ("stop", "</s>"),
  ]


@settings(max_examples=15, deadline=None)
@given(said_=st.lists(words, min_size=2, max_size=4))
@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece", "forgetful"])
def test_parts_hold_what_is_said(tiny, kind, said_):
  one = tiny[kind]
  turns = [f"{'ua'[i % 2]}:{text}" for i, text in enumerate(said_)]
  row = chat(*turns, *(["a:the end"] if len(turns) % 2 else []))
  for made in encode.encode(row, one, max_length=10_000):
    told = [(part, text.strip()) for part, text in said(made, one)]
    want = [
      (part, message.content.strip())
      for message in row.messages
      for part in ("user" if message.role == "user" else "answer",)
      if message.content.strip()
    ]
    assert [p for p in told if p[0] in ("user", "answer")] == want


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
  assert {TOKEN_ROLES[part] for part in made.roles} == {"text"}
  assert encode.prompt_ids(row, one) == [5, 6, 7]


def test_ids_that_cannot_be_this_tokenizers(tmp_path):
  one = load_tokenizer(byte_level(tmp_path))
  size = one.vocab_size
  for ids, weights, fault, said in (
    ((5, size), (0.0, 1.0), RowError, f"the id {size}; expected ids from 0"),
    ((5, 6), (0.0, -1.0), RowError, "below 0 or not finite"),
    ((5, 6), (0.0, float("nan")), RowError, "below 0 or not finite"),
    # Nothing is before the first to predict it from.
    ((5, 6), (1.0, 0.0), NothingToTrain, "no trained token"),
  ):
    row = Conversation(ids=ids, id_weights=weights)
    with pytest.raises(fault, match=said):
      encode.encode(row, one, max_length=9)


def test_merging_for_a_template_that_refuses(tmp_path):
  strict = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}"
  )
  tokenizer = load_tokenizer(byte_level(tmp_path, strict + CHATML))
  turns = ["s:Be.", "u:Hi", "a:Hello."]
  with pytest.raises(RowError, match="System role not supported"):
    encode.encode(chat(*turns), tokenizer, max_length=99)
  rows = [chat(*turns), chat("u:Be.\n\nHi", "a:Hello.")]
  options = RenderOptions(merge="system")
  a, b = encode.encode_rows(rows, tokenizer, options, max_length=99)
  assert a.notes == {"merged turns": 1}
  assert not b.notes
  np.testing.assert_array_equal(a.examples[0].tokens, b.examples[0].tokens)
  prompts = [chat(*turns[:2]), chat("u:Be.\n\nHi")]
  ids = [encode.prompt_ids(one, tokenizer, options) for one in prompts]
  assert ids[0] == ids[1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_ids_of_calls_are_renamed_for_templates_that_demand_it(tmp_path):
  name = "mistralai-Mistral-Nemo-Instruct-2407.jinja"
  source = (SHARED / "chat_templates" / name).read_text()
  tokenizer = load_tokenizer(byte_level(tmp_path, source))
  calls = [ToolCall("f", {}, "call_1"), ToolCall("g", {}, "call_2")]
  turns = [
    Message("user", "Go"),
    Message("assistant", "", tool_calls=tuple(calls)),
    Message("tool", "B", tool_call_id="call_2"),
    Message("tool", "A", tool_call_id="call_1"),
    Message("assistant", "Done."),
  ]
  (row,) = encode.encode_rows(
    [chat(*turns)], tokenizer, RenderOptions(), max_length=999
  )
  assert row.notes == {"renamed ids of calls": 1}
  text = tokenizer.decode(row.examples[-1].tokens.tolist())
  ids = re.findall(r'"id": "(\w{9})"', text)
  assert re.findall(r'"call_id": "(\w{9})"', text) == ids[::-1]


@pytest.mark.parametrize(
  ("text", "notes"),
  [
    ("<s>the cat", {"BOS or stop token written in a text"}),
    ("the cat</s>", {"BOS or stop token written in a text"}),
    ("<s>the cat</s>", {"BOS or stop token written in a text"}),
    (
      "<s>the </s> cat",
      {"BOS or stop token written in a text", "escaped control token"},
    ),
  ],
)
def test_a_text_has_one_bos_and_one_stop(tiny, text, notes):
  one = tiny["byte_level"]
  row = Conversation(text=text, source="rows.jsonl:3")
  made = encode.encode_row(row, one, RenderOptions(), max_length=99)
  (example,) = made.examples
  ids = example.tokens.tolist()
  assert (ids[0], ids[-1]) == (one.bos_id, one.eos_id)
  assert not {*ids[1:-1]} & {one.bos_id, one.eos_id}
  assert {*made.notes} == notes
  # Inference sees one BOS, too.
  ids = encode.prompt_ids(row, one)
  assert ids[0] == one.bos_id != ids[1]


def test_a_stop_token_written_in_an_answer_is_noted(tiny):
  row = chat("u:Hi", "a:Hello.</s>")
  made = encode.encode_row(
    row, tiny["byte_level"], RenderOptions(), max_length=99
  )
  assert made.notes["stop token written in an answer"] == 1


def test_a_prompt_that_is_rendered_already_is_refused(tiny):
  prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
  row = chat(f"u:{prompt}", "a:Hello.<|im_end|>")
  with pytest.raises(RowError, match="rendered prompt, which ends with"):
    encode.encode_row(row, tiny["byte_level"], RenderOptions(), max_length=99)
  (made,) = encode.encode_rows(
    [row], tiny["byte_level"], RenderOptions(), max_length=99
  )
  assert isinstance(made, RowError)


@pytest.mark.parametrize("said", ["\u200b", "\xa0\ufeff ", "\u00ad\n"])
def test_an_answer_that_shows_nothing_is_empty(said):
  row = {"prompt": "Hi", "completion": said}
  with pytest.raises(NothingToTrain, match="empty answer"):
    formats.to_conversation(row)
