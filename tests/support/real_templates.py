"""Real chat templates, a tokenizer for each, and conversations to try."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sft_jax.data.conversation import Conversation, Message, ToolCall
from tiny_tokenizers import SHARED, TEXT

TEMPLATES = SHARED / "chat_templates"
DATE = "2026-01-31"

# The tokens at which the models stop, from their generation configs.
STOPS = {
  "Apertus-8B-Instruct": ("<|assistant_end|>", "<|tools_suffix|>", "</s>"),
  "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("<|END_OF_TURN_TOKEN|>",),
  "GLM-4.6": ("<|endoftext|>", "<|user|>", "<|observation|>"),
  "HuggingFaceTB-SmolLM3-3B": ("<|im_end|>",),
  "Kimi-K2-Instruct": ("<|im_end|>",),
  "LFM2-8B-A1B": ("<|im_end|>",),
  "Mistral-Small-3.2-24B-Instruct-2506": ("</s>",),
  "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("<|im_end|>",),
  "Qwen-Qwen2.5-7B-Instruct": ("<|im_end|>", "<|endoftext|>"),
  "Qwen-Qwen3-0.6B": ("<|im_end|>", "<|endoftext|>"),
  "Qwen3.5-4B": ("<|im_end|>", "<|endoftext|>"),
  "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("<｜end▁of▁sentence｜>",),
  "deepseek-ai-DeepSeek-V3.1": ("<｜end▁of▁sentence｜>",),
  "google-gemma-2-2b-it": ("<end_of_turn>", "<eos>"),
  "google-gemma-4-31B-it": ("<turn|>", "<|tool_response>", "<eos>"),
  "ibm-granite-granite-3.3-2B-Instruct": ("<|end_of_text|>",),
  "meta-llama-Llama-3.1-8B-Instruct": (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
  ),
  "meta-llama-Llama-3.2-3B-Instruct": (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
  ),
  "microsoft-Phi-3.5-mini-instruct": ("<|end|>", "<|endoftext|>"),
  "mistralai-Mistral-Nemo-Instruct-2407": ("</s>",),
  "openai-gpt-oss-120b": ("<|return|>", "<|call|>", "<|endoftext|>"),
}
# What templates write as one token: <|end|>, <end|>, <｜end｜>, [INST], <s>.
_SPECIAL = re.compile(
  r"<\|[^|<>\s]+\|?>|<[^|<>\s]+\|>|<｜[^｜<>\s]+｜>|\[/?[A-Z_]{3,}\]"
  r"|<(?:start|end)_of_turn>|\[gMASK\]|<sop>"
)
# Tokens of their own in the real vocabularies, but no structure.
_ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def source(name: str) -> str:
  return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def write_tokenizer(folder: Path, name: str) -> Path:
  """A byte-level tokenizer with the special tokens of a template."""
  template = source(name)
  model = tokenizers.Tokenizer(models.BPE())
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = decoders.ByteLevel()
  model.train_from_iterator(
    TEXT,
    trainers.BpeTrainer(
      vocab_size=400,
      special_tokens=["<unk>"],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  special = {"<bos>", *STOPS[name], *_SPECIAL.findall(template)}
  model.add_special_tokens(sorted(special))
  model.add_tokens(
    [tokenizers.AddedToken(text, special=False) for text in _ADDED]
  )
  model.save(str(folder / "tokenizer.json"))
  (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
  stops = [model.token_to_id(text) for text in STOPS[name]]
  (folder / "generation_config.json").write_text(
    json.dumps({"eos_token_id": stops})
  )
  config = {"bos_token": "<bos>", "eos_token": STOPS[name][0]}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


def _tool(name: str) -> dict[str, Any]:
  where = {"type": "string", "description": "Where to look."}
  return {
    "type": "function",
    "function": {
      "name": name,
      "description": f"Does {name}.",
      "parameters": {
        "type": "object",
        "properties": {"at": where},
        "required": ["at"],
      },
    },
  }


TOOLS = (_tool("look"), _tool("listen"))
_LOOK = ToolCall("look", {"at": 'the <cat> & "ü"'}, "abcdefgh1")
_LISTEN = ToolCall("listen", {"at": "the dog"}, "abcdefgh2")


def _turns(count: int, *, reasoning: bool = False) -> tuple[Message, ...]:
  made = []
  for number in range(count):
    thought = f"They say {number}, so I answer." if reasoning else None
    made += [
      Message("user", f"Question {number}?"),
      Message("assistant", f"Answer {number}, of course.", thought),
    ]
  return tuple(made)


_SYSTEM = Message("system", "You speak like a pirate.")


def _trace(*calls: ToolCall, thought: str | None = None) -> Conversation:
  return Conversation(
    (
      Message("user", "Where is it?"),
      Message("assistant", "", thought, calls),
      *(
        Message("tool", f"{one.name}: on the mat", None, (), one.name, one.id)
        for one in calls
      ),
      Message("assistant", "It is on the mat.", thought and "I saw it."),
    ),
    TOOLS,
  )


class Case(NamedTuple):
  name: str
  conversation: Conversation


CASES = tuple(
  Case(*one)
  for one in (
    *((f"{n} turns", Conversation(_turns(n))) for n in (1, 2, 3, 4)),
    *(
      (f"system, {n} turns", Conversation((_SYSTEM, *_turns(n))))
      for n in (1, 2, 4)
    ),
    ("one call", _trace(_LOOK)),
    ("parallel calls", _trace(_LOOK, _LISTEN)),
    (
      "system, parallel calls",
      Conversation((_SYSTEM, *_trace(_LOOK, _LISTEN).messages), TOOLS),
    ),
    ("calls with thinking", _trace(_LOOK, thought="I shall look.")),
    (
      "tools on offer, not called",
      Conversation(_turns(2), TOOLS),
    ),
    ("thinking, 1 turn", Conversation(_turns(1, reasoning=True))),
    ("thinking, 3 turns", Conversation(_turns(3, reasoning=True))),
    (
      "unicode and spaces",
      Conversation(
        (
          Message("user", "  Grüße \u00a0😀\n\n "),
          Message("assistant", " \n 你好,  wie geht's?\n\n"),
          Message("user", "\tgut\t"),
          Message("assistant", "  fine  "),
        )
      ),
    ),
    (
      "empty user turn",
      Conversation((Message("user", ""), Message("assistant", "Hello?"))),
    ),
    (
      "the same said again",
      Conversation(
        (
          Message("user", "user"),
          Message("assistant", "assistant"),
          Message("user", "user"),
          Message("assistant", "assistant"),
        )
      ),
    ),
    (
      "text like a template",
      Conversation(
        (
          Message("user", "{{ messages[0] }} {% raw %} assistant\n"),
          Message(
            "assistant",
            "{{ bos_token }}{% for m in messages %}user\nassistant\n"
            "### Response: Human: <tool_call> {# no #}",
          ),
        )
      ),
    ),
  )
)


def main() -> None:
  """Prints the table of docs/templates.md."""
  from sft_jax.data.chat import template as templates
  from sft_jax.data.chat import template_probes
  from sft_jax.data.chat.options import RenderOptions
  from sft_jax.data.encoding import encode
  from sft_jax.data.tokenizers.tokenizer import load_tokenizer

  date = {"date": DATE}
  ways = {
    "as it is": RenderOptions(date),
    "omit": RenderOptions(date, generation_prompt="omit"),
    "enable_thinking": RenderOptions({**date, "enable_thinking": True}),
    "strip": RenderOptions(
      {**date, "enable_thinking": False}, "omit", reasoning="strip"
    ),
  }
  print(
    f"| template | {' | '.join(ways)} | "
    "what happens; with omit, what is refused |"
  )
  print("|---|" + "---|" * (len(ways) + 1))
  for name in STOPS:
    with tempfile.TemporaryDirectory() as folder:
      one = load_tokenizer(write_tokenizer(Path(folder), name))
    counts, refused, notes = [], {}, set()
    if tail := template_probes.omitted(templates.chat_template(one), date):
      notes.add(f"omits `{tail!r}`")
    for way, options in ways.items():
      trained = 0
      for case in CASES:
        try:
          made = encode.encode_row(
            case.conversation, one, options, max_length=10**6
          )
          trained += 1
          notes |= made.notes.keys() - {"split history"}
        except ValueError as error:
          if way == "omit":
            got = str(error).split("; expected")[0].split("got ", 1)[1]
            got = got.replace("refused by the chat template", "its own")
            refused.setdefault(re.sub(r": '.*", "", got), []).append(case.name)
      counts.append(f"{trained}/{len(CASES)}")
    reasons = [f"{len(cases)} x {got}" for got, cases in refused.items()]
    said = "; ".join([*sorted(notes), *reasons]).replace("|", "\\|")
    print(f"| {name} | {' | '.join(counts)} | {said} |")


if __name__ == "__main__":
  main()
