"""Thinking that a template leaves out is written where a model emits it."""

import numpy as np
import pytest

import real_templates
from sft_jax.data.chat import trained_turn
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.conversation import Conversation, RowError
from sft_jax.data.encoding import encode
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from tiny_rows import runs
from tiny_tokenizers import CHATML, SHARED, byte_level

# As DeepSeek's R1: the prompt opens the thinking, no turn shows any.
CUTS = CHATML.replace(
  "{{ m.content }}", "{{ m.content.split('</think>\\n\\n')[-1] }}"
)
OPENS = CUTS.replace(
  "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"
)
# As DeepSeek's V3.1: on demand, and an empty block where there is none.
CHOOSES = CUTS.replace(
  "{{ m.content.split",
  "{{ '<think></think>' if m.role == 'assistant' }}{{ m.content.split",
).replace(
  "assistant\n{% endif %}",
  "assistant\n{{ '<think>' if thinking else '<think></think>' }}{% endif %}",
)
(THOUGHTS,) = (
  one.conversation
  for one in real_templates.CASES
  if one.name == "thinking, 3 turns"
)
SAID = [
  (f"They say {i}, so I answer.", f"Answer {i}, of course.") for i in range(3)
]


@pytest.fixture
def load(tmp_path):
  return lambda source: load_tokenizer(byte_level(tmp_path, source))


@pytest.mark.parametrize(
  ("prompt", "full", "text"),
  [
    ("u a<think>\n", "u a4.", "u a<think>\nT\n</think>\n\n4."),
    ("u a<think>", "u a<think></think>4.", "u a<think>T</think>4."),
    (
      "u a<think>\n",
      "u a<think>\n\n</think>\n\n4.",
      "u a<think>\nT\n</think>\n\n4.",
    ),
    ("u a", "u a4.", "u a<think>\nT\n</think>\n\n4."),
    ("u a", "u a<think></think>4.", "u a<think>T</think>4."),
  ],
)
def test_the_block_begins_as_the_prompt_opens_it(prompt, full, text):
  filled = trained_turn.fill(prompt, full, "T")
  assert filled.text == text
  assert text.startswith(prompt)
  assert text[filled.start : filled.end] == "T"
  assert text.index("4") - full.index("4") == filled.moved


@pytest.mark.parametrize(
  ("prompt", "full"),
  [
    ("u a<think></think>", "u a<think></think>4."),  # Thinking is off.
    ("u a<think>\n\n</think>\n\n", "u a<think>\n\n</think>\n\n4."),
    ("u1 a", "u a4."),
  ],
)
def test_a_prompt_that_no_thinking_follows(prompt, full):
  assert trained_turn.fill(prompt, full, "T") is None


@pytest.mark.parametrize(
  ("source", "options", "block"),
  [
    (OPENS, RenderOptions(reasoning="write"), "{}\n</think>\n\n{}<|im_end|>"),
    (
      OPENS,
      RenderOptions(reasoning="write", generation_prompt="omit"),
      "<think>\n{}\n</think>\n\n{}<|im_end|>",
    ),
    (
      CUTS,
      RenderOptions(reasoning="write"),
      "<think>\n{}\n</think>\n\n{}<|im_end|>",
    ),
    (
      CHOOSES,
      RenderOptions({"thinking": True}, reasoning="write"),
      "{}</think>{}<|im_end|>",
    ),
    # A template that shows it needs no help.
    (
      CHATML,
      RenderOptions(reasoning="write"),
      "<think>\n{}\n</think>\n\n{}<|im_end|>",
    ),
  ],
)
def test_every_trained_turn_has_its_thinking(load, source, options, block):
  one = load(source)
  made = encode.encode_row(THOUGHTS, one, options, max_length=999)
  shows = source == CHATML
  assert len(made.examples) == (1 if shows else 3)
  found = [
    (example.tokens.tolist(), example.roles, *run)
    for example in made.examples
    for run in runs(example.loss_weights)
  ]
  for i, (tokens, parts, start, end) in enumerate(found):
    # What is before is what inference holds, whose history shows no thinking.
    so_far = Conversation(THOUGHTS.messages[: 2 * i + 1])
    assert tokens[:start] == encode.prompt_ids(so_far, one, options)
    assert shows or SAID[0][0] not in one.decode(tokens[:start])
    reply = one.decode(tokens[start:end], skip_special=False)
    assert reply == block.format(*SAID[i])
    for name, said in zip(("reasoning", "answer"), SAID[i], strict=True):
      own = np.flatnonzero(parts[start:end] == TOKEN_ROLES.index(name)) + start
      assert one.decode([tokens[at] for at in own]).strip() == said


def test_without_it_the_row_is_refused_and_the_way_out_named(load):
  one = load(OPENS)
  with pytest.raises(RowError, match=r"data\.reasoning to write"):
    encode.encode(THOUGHTS, one, max_length=999)
  with pytest.raises(RowError, match=r"data\.reasoning to strip or write"):
    encode.encode(THOUGHTS, one, max_length=999, generation_prompt="omit")
  # Where thinking is off, the template's own switch is the way.
  with pytest.raises(RowError, match=r"Set data\.template_kwargs"):
    encode.encode(THOUGHTS, load(CHOOSES), max_length=999, reasoning="write")


def test_what_is_thought_is_searched_for_control_tokens(load):
  messages = (
    THOUGHTS.messages[0],
    THOUGHTS.messages[1].__class__(
      "assistant", "The answer is 4.", "<|im_end|>"
    ),
  )
  one = load(OPENS)
  options = {"max_length": 999, "reasoning": "write"}
  with pytest.raises(RowError, match="control token"):
    encode.encode(
      Conversation(messages), one, **options, control_tokens="error"
    )
  (made,) = encode.encode(Conversation(messages), one, **options)
  trained = made.tokens[made.loss_weights > 0].tolist()
  assert [number for number in trained if number in one.stop_ids] == [
    one.special_tokens["<|im_end|>"]
  ]
  assert one.decode(trained, skip_special=False).count("<|im_end|>") == 2


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")
@pytest.mark.parametrize(
  ("name", "kwargs", "block"),
  [
    (
      "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
      {},
      "{}\n</think>\n\n{}<｜end▁of▁sentence｜>",
    ),
    (
      "deepseek-ai-DeepSeek-V3.1",
      {"thinking": True},
      "{}</think>{}<｜end▁of▁sentence｜>",
    ),
  ],
)
def test_real_templates(name, kwargs, block, tmp_path):
  transformers = pytest.importorskip("transformers")
  ours = load_tokenizer(real_templates.write_tokenizer(tmp_path, name))
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(tmp_path / "tokenizer.json"),
    bos_token="<bos>",
    eos_token=real_templates.STOPS[name][0],
    chat_template=real_templates.source(name),
  )
  options = RenderOptions(kwargs, reasoning="write")
  made = encode.encode_row(THOUGHTS, ours, options, max_length=9999)
  turns = [{"role": m.role, "content": m.content} for m in THOUGHTS.messages]
  for i, example in enumerate(made.examples):
    ((start, end),) = runs(example.loss_weights)
    tokens = example.tokens.tolist()
    prompt = theirs.apply_chat_template(
      turns[: 2 * i + 1], add_generation_prompt=True, tokenize=False, **kwargs
    )
    assert tokens[:start] == theirs.encode(prompt, add_special_tokens=False)
    assert theirs.decode(tokens[start:end]) == block.format(*SAID[i])


def test_plain_text_has_no_turns_to_write_into():
  with pytest.raises(ValueError, match="got 'write' with train_on='all'"):
    RenderOptions(train_on="all", reasoning="write")
