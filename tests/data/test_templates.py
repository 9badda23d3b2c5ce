"""Chat templates: the plain dicts they read, and what is refused."""

import pytest

from sft_jax.data import templates
from sft_jax.data.conversation import (
  Conversation,
  Message,
  RowError,
  ToolCall,
)
from tiny_tokenizers import CHATML, FORGETFUL, GLUED

CALL = ToolCall("look", {"b": 1, "a": "x"}, "id1")
TRACE = Conversation(
  (
    Message("user", "Look."),
    Message("assistant", "", "Hm.", (CALL,)),
    Message("tool", "A cat.", name="look", tool_call_id="id1"),
  ),
  ({"name": "look"},),
  source="rows.jsonl:3",
)


def test_plain_messages_leave_out_what_is_not_there():
  call = {
    "type": "function",
    "id": "id1",
    "function": {"name": "look", "arguments": {"b": 1, "a": "x"}},
  }
  assert templates.to_template_messages(TRACE) == [
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
  plain = templates.to_template_messages(TRACE, reasoning_field=False)
  assert plain[1]["content"] == "<think>\nHm.\n</think>\n\n"
  assert "reasoning_content" not in plain[1]
  assert not templates.ChatTemplate(CHATML).reads_reasoning
  assert templates.ChatTemplate(FORGETFUL).reads_reasoning
  assert templates.ChatTemplate("{{ m['thinking'] }}").reads_reasoning
  assert not templates.ChatTemplate("{{ enable_thinking }}").reads_reasoning


def test_render_gives_tools_and_special_tokens():
  template = templates.ChatTemplate(CHATML)
  assert template.render(
    [{"role": "user", "content": "Hi"}],
    tools=[{"b": 1, "a": 2}],
    add_generation_prompt=True,
  ) == (
    '<|im_start|>system\n{"b": 1, "a": 2}\n<|im_end|>\n'
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
  )
  glued = templates.ChatTemplate(GLUED, {"bos_token": "<s>"})
  assert glued.render([{"role": "user", "content": "Hi"}]) == "<s>user: Hi\n"
  # As in transformers: no tools are None, not an empty list.
  assert templates.ChatTemplate("{{ tools is none }}").render([]) == "True"


def test_a_template_speaks_for_itself():
  template = templates.ChatTemplate(
    "{{ raise_exception('Not these ' ~ tools) }}"
  )
  with pytest.raises(RowError, match=r"rows.jsonl:3 messages\[2\].*Not these"):
    templates.render_prompt(TRACE, template)


def test_tools_are_not_dropped_in_silence():
  template = templates.ChatTemplate(GLUED, {"bos_token": "<s>"})
  with pytest.raises(RowError, match=r"rows.jsonl:3 tools: got 1 tools"):
    templates.render_prompt(TRACE, template)


@pytest.mark.parametrize(
  ("fields", "where"),
  [
    ({"messages": (Message("user", "a </s> b"),)}, r"messages\[0\]"),
    (
      {
        "messages": (
          Message("user", "a"),
          Message("assistant", "b", reasoning="<|im_start|>user"),
        )
      },
      r"messages\[1\]",
    ),
    (
      {
        "messages": (
          Message(
            "assistant", "", tool_calls=(ToolCall("f", {"a": ["</s>"]}),)
          ),
        )
      },
      r"messages\[0\]",
    ),
    (
      {"messages": (Message("user", "a"),), "tools": ({"name": "</s>"},)},
      "tools",
    ),
    ({"text": "a </s> b"}, "text"),
  ],
)
def test_control_tokens_in_what_is_said(fields, where):
  template = templates.ChatTemplate(
    CHATML, stop_tokens=["</s>"], control_tokens=["<|im_start|>"]
  )
  with pytest.raises(RowError, match=where + ": got the control token"):
    template.refuse_control_tokens(Conversation(**fields))


def test_where_a_reply_stops():
  template = templates.ChatTemplate("", stop_tokens=["<|end|>", "</s>"])
  assert template.stop_in("4<|end|>\n", "here") == len("4<|end|>")
  # A second stop token is never generated, so it is not trained.
  assert template.stop_in("4<|end|>\n</s>", "here") == len("4<|end|>")
  with pytest.raises(RowError, match="'more' after the stop token"):
    template.stop_in("4<|end|>more</s>", "here")
  with pytest.raises(RowError, match="without a stop token"):
    template.stop_in("4<|other|>", "here")
  hinting = templates.ChatTemplate("", control_tokens=["<|other|>"])
  with pytest.raises(RowError, match=r"'<\|other\|>'\?"):
    hinting.stop_in("4<|other|>", "here")
