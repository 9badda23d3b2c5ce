"""Prompts and turns of a conversation, and what it must not say."""

import pytest

from sft_jax.data.chat import template as templates
from sft_jax.data.chat.options import DEFAULT, RenderOptions
from sft_jax.data.chat.renderer import (
  ConversationRenderer,
  refuse_control_tokens,
)
from sft_jax.data.conversation import Conversation, Message, RowError, ToolCall
from tiny_rows import TRACE
from tiny_tokenizers import CHATML, GLUED


def test_a_template_speaks_for_itself():
  template = templates.ChatTemplate(
    "{{ raise_exception('Not these ' ~ tools) }}"
  )
  with pytest.raises(RowError, match=r"rows.jsonl:3 messages\[2\].*Not these"):
    ConversationRenderer(TRACE, template, DEFAULT).prompt(3)


def test_tools_are_not_dropped_in_silence():
  template = templates.ChatTemplate(GLUED, {"bos_token": "<s>"})
  with pytest.raises(RowError, match=r"rows.jsonl:3 tools: got 1 tools"):
    ConversationRenderer(TRACE, template, DEFAULT).prompt(3)


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
    refuse_control_tokens(
      Conversation(**fields), template, RenderOptions(control_tokens="error")
    )


def test_half_a_character_is_refused():
  row = Conversation((Message("user", "a \ud83d b"),), source="rows.jsonl:3")
  template = templates.ChatTemplate(CHATML)
  with pytest.raises(
    RowError, match=r"rows.jsonl:3: got half a surrogate pair"
  ):
    ConversationRenderer(row, template, DEFAULT).prompt(1)
