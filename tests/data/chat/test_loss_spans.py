"""Law 1 in characters: what is trained is what inference must emit."""

import re

import pytest

from sft_jax.data.chat import loss_spans
from sft_jax.data.chat import template as templates
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.chat.template import chat_template
from sft_jax.data.conversation import (
  Conversation,
  Message,
  NothingToTrain,
  RowError,
  ToolCall,
  check,
)
from sft_jax.data.encoding import encode
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from tiny_rows import chat
from tiny_tokenizers import CHATML, FORGETFUL, GLUED, byte_level

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


def test_a_text_of_a_rendered_conversation(tmp_path):
  """The same ids and weights as from messages; one BOS, one stop."""
  source = "{{ bos_token }}" + CHATML
  one = load_tokenizer(byte_level(tmp_path / "m", source))
  row = chat("s:Be brief.", "u:Hi", "a:Yo <there>", "u:Bye", "a:Ciao")
  options = RenderOptions(text="rendered")
  (expected,) = encode.encode_row(row, one, options, max_length=99).examples
  (shown,) = loss_spans.render_spans(row, chat_template(one), options)
  for text in (shown.text, shown.text.removeprefix("<s>"), shown.text.strip()):
    given = Conversation(text=text, source="rows.jsonl:1")
    (made,) = encode.encode_row(given, one, options, max_length=99).examples
    # Without the line break after the last stop token.
    size = len(made.tokens)
    assert made.tokens.tolist() == expected.tokens[:size].tolist()
    assert made.loss_weights.tolist() == expected.loss_weights[:size].tolist()
    assert set(expected.loss_weights[size:]) <= {0}
    assert made.tokens.tolist().count(one.bos_id) == 1
    for how in ("escape", "error"):
      plain = RenderOptions(control_tokens=how)
      with pytest.raises(RowError, match=r"set data\.text to rendered"):
        encode.encode_row(given, one, plain, max_length=99)
    allowed = RenderOptions(control_tokens="allow")
    (made,) = encode.encode_row(given, one, allowed, max_length=99).examples
    ids = made.tokens.tolist()
    assert ids.count(one.bos_id) == 1
    assert ids[-2:] != [one.stop_ids[-1], one.eos_id]
  for text, match in (
    ("<s>words alone", "a text without '<|im_start|>assistant"),
    ("<|im_start|>assistant\nYo", "a reply without a stop token"),
  ):
    with pytest.raises(RowError, match=re.escape(match)):
      encode.encode_row(Conversation(text=text), one, options, max_length=99)


def test_a_prompt_ends_with_the_answer_that_is_to_be_continued(tmp_path):
  one = load_tokenizer(byte_level(tmp_path / "m", CHATML))
  asked = encode.prompt_ids(chat("u:Hi"), one)
  begun = encode.prompt_ids(chat("u:Hi", "a:Yo, th"), one)
  assert one.decode(begun, skip_special=False) == (
    one.decode(asked, skip_special=False) + "Yo, th"
  )


def test_white_space_is_no_answer():
  with pytest.raises(RowError, match="an empty assistant turn"):
    check(chat("u:Hi", "a: \n"))
