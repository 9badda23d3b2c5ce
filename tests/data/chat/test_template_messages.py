"""Messages as the plain dicts that templates read."""

import pytest

import real_templates
from sft_jax.data.chat import loss_spans, template_messages
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.conversation import RowError
from sft_jax.data.formats import formats
from tiny_rows import TRACE
from tiny_tokenizers import CHATML, FORGETFUL, SHARED


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


# Think blocks as people write them; templates and a careless reader would
# make one form of all.
WRITTEN = (
  "<think>\nTwice 2.\n</think>\n<answer>\n4\n</answer>",
  "<think>\nTwice 2.\n</think>\n\n4",
  "<think>Twice 2.</think>4",
  "<think>Twice 2.</think> 4 ",
  "\n<think>\n\nTwice 2.\n\n</think>\n\n\n4\n",
  "<think>\n\n</think>\n\n4",
  "  4\t\n",
  "Four.\n\n<think>late</think>",
)
OWN = {
  "chatml": (CHATML, ("<|im_end|>",)),
  "forgetful": (FORGETFUL, ("<|im_end|>",)),
  "trims": (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    ("<|im_end|>",),
  ),
}


def _row(answers):
  turns = []
  for number, answer in enumerate(answers):
    turns.append({"role": "user", "content": f" {number}?\n"})
    turns.append({"role": "assistant", "content": answer})
  return formats.to_conversation({"messages": turns}, source="rows:1")


@pytest.mark.parametrize("answer", WRITTEN)
def test_content_is_rendered_as_the_row_wrote_it(answer):
  """A template that reads no field of reasoning gets the very content."""
  template = ChatTemplate(CHATML, stop_tokens=["<|im_end|>"])
  (made,) = loss_spans.render_spans(_row([answer]), template, RenderOptions())
  assert [made.text[a:b] for a, b, _ in made.spans] == [answer + "<|im_end|>"]
  assert not made.notes - {"empty think block"}
  shown = [made.text[a:b] for a, b, role in made.role_spans if role == "answer"]
  assert shown == [answer.split("</think>")[-1].strip()] or "late" in answer


def _templates():
  for name, (source, stops) in OWN.items():
    yield name, source, stops
  if SHARED.is_dir():
    for name, stops in real_templates.STOPS.items():
      yield name, real_templates.source(name), stops


@pytest.mark.parametrize(
  ("source", "stops"),
  [
    pytest.param(source, stops, id=name) for name, source, stops in _templates()
  ],
)
@pytest.mark.parametrize("how", ["error", "omit"])
def test_every_character_is_rendered_or_a_note_says_why_not(source, stops, how):
  template = ChatTemplate(source, {"bos_token": "<s>"}, stop_tokens=stops)
  options = RenderOptions({"date": "2026-01-31"}, generation_prompt=how)
  for answers in (*((one,) for one in WRITTEN), WRITTEN[:2], WRITTEN[6:]):
    row = _row(answers)
    try:
      made = loss_spans.render_spans(row, template, options)
    except RowError:
      continue  # Refused, not changed in silence.
    noted = any(
      one.notes & {"white space cut by the template", NOTE} for one in made
    )
    for number, answer in enumerate(answers):
      text = "".join(one.text[a:b] for one in made for a, b, _ in one.spans)
      assert answer in text or noted, (answer, text)
      assert f" {number}?\n" in made[-1].text or noted


NOTE = "text changed by the template"


def test_a_long_rendering_after_another():
  """What is known of the one before counts only where they begin alike."""
  sentinels = template_messages.Sentinels()
  texts = [f"text {i}" for i in range(30)]
  wrapped = [sentinels.wrap("user", text) for text in texts]
  for order in (texts, texts[::-1], texts[1:], texts[:29], texts):
    shown = "|".join(wrapped[texts.index(text)] for text in order)
    plain = "|".join(order)
    found = sentinels.find(shown, plain)
    assert found
    assert [plain[one.start : one.end] for one in found] == order
