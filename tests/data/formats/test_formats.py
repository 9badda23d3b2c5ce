"""Rows of every format become the Conversation they mean, or are refused."""

import collections
import json
import re

import pytest

from sft_jax.data.conversation import (
  Conversation,
  Message,
  NothingToTrain,
  RowError,
  ToolCall,
)
from sft_jax.data.formats import formats
from sft_jax.data.readers import files
from tiny_tokenizers import SHARED

needs_shared = pytest.mark.skipif(
  not SHARED.is_dir(), reason="needs the shared data folder"
)


def turns(row, **kwargs):
  made = formats.to_conversation(row, **kwargs)
  return [(one.role, one.content) for one in made.messages]


QUESTION = [("user", "2 + 2?"), ("assistant", "4")]


@pytest.mark.parametrize(
  "row",
  [
    {"instruction": "2 + 2?", "input": "", "output": "4"},
    {"instruction": "2 + 2?", "response": "4"},
    {"instruction": "2 + 2?", "output": "4", "response": None},
    {"prompt": "2 + 2?", "completion": "4", "id": 3},
    {"question": "2 + 2?", "answer": "4"},
    {"query": "2 + 2?", "response": "4"},
    {"question": "2 + 2?", "query": "2 + 2?", "response": "4"},
    {
      "messages": [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": [{"type": "text", "text": "4"}]},
      ]
    },
    {
      "conversations": [
        {"from": "human", "value": "2 + 2?"},
        {"from": "gpt", "value": "4"},
      ]
    },
  ],
)
def test_one_question_in_every_format(row):
  assert turns(row) == QUESTION


def test_alpaca_joins_instruction_and_input():
  row = {"instruction": "Add.", "input": "2 2", "output": "4", "system": "Be."}
  assert turns(row) == [
    ("system", "Be."),
    ("user", "Add.\n\n2 2"),
    ("assistant", "4"),
  ]


def test_raw_text():
  made = formats.to_conversation({"text": "Once.\n"}, source="a.txt")
  assert made == Conversation(text="Once.\n", source="a.txt")


@pytest.mark.parametrize("answer", ["", " \n", None])
@pytest.mark.parametrize(
  "keys", [("instruction", "output"), ("prompt", "completion")]
)
def test_an_empty_answer_is_nothing_to_train(keys, answer):
  with pytest.raises(NothingToTrain) as error:
    formats.to_conversation(dict(zip(keys, ["Add.", answer], strict=True)))
  assert error.value.reason == "empty answer"


@pytest.mark.parametrize(
  ("row", "said"),
  [
    ({"instruction": "Add."}, r"exactly one of output, response"),
    ({"instruction": "Add.", "outputs": "4"}, "exactly one of output"),
    ({"instruction": "A", "output": "4", "response": "5"}, "exactly one of"),
    ({"instruction": "", "output": "4"}, "an empty question"),
    ({"instruction": "A", "output": 4}, "output of type int"),
    ({"instruction": "A", "output": "4", "history": [["a"]]}, r"history\[0\]"),
    (
      {"instruction": "A", "output": "4", "history": "a"},
      "history of type str",
    ),
    ({"input_ids": [1], "labels": [1], "text": "A"}, "text and tokens"),
    # Half a question would be asked.
    ({"prompt": "A", "query": "B", "response": "4"}, "prompt and query"),
    ({"foo": 1, "bar": 2}, "{'foo': 1, 'bar': 2}, which fits no known"),
    ({"prompt": {"text": "x"}}, "no known format"),
    ({"messages": []}, "no messages"),
    ({"messages": "Hi"}, "messages of type str"),
    ({"messages": ["Hi"]}, r"messages\[0\]: got type str"),
    ({"messages": [{"role": "bot", "content": "Hi"}]}, "role 'bot'"),
    ({"messages": [{"role": "user", "content": 3}]}, "content of type int"),
    (
      {
        "messages": [
          {"role": "user", "content": "Hi"},
          {"role": "assistant", "content": None},
        ]
      },
      r"messages\[1\]: got an empty assistant turn",
    ),
    (
      {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
      "a content part",
    ),
    ({"conversations": [{"from": "x", "value": "Hi"}]}, "role 'x'"),
    ({"messages": [{"content": "Hi"}]}, "exactly one of role, from"),
    ({"messages": [{"role": "user", "content": "a\0b"}]}, "NUL at 1"),
    ({"messages": [{"role": "user", "content": "\ud83d"}]}, "half a surrogate"),
    ({"text": "x\0"}, "NUL at 1"),
    (
      {"prompt": "A", "completion": "4", "images": ["cat.png"]},
      r"images \[1 items\]",
    ),
    (
      {"prompt": "A", "completion": "4", "chat_template_kwargs": {"a": 1}},
      "chat_template_kwargs",
    ),
  ],
)
def test_refusals(row, said):
  with pytest.raises(RowError, match=said):
    formats.to_conversation(row)


def test_a_named_format_settles_ambiguity():
  row = {"instruction": "2 + 2?", "output": "4", "text": "2 + 2? 4"}
  assert turns(row, format="alpaca") == QUESTION
  assert formats.to_conversation(row, format="text").text == "2 + 2? 4"
  with pytest.raises(ValueError, match="format: got 'xml'"):
    formats.to_conversation(row, format="xml")


def test_tool_calls_of_every_spelling_are_one():
  # Keys are out of order, so that sorting anywhere would show.
  arguments = {"b": 1, "a": {"z": None, "y": [1.5, "ü"]}}
  text = json.dumps(arguments)
  calls = [
    {"type": "function", "function": {"name": "f", "arguments": arguments}},
    {"function": {"name": "f", "arguments": text}},
    {"name": "f", "arguments": arguments},
    {"name": "f", "arguments": text},
  ]
  schema = {"name": "f", "parameters": {"b": {}, "a": {}}}
  for call in calls:
    for tools in ([schema], json.dumps([schema])):
      row = {
        "messages": [
          {"role": "user", "content": "Go"},
          {"role": "assistant", "content": None, "tool_calls": [call]},
          {"role": "tool", "content": "Done", "name": "f"},
        ],
        "tools": tools,
      }
      made = formats.to_conversation(row)
      (got,) = made.messages[1].tool_calls
      assert got == ToolCall("f", arguments)
      assert json.dumps(got.arguments) == text
      assert json.dumps(made.tools[0]) == json.dumps(schema)


@pytest.mark.parametrize("arguments", ['{"a": 1', "[1]", [1], 3])
def test_bad_arguments(arguments):
  call = {"name": "f", "arguments": arguments}
  row = {"messages": [{"role": "assistant", "tool_calls": [call]}]}
  with pytest.raises(RowError, match=r"messages\[0\]"):
    formats.to_conversation(row)


def test_sharegpt_tool_trace():
  row = {
    "conversations": [
      {"from": "human", "value": "Go"},
      {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
      {"from": "observation", "value": "Done"},
      {"from": "gpt", "value": "It is done."},
    ],
    "tools": '[{"name": "f"}]',
    "system": "Be.",
  }
  made = formats.to_conversation(row)
  assert [one.role for one in made.messages] == [
    "system",
    "user",
    "assistant",
    "tool",
    "assistant",
  ]
  assert made.messages[2].tool_calls == (ToolCall("f", {}),)
  assert made.tools == ({"name": "f"},)


@pytest.mark.parametrize(
  ("fields", "reasoning", "content"),
  [
    ({"content": "<think>\nTwos.\n</think>\n\n4"}, "Twos.", "4"),
    ({"content": "4", "reasoning_content": "Twos."}, "Twos.", "4"),
    ({"content": "4", "thinking": "Twos."}, "Twos.", "4"),
    ({"content": "<think>\n\n</think>\n\n4"}, "", "4"),
    ({"content": "4 <think>Twos.</think>"}, None, "4 <think>Twos.</think>"),
    ({"content": "<think>Twos."}, None, "<think>Twos."),
  ],
)
def test_reasoning(fields, reasoning, content):
  row = {"messages": [{"role": "assistant", **fields}]}
  (got,) = formats.to_conversation(row).messages
  assert got == Message("assistant", content, reasoning)


@pytest.mark.parametrize(
  ("fields", "weight"),
  [
    ({}, 1.0),
    ({"weight": 0}, 0.0),
    ({"train": False}, 0.0),
    ({"training": False}, 0.0),
    ({"train": True}, 1.0),
    ({"loss_weight": 0.25}, 0.25),
  ],
)
def test_message_weights(fields, weight):
  row = {"messages": [{"role": "assistant", "content": "4", **fields}]}
  assert formats.to_conversation(row).messages[0].loss_weight == weight
  fields = {"weight": 0.5, "train": True}
  row = {"messages": [{"role": "assistant", "content": "4", **fields}]}
  with pytest.raises(RowError, match="exactly one of"):
    formats.to_conversation(row)


def test_an_error_shows_the_row_and_the_choices():
  row = {"instruction": "2 + 2?\x1b[2J", "output": "4", "prompt": "x" * 10**5}
  with pytest.raises(RowError) as error:
    formats.to_conversation(row, source="rows.jsonl:3")
  said = str(error.value)
  assert said.startswith("rows.jsonl:3: got {'instruction': '2 + 2?\\x1b[2J', ")
  assert "which fits alpaca and prompt_completion" in said
  assert "output | response (alpaca); or prompt | question" in said
  assert len(said) < 500


@pytest.mark.parametrize("name", formats.FORMATS)
@pytest.mark.parametrize("row", [{}, {"other": 1}])
def test_a_named_format_without_its_keys_is_an_error(name, row):
  with pytest.raises(RowError, match=r"^row"):
    formats.to_conversation(row, format=name)


def test_a_rows_weight_is_that_of_its_answers():
  row = {
    "messages": [
      {"role": "user", "content": "Hi"},
      {"role": "assistant", "content": "Hello."},
      {"role": "user", "content": "2 + 2?"},
      {"role": "assistant", "content": "4", "weight": 2},
    ],
    "weight": 0.5,
  }
  made = formats.to_conversation(row).messages
  assert [one.loss_weight for one in made] == [0.0, 0.5, 0.0, 2.0]


def test_a_rejected_answer_is_not_trained():
  row = {"prompt": "2 + 2?", "completion": "5", "kto_tag": False}
  assert not formats.to_conversation(row).desirable
  assert turns({**row, "completion": "4", "kto_tag": True}) == QUESTION
  # A label may be of anything: it counts where the source says what it is.
  row = {"prompt": "2 + 2?", "completion": "4", "label": False}
  assert turns(row) == QUESTION
  made = formats.to_conversation(row)
  assert made.desirable
  (note,) = made.notes
  assert note.startswith("label not read")
  renamed = formats.to_conversation(row, columns={"label": "kto_tag"})
  assert not renamed.desirable


@pytest.mark.parametrize(
  ("row", "columns", "weight", "note"),
  [
    ({"weight": 0.5}, {}, 0.5, ""),
    ({"train": False}, {}, 0.0, ""),
    ({"weight": 70.5}, {}, 1.0, "weight not read"),
    ({"train": "ICE 1"}, {}, 1.0, "train not read"),
    ({"loss_weight": 70.5}, {}, 70.5, ""),
    ({"weight": 70.5}, {"weight": "loss_weight"}, 70.5, ""),
    ({"importance": 3}, {"importance": "weight"}, 3.0, ""),
  ],
)
def test_a_column_called_weight_is_one_within_0_and_1(
  row, columns, weight, note
):
  row = {"prompt": "2 + 2?", "completion": "4", **row}
  made = formats.to_conversation(row, columns=columns)
  assert made.messages[1].loss_weight == weight
  assert [one.startswith(note) for one in made.notes] == [True] * bool(note)


@pytest.mark.parametrize("weight", [1e39, 1e308, 1e-46, -1.0, float("nan")])
@pytest.mark.parametrize("of_row", [True, False])
def test_weights_that_float32_does_not_hold(weight, of_row):
  said = {"role": "assistant", "content": "4"}
  row = {"messages": [said], "loss_weight": weight}
  if not of_row:
    row = {"messages": [{**said, "weight": weight}]}
  with pytest.raises(RowError, match=f"a:7.*{re.escape(f'weight {weight}')}"):
    formats.to_conversation(row, source="a:7")


# Every file of the shared folder: rows, and those dropped, by reason.
LOADED = {
  "instruction/alpaca_5000.json": (5000, {"empty answer": 2}),
  "instruction/gpteacher_codegen.json": (4535, {}),
  "instruction/gpteacher_roleplay.json": (1923, {}),
  "instruction/gpteacher_toolformer.json": (7673, {}),
  "instruction/t0_sample.jsonl": (4000, {}),
  "llamafactory_demo/alpaca_en_demo.json": (999, {}),
  "llamafactory_demo/c4_demo.jsonl": (300, {}),
  "llamafactory_demo/glaive_toolcall_en_demo.json": (300, {}),
  "llamafactory_demo/identity.json": (91, {}),
  "llamafactory_demo/v1_sft_demo.jsonl": (500, {}),
  "llamafactory_demo/wiki_demo.txt": (1, {}),
  "multiturn/fastchat_dummy_conversation.json": (500, {}),
  "reasoning/gsm8k_train.jsonl": (7473, {}),
}
# Loaded when columns say what their columns mean.
RENAMED = {
  "reasoning/math_cot_100x8.jsonl": (
    {"solution": "answer", "response": "chains"},
    100,
  ),
  "tools/gorilla_openfunctions_v1_test.json": ({"model_answer": "answer"}, 112),
}
NO_CONVERSATIONS = {
  "llamafactory_demo/dataset_info.json": "column maps",
  "multiturn/oasst_en100_tree.jsonl": "trees: tools/convert_oasst.py",
  "tools/BFCL_v4_simple_java.json": "questions without answers",
  "tools/BFCL_v4_simple_javascript.json": "questions without answers",
  "tools/possible_answer/BFCL_v4_simple_java.json": "sets of answers",
  "tools/possible_answer/BFCL_v4_simple_javascript.json": "sets of answers",
  "tools/gorilla_openfunctions_v1_test.json": "needs columns",
  "reasoning/math_cot_100x8.jsonl": "an answer and eight responses",
  "tools/sgd_train_200.jsonl": "dialogue states: tools/convert_sgd.py",
  "tools/sgd_train_schema.json": "schemas of services",
}
FOLDERS = (
  "instruction",
  "reasoning",
  "multiturn",
  "tools",
  "llamafactory_demo",
)


@needs_shared
def test_every_shared_file_is_listed():
  files = {
    str(file.relative_to(SHARED))
    for folder in FOLDERS
    for file in (SHARED / folder).rglob("*")
    if file.is_file()
  }
  assert files == LOADED.keys() | NO_CONVERSATIONS.keys()


def load(name, **kwargs):
  made, dropped = 0, collections.Counter()
  for where, row in files.read_rows(SHARED / name):
    try:
      formats.to_conversation(row, source=where, **kwargs)
      made += 1
    except NothingToTrain as nothing:
      dropped[nothing.reason] += 1
  return made + dropped.total(), dict(dropped)


@needs_shared
@pytest.mark.parametrize("name", LOADED)
def test_every_shared_conversation_loads(name):
  assert load(name) == LOADED[name]


@needs_shared
@pytest.mark.parametrize("name", RENAMED)
def test_shared_files_under_other_names(name):
  columns, count = RENAMED[name]
  assert load(name, columns=columns) == (count, {})


@needs_shared
@pytest.mark.parametrize("name", NO_CONVERSATIONS)
def test_what_is_no_conversation_says_so(name):
  with pytest.raises(RowError):
    load(name)
