"""Turns in every spelling are the same turns."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.mark.parametrize(
  ("said", "reasoning"),
  [
    ({"reasoning_content": [{"type": "text", "text": "Hm."}]}, "Hm."),
    ({"reasoning_details": {"type": "reasoning.text", "text": "Hm."}}, "Hm."),
    (
      {
        "reasoning": "Hm. So.",
        "reasoning_details": [
          {"type": "reasoning.text", "text": "Hm."},
          {"type": "reasoning.text", "text": " So."},
        ],
      },
      "Hm. So.",
    ),
    (
      {
        "content": [
          {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
          {"type": "text", "text": "Yes."},
        ]
      },
      "Hm.",
    ),
  ],
)
def test_reasoning_in_parts(said, reasoning):
  made = messages(USER, {"role": "assistant", "content": "Yes."} | said)
  assert made[1] == Message("assistant", "Yes.", reasoning)


def test_harmonys_analysis_is_reasoning():
  made = messages(
    USER,
    {"role": "assistant", "channel": "analysis", "content": "Hm."},
    {"role": "assistant", "channel": "final", "content": "Yes."},
  )
  assert made[1:] == (Message("assistant", "Yes.", "Hm."),)


def test_refusals_data_of_tools_and_roles_with_space():
  made = messages(
    {"role": " User ", "content": {"type": "text", "text": "Hi"}},
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "content": [1, {"a": 2}]},
    {"role": "assistant", "content": None, "refusal": "No."},
  )
  assert [one.content for one in made] == ["Hi", "", '[1, {"a": 2}]', "No."]


@pytest.mark.parametrize("written", ["None", "{}", " ", "null"])
def test_tools_that_are_none(written):
  assert not to_conversation({"messages": [USER], "tools": written}).tools


def test_tools_as_texts_and_without_a_name():
  row = {"messages": [USER], "tools": ['{"name": "f"}']}
  assert to_conversation(row).tools == ({"name": "f"},)
  with pytest.raises(RowError, match="each with the name of its function"):
    to_conversation({"messages": [USER], "tools": {"f": {}}})


def test_a_call_after_thinking():
  value = "<think>\nHm.\n</think>\n\n" + json.dumps(CALLS[0])
  made = messages(USER, {"from": "function_call", "value": value})[1]
  assert (made.reasoning, made.content) == ("Hm.", "")
  assert made.tool_calls[0].name == "f"


@pytest.mark.parametrize(
  ("call", "said"),
  [
    ({"name": "f", "arguments": {"x": 1}, "parameters": {}}, "and parameters"),
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
  for written in ([schema], json.dumps([schema])):
    row = {"messages": [USER], key: written}
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
    ({"spans": [], "train_detail": [{}]}, "spans and train_detail"),
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


THOUGHT = Message("assistant", "4", reasoning="Twos.")
CALL = {"name": "f", "arguments": {"x": 1}}
TRACE = [
  Message("user", "Go"),
  Message("assistant", "Now.", tool_calls=(ToolCall("f", {"x": 1}, "c"),)),
  Message("tool", "Done", tool_call_id="c"),
]


@pytest.mark.parametrize(
  "said",
  [
    # OpenRouter, which says it twice.
    {
      "content": "4",
      "reasoning": "Twos.",
      "reasoning_details": [
        {"type": "reasoning.text", "text": "Twos.", "signature": "s"}
      ],
    },
    {"content": "4", "reasoning_details": [
      {"type": "reasoning.summary", "summary": "Twos."},
      {"type": "reasoning.encrypted", "data": "x"},
    ]},
    # DeepSeek, vLLM, Qwen.
    {"content": "4", "reasoning_content": "Twos.", "reasoning": "Twos."},
    {"content": "<think>\nTwos.\n</think>\n\n4"},
    {"content": [{"text": "4"}], "thinking": "Twos."},
    # Anthropic.
    {"content": [
      {"type": "thinking", "thinking": "Twos.", "signature": "s"},
      {"type": "text", "text": "4"},
    ]},
    # Gemini.
    {"role": "model", "parts": [
      {"text": "Twos.", "thought": True}, {"text": "4"}]},
    # OpenAI's responses.
    {"content": [{"type": "output_text", "text": "4", "annotations": []}],
     "reasoning": "Twos."},
  ],
)  # fmt: skip
def test_reasoning_of_every_vendor(said):
  made = to_conversation({"messages": [USER, {"role": "assistant", **said}]})
  assert made.messages[1] == THOUGHT
  encrypted = "reasoning.encrypted" in json.dumps(said)
  expected = ("field not read: reasoning.encrypted",) if encrypted else ()
  assert made.notes == expected


@pytest.mark.parametrize(
  "items",
  [
    # Anthropic.
    [
      {"role": "assistant", "content": [
        {"type": "text", "text": "Now."},
        {"type": "tool_use", "id": "c", "name": "f", "input": {"x": 1}},
      ]},
      {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "c", "content": [
          {"type": "text", "text": "Done"},
        ]},
      ]},
    ],
    # OpenAI's responses.
    [
      {"type": "reasoning", "summary": [], "encrypted_content": "x"},
      {"type": "message", "role": "assistant", "content": [
        {"type": "output_text", "text": "Now."}]},
      {"type": "function_call", "call_id": "c", "name": "f",
       "arguments": '{"x": 1}'},
      {"type": "function_call_output", "call_id": "c", "output": "Done"},
    ],
  ],
)  # fmt: skip
def test_calls_of_every_vendor(items):
  assert list(messages(USER, *items)) == TRACE


def test_calls_of_gemini_and_hermes():
  contents = [
    {"role": "user", "parts": [{"text": "Go"}]},
    {"role": "model", "parts": [
      {"functionCall": {"name": "f", "args": {"x": 1}}}]},
    {"role": "user", "parts": [
      {"functionResponse": {"name": "f", "response": {"ok": True}}}]},
  ]  # fmt: skip
  row = {
    "contents": contents,
    "systemInstruction": {"parts": [{"text": "Be."}]},
  }
  row["tools"] = [{"functionDeclarations": [{"name": "f"}, {"name": "g"}]}]
  made = to_conversation(row)
  call = Message("assistant", "", tool_calls=(ToolCall("f", {"x": 1}),))
  assert list(made.messages) == [
    *(Message("system", "Be."), Message("user", "Go"), call),
    Message("tool", '{"ok": true}', name="f"),
  ]
  assert made.tools == ({"name": "f"}, {"name": "g"})
  text = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
  answer = "<tool_response>\n21\n</tool_response>"
  said = {"role": "assistant", "content": "Now.\n" + text + "\n"}
  made = to_conversation(
    {"messages": [USER, said, {"role": "tool", "content": answer * 2}]}
  )
  call = Message("assistant", "Now.", tool_calls=(ToolCall("f", {"x": 1}),))
  assert made.messages[1:] == (call, *[Message("tool", "21")] * 2)
  assert made.notes == ("tool calls read from <tool_call> text",)
  # Without an answer of a tool it is text, as it is written.
  assert messages(USER, said)[1].content == said["content"]


@pytest.mark.parametrize(
  ("row", "expected"),
  [
    ({"role": "User", "content": "Go"}, Message("user", "Go")),
    ({"from": "HUMAN", "value": "Go"}, Message("user", "Go")),
    (
      {"role": "user", "content": [{"type": "input_text", "text": "Go"}]},
      Message("user", "Go"),
    ),
  ],
)
def test_harmless_spellings(row, expected):
  assert messages(row, tools="null", chat_template_kwargs={"a": None}) == (
    expected,
  )
  assert to_conversation({"messages": [row], "tools": CALL}).tools == (CALL,)


@pytest.mark.parametrize(
  ("content", "text"),
  [({"t": 21, "é": None}, '{"t": 21, "é": null}'), (2, "2")],
)
def test_results_of_tools_that_are_no_text(content, text):
  said = {"role": "assistant", "tool_calls": CALLS}
  made = messages(USER, said, {"role": "tool", "content": content})
  assert made[2] == Message("tool", text)


@pytest.mark.parametrize(
  "content",
  [
    [{"type": "text", "text": "4"}, {"type": "thinking", "thinking": "T"}],
    [{"type": "tool_use", "name": "f"}, {"type": "text", "text": "4"}],
    [{"text": "4", "image": "cat.png"}],
    [{"type": "text", "text": "4"}, "5"],
  ],
)
def test_parts_whose_order_or_kind_would_be_lost(content):
  with pytest.raises(RowError, match="a content part"):
    messages(USER, {"role": "assistant", "content": content})


WORD = "quartz"
held = st.sampled_from([WORD, [WORD], {"a": [{"b": WORD}]}])
keys = st.text("abcdefgh_", min_size=1, max_size=8) | st.sampled_from(
  ["reasoning_details", "thoughts", "summary", "output", "parts", "analysis"]
)


@given(key=keys, value=held, of_row=st.booleans())
def test_no_text_of_the_assistant_is_left_out_unnamed(key, value, of_row):
  said = {"role": "assistant", "content": "4"}
  row = {"messages": [USER, said | ({} if of_row else {key: value})]}
  row |= {key: value} if of_row else {}
  try:
    made = to_conversation(row)
  except RowError:
    return
  assert WORD in str(made.messages) or f"field not read: {key}" in made.notes
