"""An exported template gives, by itself, the prompts of training."""

import pytest

from sft_jax.data.chat import template_export
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.chat.renderer import ConversationRenderer
from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.conversation import Conversation, Message

# Its prompt opens a think block that its replies do not have.
THINKER = (
  "\n\n{% set n = namespace(x=0) %}{% for m in messages %}"
  "<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|assistant|>"
  "{{ '<think>\n' if style != 'plain' }}{% endif %}\n  \n"
)
ROWS = [
  Conversation((Message("user", "Hi"),)),
  Conversation(
    (
      Message("system", "{{ '{% endset %}' }}"),
      Message("user", "  Hi\n\n"),
      Message("assistant", "<think>\n"),
      Message("user", "Bye"),
    )
  ),
]
OPTIONS = [
  RenderOptions(generation_prompt="omit"),
  RenderOptions({"style": "plain"}),
  RenderOptions({"style": 'odd "quotes"\n', "n": [1, None, {"a": True}]}),
  RenderOptions({"style": 3}, generation_prompt="omit"),
]


@pytest.mark.parametrize("ends", ["", "\n", "\n\n", "  "])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_export_needs_no_settings(options, ends):
  template = ChatTemplate(THINKER + ends, control_tokens=["<|assistant|>"])
  source = template_export.exported(template, options)
  assert source is not None
  alone = ChatTemplate(source)
  for row in ROWS:
    plain = [{"role": m.role, "content": m.content} for m in row.messages]
    count = len(plain)
    assert alone.render(
      plain, add_generation_prompt=True
    ) == ConversationRenderer(row, template, options).prompt(count)
    # Without a generation prompt nothing is cut.
    assert alone.render(plain) == ConversationRenderer(
      row, template, options
    ).turns(count)
    # A caller can still choose.
    choice = {"add_generation_prompt": True, "style": "plain"}
    assert alone.render(plain, **choice) == template.render(plain, **choice)


def test_what_needs_no_other_template():
  template = ChatTemplate(THINKER)
  assert template_export.exported(template, RenderOptions()) is None
  # The day was pinned for training; a model in use has its own.
  dated = RenderOptions({"date": "2026-01-31"})
  assert template_export.exported(template, dated) is None


def test_a_run_says_what_it_chose():
  template = ChatTemplate(THINKER.rstrip(), control_tokens=["<|assistant|>"])
  said = template_export.described(
    template, RenderOptions({"date": "2026-01-31"}, generation_prompt="omit")
  )
  assert said == [
    'chat template: {"date": "2026-01-31"}',
    "generation prompt: without its end '<think>\\n', in training, sampling "
    "and the export",
  ]
  plain = RenderOptions({"style": "plain"}, generation_prompt="omit")
  assert "nothing to omit" in template_export.described(template, plain)[1]
