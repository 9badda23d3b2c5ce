"""Trains the demo's SentencePiece model and writes it for `transformers` too.

`tokenizer.json` is an exact conversion: a byte-pair model whose merges are
read off the order of the SentencePiece pieces.
"""

import io
import json
from pathlib import Path

import sentencepiece as spm
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

VOCAB = 1024
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")
# Read back out of a reply, so not 'special': decoding keeps them.
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
BASIC = ("<unk>", "<s>", "</s>", "<pad>")
CONTROL = (*ROLES, *MARKS, *BASIC)
CONTEXT = 256

TEMPLATE = """\
{%- macro call(c) -%}
{%- set f = c.function if c.function is defined else c -%}
<tool_call>{"name": {{ f.name | tojson }}, "arguments": \
{{ f.arguments if f.arguments is string else f.arguments | tojson }}}\
</tool_call>
{%- endmacro -%}
{{- bos_token -}}
{%- set system = messages and messages[0].role == 'system' -%}
{%- if system or tools -%}
{{- '<|system|>' -}}
{%- if system %}{{- messages[0].content -}}{% endif -%}
{%- if system and tools %}{{- '\\n' -}}{% endif -%}
{%- for tool in tools or [] -%}
{%- set f = tool.function if tool.function is defined else tool -%}
{"name": {{ f.name | tojson }}, "parameters": \
{{ f.parameters.properties | tojson }}}
{%- endfor -%}
{{- '<|end|>' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- if not loop.first -%}
{{- raise_exception('a system message may only come first') -}}
{%- endif -%}
{%- elif message.role in ('user', 'tool') -%}
{{- '<|' + message.role + '|>' + message.content + '<|end|>' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|assistant|>' -}}
{%- if message.reasoning_content -%}
{{- '<think>' + message.reasoning_content + '</think>' -}}
{%- endif -%}
{{- message.content or '' -}}
{%- for c in message.tool_calls or [] -%}{{- call(c) -}}{%- endfor -%}
{{- '<|end|>' -}}
{%- else -%}
{{- raise_exception('unknown role ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{- '<|assistant|>' -}}{% endif -%}
"""


def train(texts: list[str]) -> bytes:
  """SentencePiece model, a pure function of the texts."""
  model = io.BytesIO()
  spm.SentencePieceTrainer.train(
    # SentencePiece takes a newline for the end of a sentence, so lines are
    # given one by one; a newline itself is encoded by its byte piece.
    sentence_iterator=iter([line for t in texts for line in t.split("\n")]),
    model_writer=model,
    model_type="bpe",
    vocab_size=VOCAB,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    split_digits=True,
    byte_fallback=True,
    character_coverage=1.0,
    user_defined_symbols=[*ROLES, *MARKS],
    unk_id=0,
    bos_id=1,
    eos_id=2,
    pad_id=3,
    pad_piece="<pad>",
    num_threads=1,
    minloglevel=2,
  )
  return model.getvalue()


def convert(model: bytes) -> Tokenizer:
  """The same tokenizer as a `tokenizers` byte-pair model."""
  source = spm.SentencePieceProcessor(model_proto=model)
  vocab = {source.id_to_piece(i): i for i in range(source.vocab_size())}
  first = len(BASIC) + len(ROLES) + len(MARKS) + 256
  # A merge is tried in the order of the piece it makes, whatever its halves.
  merges = [
    (piece[:cut], piece[cut:])
    for piece, i in vocab.items()
    if i >= first and len(piece) > 1
    for cut in range(1, len(piece))
    if piece[:cut] in vocab and piece[cut:] in vocab
  ]
  result = Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=merges,
      unk_token="<unk>",
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  result.normalizer = normalizers.Replace(" ", "▁")
  result.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  result.add_special_tokens(
    [AddedToken(t, normalized=False, special=True) for t in (*BASIC, *ROLES)]
  )
  result.add_tokens([AddedToken(t, normalized=False) for t in MARKS])
  return result


def write(folder: Path, model: bytes) -> None:
  """Writes the five files of a tokenizer folder."""
  converted = convert(model)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "tokenizer.model").write_bytes(model)
  converted.save(str(folder / "tokenizer.json"))
  ids = {t: converted.token_to_id(t) for t in (*BASIC, *ROLES, *MARKS)}
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": CONTEXT,
    "bos_token": "<s>",
    "eos_token": "<|end|>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "add_bos_token": False,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "added_tokens_decoder": {
      str(i): {
        "content": text,
        "special": text not in MARKS,
        "normalized": False,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
      }
      for text, i in ids.items()
    },
  }
  generation = {
    "bos_token_id": ids["<s>"],
    "eos_token_id": [ids["<|end|>"], ids["</s>"]],
    "pad_token_id": ids["<pad>"],
  }
  for name, content in (
    ("tokenizer_config.json", settings),
    ("generation_config.json", generation),
  ):
    (folder / name).write_text(json.dumps(content, indent=2) + "\n")
  (folder / "chat_template.jinja").write_text(TEMPLATE)
