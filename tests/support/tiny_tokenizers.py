"""Tiny tokenizer folders and chat templates, made where they are needed."""

import json
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sft_jax.data.tokenizers.tokenizer import load_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"

CHATML = (
  "{% if tools %}<|im_start|>system\n{% for tool in tools %}"
  "{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
  "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} "
  "{{ call.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n"
  "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
  "{% endif %}"
)
# Drops the thinking of every turn but the last, as Qwen3's does.
FORGETFUL = (
  "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
  "{% if m.reasoning_content is defined and loop.last %}<think>\n"
  "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
  "<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Ends the prompt with a space, which tokens of words like to swallow.
GLUED = (
  "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content }}"
  "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEXT = [
  "The cat sat on the mat and the dog ran to the house.",
  "user: Hello there, how are you? assistant: I am well, thank you.",
  "A house is where the cat and the dog are at home.",
  "What is the name of the town? The town is the one on the hill.",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level(folder: Path, template: str | None = CHATML) -> Path:
  """A byte-level BPE tokenizer.json, stopping at <|im_end|> and </s>."""
  model = tokenizers.Tokenizer(models.BPE())
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=SPECIAL,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator(TEXT, trainer)
  folder.mkdir(parents=True, exist_ok=True)
  model.save(str(folder / "tokenizer.json"))
  return _beside(folder, template)


def metaspace(folder: Path, template: str | None = GLUED) -> Path:
  """A tokenizer.json that, as Llama's, prepends a space and joins to it."""
  model = tokenizers.Tokenizer(
    models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
  )
  model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
  model.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=460,
    special_tokens=SPECIAL,
    initial_alphabet=[],
    show_progress=False,
  )
  model.train_from_iterator(TEXT, trainer)
  state = json.loads(model.to_str())
  vocab = state["model"]["vocab"]
  for byte in range(256):
    vocab[f"<0x{byte:02X}>"] = len(vocab)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "tokenizer.json").write_text(json.dumps(state))
  return _beside(folder, template)


def sentence_piece(
  folder: Path,
  template: str | None = CHATML,
  *,
  dummy_prefix: bool = True,
  **config: object,
) -> Path:
  """A tokenizer.model with the control tokens of ChatML."""
  folder.mkdir(parents=True, exist_ok=True)
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXT * 4),
    model_prefix=str(folder / "tokenizer"),
    model_type="bpe",
    vocab_size=380,
    byte_fallback=True,
    control_symbols=SPECIAL[3:],
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=dummy_prefix,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  return _beside(folder, template, **config)


def _beside(folder: Path, template: str | None, **config: object) -> Path:
  config = {"bos_token": "<s>", "eos_token": "</s>", **config}
  # Both ways of naming a token that real folders use.
  config["unk_token"] = {
    "__type": "AddedToken",
    "content": "<unk>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": True,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  (folder / "generation_config.json").write_text(
    json.dumps({"eos_token_id": [2, 4]})
  )
  if template is not None:
    (folder / "chat_template.jinja").write_text(template)
  return folder


def load_all(folder, makers):
  """{name: tokenizer} of {name: (maker, chat template)}."""
  return {
    name: load_tokenizer(make(folder / name, template))
    for name, (make, template) in makers.items()
  }
