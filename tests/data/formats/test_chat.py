"""Turns in every spelling are the same turns."""

import json

import pytest

from sft_jax.data.conversation import Message, RowError, ToolCall
from sft_jax.data.formats.formats import to_conversation

USER = {"role": "user", "content": "Go"}


def messages(*items, **row):
  return to_conversation({"messages": list(items), **row}).messages


@pytest.mark.parametrize("speaker", ["role", "from"])
@pytest.mark.parametrize("saying", ["content", "value"])
@pytest.mark.parametrize("key", ["messages", "conversations", "conversation"])
def test_keys_mix(speaker, saying, key):
  row = {
    key: [
      {speaker: "system", saying: "Be."},
      {speaker: "human", saying: "Hi"},
      {speaker: "gpt", saying: "Hello."},
    ]
  }
  made = to_conversation(row).messages
  assert [(one.role, one.content) for one in made] == [
    ("system", "Be."),
    ("user", "Hi"),
    ("assistant", "Hello."),
  ]


@pytest.mark.parametrize(
  ("role", "expected"),
  [("developer", "system"), ("model", "assistant"), ("human", "user")],
)
def test_roles_by_other_names(role, expected):
  assert messages({"role": role, "content": "x"})[0].role == expected


CALLS = [{"name": "f", "arguments": {"b": 1, "a": None}}]


@pytest.mark.parametrize(
  "said",
  [
    {"role": "assistant", "tool_calls": CALLS},
    {"role": "assistant", "tool_calls": json.dumps(CALLS)},
    {"role": "assistant", "tool_calls": [{"function": CALLS[0]}]},
    {"role": "assistant", "function_call": CALLS[0], "content": None},
    {"role": "function_call", "content": json.dumps(CALLS[0])},
    {"from": "function_call", "value": json.dumps(CALLS)},
    {"from": "tool_call", "value": json.dumps(CALLS)},
    {
      "role": "assistant",
      "tool_calls": [{"name": "f", "parameters": {"b": 1, "a": None}}],
    },
  ],
)
@pytest.mark.parametrize("role", ["tool", "function", "observation", "ipython"])
def test_calls_in_every_spelling(said, role):
  made = messages(USER, said, {"role": role, "name": "f", "content": "Done"})
  assert made[1] == Message("assistant", "", tool_calls=made[1].tool_calls)
  assert made[1].tool_calls == (ToolCall("f", {"b": 1, "a": None}),)
  # A null that was written in JSON is kept, and so is the order of keys.
  assert list(made[1].tool_calls[0].arguments) == ["b", "a"]
  assert made[2] == Message("tool", "Done", name="f")


def test_a_call_after_thinking():
  value = "<think>\nHm.\n</think>\n\n" + json.dumps(CALLS[0])
  made = messages(USER, {"from": "function_call", "value": value})[1]
  assert (made.reasoning, made.content) == ("Hm.", "")
  assert made.tool_calls[0].name == "f"


@pytest.mark.parametrize(
  ("call", "said"),
  [
    ({"name": "f", "arguments": {}, "parameters": {}}, "and parameters"),
    ({"arguments": {}}, "a tool call"),
    ("f()", "expecting value"),
    ({"name": "f", "arguments": {"x": float("nan")}}, "JSON cannot hold"),
    ({"name": "f", "arguments": {"x": b"1"}}, "JSON cannot hold"),
    ({"name": "f", "arguments": {"x": "\ud83d"}}, "JSON cannot hold"),
    ({"name": "f\ud83d"}, "JSON cannot hold"),
    ({"name": "f", "arguments": 0}, "arguments of type int"),
  ],
)
def test_bad_calls(call, said):
  with pytest.raises(RowError, match=said):
    messages(USER, {"role": "assistant", "tool_calls": call})


def test_old_and_new_calls_in_one_turn():
  with pytest.raises(RowError, match="tool_calls and function_call"):
    messages(
      USER,
      {"role": "assistant", "tool_calls": CALLS, "function_call": CALLS[0]},
    )


@pytest.mark.parametrize("key", ["tools", "functions"])
def test_schemas_stay_as_written(key):
  schema = {"name": "f", "parameters": {"b": {"default": None}, "a": {}}}
  for given in ([schema], json.dumps([schema])):
    row = {"messages": [USER], key: given}
    assert json.dumps(to_conversation(row).tools) == json.dumps([schema])


@pytest.mark.parametrize(
  ("fields", "spans", "content"),
  [
    ({"spans": [[0, 5], [7, 9]]}, ((0, 5), (7, 9)), "Hello, my friend"),
    ({"spans": []}, (), "Hello, my friend"),
    (
      {
        "train_detail": [
          {"begin_offset": 7, "end_offset": 8, "train": True},
          {"begin_offset": 0, "end_offset": 4, "train": True},
          {"begin_offset": 5, "end_offset": 6, "train": False},
        ]
      },
      ((0, 5), (7, 9)),
      "Hello, my friend",
    ),
    # They count from the start of what was written, thinking included.
    ({"spans": [[18, 23]]}, ((0, 5),), "<think>H.</think>\nHello, my friend"),
  ],
)
def test_spans(fields, spans, content):
  made = messages(USER, {"role": "assistant", "content": content, **fields})[1]
  assert made.spans == spans
  assert made.content == "Hello, my friend"


def test_the_last_character_of_axolotls_details_is_within():
  text = "Sum: 4. Product: 4."
  detail = [
    {"begin_offset": 0, "end_offset": 4, "train": False},
    {"begin_offset": 5, "end_offset": 6, "train": True},
    {"begin_offset": 7, "end_offset": 18, "train": False},
  ]
  said = {"from": "assistant", "value": text, "train_detail": detail}
  ((start, end),) = messages(USER, said)[1].spans
  assert text[start:end] == "4."
  assert detail[-1]["end_offset"] == len(text) - 1


@pytest.mark.parametrize(
  ("fields", "said"),
  [
    ({"spans": [[0, 6]]}, "the trained span"),
    ({"spans": [[0, 2], [1, 3]]}, "the trained span"),
    ({"spans": [[0]]}, r"spans \[1 items\]"),
    ({"spans": [[0, True]]}, "spans"),
    ({"spans": "all"}, "spans 'all'"),
    ({"train_detail": [{"begin_offset": 0}]}, "train_detail"),
    ({"spans": [], "train_detail": []}, "spans and train_detail"),
  ],
)
def test_bad_spans(fields, said):
  with pytest.raises(RowError, match=said):
    messages(USER, {"role": "assistant", "content": "Hello", **fields})


def test_untrained_details_of_a_user_are_nothing():
  detail = [{"begin_offset": 0, "end_offset": 1, "train": False}]
  assert messages({**USER, "train_detail": detail})[0].spans is None


@pytest.mark.parametrize(
  "item",
  [
    {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
    {"role": "user", "content": "<image>What?", "images": ["cat.png"]},
  ],
)
def test_pictures_are_refused_by_name(item):
  with pytest.raises(RowError, match="image"):
    messages(item)


@pytest.mark.parametrize("weight", [10**400, "1", [1], float("inf")])
def test_bad_weights(weight):
  with pytest.raises(RowError, match="weight"):
    messages(USER, {"role": "assistant", "content": "x", "weight": weight})
