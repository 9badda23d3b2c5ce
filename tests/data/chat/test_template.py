"""A chat template renders as transformers has it render."""

from pathlib import Path

import pytest

import real_templates
from sft_jax.data.chat import template as templates
from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.encoding import encode
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from tiny_rows import chat
from tiny_tokenizers import CHATML, FORGETFUL, GLUED, SHARED, byte_level

FOLDER = Path(templates.__file__).parent / "templates"


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


def _rendered(source, messages, *, prompt=False, **tokens):
  template = ChatTemplate(source, tokens)
  return template.render(messages, add_generation_prompt=prompt)


_TURNS = [
  {"role": "user", "content": "Hi"},
  {"role": "assistant", "content": "Yo!"},
  {"role": "user", "content": "Bye \u00e9"},
]
_SYSTEM = [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize(
  ("name", "real", "before", "tokens"),
  [
    ("chatml", "Qwen-Qwen2.5-7B-Instruct", _SYSTEM, {}),
    ("gemma", "google-gemma-2-2b-it", [], {"bos_token": "<bos>"}),
    (
      "mistral",
      "mistralai-Mistral-Nemo-Instruct-2407",
      [],
      {"bos_token": "<s>", "eos_token": "</s>"},
    ),
  ],
)
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")
def test_named_templates_are_those_of_the_real_models(
  name, real, before, tokens
):
  ours = (FOLDER / f"{name}.jinja").read_text()
  for count in (1, 2, 3):
    messages = [*before, *_TURNS[:count]]
    for prompt in (False, True) if count != 2 else (False,):
      assert _rendered(ours, messages, prompt=prompt, **tokens) == _rendered(
        real_templates.source(real), messages, prompt=prompt, **tokens
      )


def test_llama3_and_plain_templates():
  tokens = {"bos_token": "<s>", "eos_token": "</s>"}
  llama3 = (FOLDER / "llama3.jinja").read_text()
  assert _rendered(llama3, _SYSTEM + _TURNS[:2], prompt=True, **tokens) == (
    "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYo!<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
  )
  plain = (FOLDER / "plain.jinja").read_text()
  assert _rendered(plain, _SYSTEM + _TURNS, prompt=True, **tokens) == (
    "<s>System:\nBe brief.\n\nUser:\nHi\n\nAssistant:\nYo!</s>\n"
    "User:\nBye \u00e9\n\nAssistant:\n"
  )


def test_the_template_of_a_config(tmp_path):
  folder = byte_level(tmp_path / "m", None)
  one = load_tokenizer(folder)
  assert templates.choose(one, "", "default") is one
  row = chat("s:Be brief.", "u:Hi", "a:Yo", "u:Bye", "a:Ciao")
  for name in ("chatml", "plain", "mistral"):
    chosen = templates.choose(one, name, "default")
    assert chosen.fingerprint != one.fingerprint
    (made,) = encode.encode(row, chosen, max_length=999)
    text = chosen.decode(
      made.tokens[made.loss_weights > 0].tolist(), skip_special=False
    )
    stop = "<|im_end|>" if name == "chatml" else "</s>"
    assert text == f"Yo{stop}Ciao{stop}"
  grown = templates.choose(one, "gemma", "default")
  assert grown.special_tokens["<end_of_turn>"] in grown.stop_ids
  assert "<start_of_turn>" in grown.special_tokens
  with pytest.raises(ValueError, match="expected '', one of chatml"):
    templates.choose(one, "nothing.jinja", "default")
  path = tmp_path / "own.jinja"
  path.write_text("own")
  assert templates.choose(one, str(path), "default").chat_template == "own"
  several = folder / "chat_templates"
  several.mkdir()
  (several / "tool_use.jinja").write_text("tools")
  one = load_tokenizer(folder)
  assert templates.choose(one, "", "tool_use").chat_template == "tools"
  with pytest.raises(ValueError, match=r"expected one of \['tool_use'\]"):
    templates.choose(one, "", "rag")
