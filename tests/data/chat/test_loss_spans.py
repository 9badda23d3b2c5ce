"""Law 1 in characters: what is trained is what inference must emit."""

import pytest

from sft_jax.data.chat import loss_spans
from sft_jax.data.chat import template as templates
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.conversation import (
  Message,
  NothingToTrain,
  RowError,
  ToolCall,
)
from tiny_rows import chat
from tiny_tokenizers import CHATML, FORGETFUL, GLUED

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
STOPS = ["<|im_end|>", "</s>"]


def trained(conversation, source, **kwargs):
  """The trained texts of each rendering."""
  template = templates.ChatTemplate(source, NAMES, stop_tokens=STOPS)
  made = loss_spans.render_spans(
    conversation, template, RenderOptions(**kwargs)
  )
  return [[one.text[a:b] for a, b, _ in one.spans] for one in made]


TWO = chat("s:Be.", "u:Hi", "a:Hello.", "u:Bye", "a:Goodbye.")
THOUGHTS = chat(
  "u:2 + 2?",
  Message("assistant", "4", reasoning="Twos."),
  "u:3 + 3?",
  Message("assistant", "6", reasoning="Threes."),
)


def test_a_stable_template_is_rendered_once():
  assert trained(TWO, CHATML) == [["Hello.<|im_end|>", "Goodbye.<|im_end|>"]]
  assert trained(TWO, GLUED) == [["Hello.</s>", "Goodbye.</s>"]]
  assert trained(TWO, CHATML, history="keep") == trained(TWO, CHATML)


def test_split_trains_each_turn_alone():
  assert trained(TWO, CHATML, history="split") == [
    ["Hello.<|im_end|>"],
    ["Goodbye.<|im_end|>"],
  ]


def test_a_template_that_rewrites_history_splits_by_itself():
  assert trained(THOUGHTS, FORGETFUL) == [
    ["<think>\nTwos.\n</think>\n\n4<|im_end|>"],
    ["<think>\nThrees.\n</think>\n\n6<|im_end|>"],
  ]
  template = templates.ChatTemplate(FORGETFUL, NAMES, stop_tokens=STOPS)
  last = loss_spans.render_spans(THOUGHTS, template, RenderOptions())[1]
  assert "Twos." not in last.text
  with pytest.raises(RowError, match=r"messages\[1\]: got a turn that later"):
    trained(THOUGHTS, FORGETFUL, history="keep")


def test_only_the_turns_with_weight_are_trained():
  unweighted = Message("assistant", "Hello.", weight=0.0)
  half = Message("assistant", "Goodbye.", weight=0.5)
  row = chat("u:Hi", unweighted, "u:Bye", half, "u:Still there?")
  template = templates.ChatTemplate(CHATML, NAMES, stop_tokens=STOPS)
  (made,) = loss_spans.render_spans(row, template, RenderOptions())
  ((start, end, weight),) = made.spans
  assert (made.text[start:end], weight) == ("Goodbye.<|im_end|>", 0.5)
  assert "Still there?" not in made.text
  # An untrained turn that is rewritten later is no reason to split.
  unweighted = Message("assistant", "2", "Hm.", weight=0.0)
  row = chat("u:2?", unweighted, "u:3?", "a:3")
  assert trained(row, FORGETFUL) == [["3<|im_end|>"]]


def test_every_assistant_turn_of_a_tool_trace_is_trained():
  call = Message(
    "assistant", "", tool_calls=(ToolCall("look", {"b": 1, "a": 2}),)
  )
  row = chat("u:Look.", call, Message("tool", "A cat."), "a:I see a cat.")
  assert trained(row, CHATML) == [
    [
      '<call>look {"b": 1, "a": 2}</call><|im_end|>',
      "I see a cat.<|im_end|>",
    ]
  ]


def test_what_the_generation_prompt_supplies_is_not_trained():
  # As Qwen3 with enable_thinking=False: the prompt closes the thinking.
  source = CHATML.replace(
    "<|im_start|>{{ m.role }}\n",
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think></think>{% endif %}",
  ).replace("assistant\n{% endif %}", "assistant\n<think></think>{% endif %}")
  assert trained(chat("u:Hi", "a:Hello."), source) == [["Hello.<|im_end|>"]]


def test_turns_that_leave_their_generation_prompt_are_refused():
  source = CHATML.replace("assistant\n{% endif %}", "model\n{% endif %}")
  with pytest.raises(RowError) as error:
    trained(chat("u:Hi", "a:Hello."), source)
  assert "messages[1]: got a turn that does not begin with" in str(error.value)
  # Both tails at the divergence.
  assert "model\\n' against" in str(error.value)
  assert "assistant\\nHello." in str(error.value)


def test_nothing_said_is_left_out_in_silence():
  call = Message("assistant", "", tool_calls=(ToolCall("look", {}),))
  with pytest.raises(RowError, match="leaves out or changes 'look'"):
    trained(chat("u:Look.", call), GLUED)
  deaf = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
  with pytest.raises(RowError, match=r"leaves out or changes 'Hello\.'"):
    trained(chat("u:HI", "a:Hello."), deaf)
  # What is asked a template may change, for inference sees the same.
  assert trained(chat("u:Hi", "a:HELLO."), deaf) == [["HELLO.<|im_end|>"]]
  mute = CHATML.replace(
    "{{ m.content }}", "{{ m.content if m.role != 'system' }}"
  )
  with pytest.raises(RowError, match=r"messages\[0\].*changes 'Hi'"):
    trained(chat("s:Hi", "u:Hi", "a:Hi"), mute)


def test_nothing_to_train():
  with pytest.raises(NothingToTrain) as error:
    trained(chat("u:Hi"), CHATML)
  assert error.value.reason == "no assistant turn"
  with pytest.raises(NothingToTrain) as error:
    trained(chat("u:Hi", Message("assistant", "x", weight=0.0)), CHATML)
  assert error.value.reason == "no trained turn"
  with pytest.raises(ValueError, match="history: got 'all'"):
    trained(TWO, CHATML, history="all")
