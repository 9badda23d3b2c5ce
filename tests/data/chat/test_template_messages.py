"""Messages as the plain dicts that templates read."""

from sft_jax.data.chat import template_messages
from tiny_rows import TRACE


def test_plain_messages_leave_out_what_is_not_there():
  call = {
    "type": "function",
    "id": "id1",
    "function": {"name": "look", "arguments": {"b": 1, "a": "x"}},
  }
  assert template_messages.to_template_messages(TRACE) == [
    {"role": "user", "content": "Look."},
    {
      "role": "assistant",
      "content": "",
      "reasoning_content": "Hm.",
      "thinking": "Hm.",
      "tool_calls": [call],
    },
    {
      "role": "tool",
      "content": "A cat.",
      "name": "look",
      "tool_call_id": "id1",
    },
  ]


def test_reasoning_goes_into_content_where_a_template_reads_none():
  turn = template_messages.to_template_messages(
    TRACE, template_messages.Form(reasoning_field=False)
  )[1]
  assert turn["content"] == "<think>\nHm.\n</think>\n\n"
  assert "reasoning_content" not in turn


def test_calls_in_the_form_a_template_wants():
  form = template_messages.Form(arguments="json", empty_content=None)
  turn = template_messages.to_template_messages(TRACE, form)[1]
  assert turn["content"] is None
  (call,) = turn["tool_calls"]
  assert call["function"]["arguments"] == '{"b": 1, "a": "x"}'


def test_what_is_said_is_told_in_order():
  assert [
    pair for m in TRACE.messages for pair in template_messages.texts(m)
  ] == [
    ("user", "Look."),
    ("reasoning", "Hm."),
    ("answer", ""),
    ("tool_call", "look"),
    ("tool_call", "x"),
    ("tool", "A cat."),
  ]
