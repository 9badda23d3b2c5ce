"""A chat template renders as transformers has it render."""

from sft_jax.data.chat import template as templates
from tiny_tokenizers import CHATML, FORGETFUL, GLUED


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


def test_whether_a_template_reads_thinking():
  assert not templates.ChatTemplate(CHATML).reads_reasoning
  assert templates.ChatTemplate(FORGETFUL).reads_reasoning
  assert templates.ChatTemplate("{{ m['thinking'] }}").reads_reasoning
  assert not templates.ChatTemplate("{{ enable_thinking }}").reads_reasoning
