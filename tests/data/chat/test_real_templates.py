"""Law 1 for 21 real templates, against transformers' own rendering.

The oracle shares nothing with the code under test but the tokenizer file:
`apply_chat_template` renders each conversation prefix with the generation
prompt, from dicts that are written here.
"""

import datetime

import numpy as np
import pytest

import real_templates
from real_templates import CASES, DATE, STOPS
from sft_jax.data.chat import template as templates
from sft_jax.data.chat import template_export, template_probes
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.conversation import Conversation, RowError
from sft_jax.data.encoding import encode
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from tiny_tokenizers import SHARED

pytestmark = pytest.mark.skipif(
  not SHARED.is_dir(), reason="needs the shared data folder"
)

# What each template needs where its default does not begin with its prompt.
OMIT = {"generation_prompt": "omit"}
SETTINGS = {
  "CohereForAI-c4ai-command-r7b-12-2024-tool_use": [
    OMIT,
    {"template_kwargs": {"enable_thinking": True}},
  ],
  "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": [OMIT],
  "google-gemma-4-31B-it": [
    OMIT,
    {"template_kwargs": {"enable_thinking": True}},
  ],
  "Qwen-Qwen3-0.6B": [
    {},
    {"template_kwargs": {"enable_thinking": False}, "reasoning": "strip"},
  ],
  "Qwen3.5-4B": [
    {},
    {"template_kwargs": {"enable_thinking": False}, "reasoning": "strip"},
  ],
}
CALLS = {
  "one call",
  "parallel calls",
  "system, parallel calls",
  "calls with thinking",
}
TOOLS = CALLS | {"tools on offer, not called"}
THINKING = {"thinking, 1 turn", "thinking, 3 turns"}
SYSTEM = {"system, 1 turns", "system, 2 turns", "system, 4 turns"}
PARALLEL = {"parallel calls", "system, parallel calls"}
UNSAID = "leaves out or changes"
NO_TOOLS = dict.fromkeys(TOOLS, "a chat template that reads none")
NO_THOUGHT = dict.fromkeys(THINKING, "leaves out or changes 'They say")
NO_CALL_THOUGHT = {"calls with thinking": "leaves out or changes 'I "}
# Cases that are refused, and the reason: the template's own, or ours.
REFUSED = {
  "Apertus-8B-Instruct": dict.fromkeys(CALLS, "its generation prompt"),
  "CohereForAI-c4ai-command-r7b-12-2024-tool_use": {
    **NO_THOUGHT,
    **NO_CALL_THOUGHT,
  },
  "HuggingFaceTB-SmolLM3-3B": NO_TOOLS,
  "Kimi-K2-Instruct": dict.fromkeys(CALLS, "attribute 'append' of 'list'"),
  "LFM2-8B-A1B": dict.fromkeys(CALLS, UNSAID),
  "Mistral-Small-3.2-24B-Instruct-2506": NO_CALL_THOUGHT,
  "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": {
    **{
      case.name: "'NoneType' object is not iterable"
      for case in CASES
      if case.name not in TOOLS
    },
    **NO_CALL_THOUGHT,
  },
  "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": {**NO_TOOLS, **NO_THOUGHT},
  "deepseek-ai-DeepSeek-V3.1": {**NO_TOOLS, **NO_THOUGHT},
  "google-gemma-2-2b-it": {
    **NO_TOOLS,
    **dict.fromkeys(SYSTEM, "System role not supported"),
  },
  "google-gemma-4-31B-it": {**NO_THOUGHT, **NO_CALL_THOUGHT},
  "ibm-granite-granite-3.3-2B-Instruct": dict.fromkeys(CALLS, UNSAID),
  "meta-llama-Llama-3.1-8B-Instruct": {
    **dict.fromkeys(PARALLEL, "only supports single tool-calls at once"),
    **NO_CALL_THOUGHT,
  },
  "meta-llama-Llama-3.2-3B-Instruct": {
    **dict.fromkeys(PARALLEL, "only supports single tool-calls at once"),
    **NO_CALL_THOUGHT,
  },
  "microsoft-Phi-3.5-mini-instruct": NO_TOOLS,
  "mistralai-Mistral-Nemo-Instruct-2407": {
    "system, parallel calls": "leaves out or changes 'You speak like a pirate",
    **NO_CALL_THOUGHT,
  },
  "openai-gpt-oss-120b": dict.fromkeys(
    PARALLEL, "leaves out or changes 'listen'"
  ),
}


class _Stopped(datetime.datetime):
  @classmethod
  def now(cls, tz=None):
    return cls(2026, 1, 31)


def _plain(conversation, *, strip, in_content):
  """Messages as users of transformers write them."""
  made = []
  for message in conversation.messages:
    one = {"role": message.role, "content": message.content}
    if message.reasoning is not None and not strip:
      if in_content:
        thought = f"<think>\n{message.reasoning}\n</think>\n\n"
        one["content"] = thought + message.content
      else:
        one["reasoning_content"] = one["thinking"] = message.reasoning
    if message.tool_calls:
      one["tool_calls"] = [
        {
          "type": "function",
          "id": call.id,
          "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in message.tool_calls
      ]
    if message.role == "tool":
      one |= {"name": message.name, "tool_call_id": message.tool_call_id}
    made.append(one)
  return made


def _runs(weights):
  edges = np.flatnonzero(np.diff([0, *(weights > 0), 0]))
  return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@pytest.mark.parametrize("name", STOPS)
def test_law_1(name, tmp_path, monkeypatch):
  transformers = pytest.importorskip("transformers")
  ours = load_tokenizer(real_templates.write_tokenizer(tmp_path, name))
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(tmp_path / "tokenizer.json"),
    bos_token="<bos>",
    eos_token=STOPS[name][0],
    chat_template=real_templates.source(name),
  )
  # Theirs reads the clock, so it is stopped on the day that is pinned.
  monkeypatch.setattr(
    transformers.utils.chat_template_utils, "datetime", _Stopped
  )
  template = templates.chat_template(ours)
  for setting in SETTINGS.get(name, [{}]):
    extra = setting.get("template_kwargs", {})
    options = RenderOptions(
      **{**setting, "template_kwargs": {"date": DATE, **extra}}
    )
    omitted = ""
    if options.generation_prompt == "omit":
      omitted = template_probes.omitted(template, options.template_kwargs)
      assert omitted

    # The template of an export renders the same prompts, without settings.
    exported = template_export.exported(template, options)

    def render(plain, tools, prompt, extra=extra, omitted=omitted):
      text = theirs.apply_chat_template(
        plain,
        tools=tools,
        add_generation_prompt=prompt,
        tokenize=False,
        **extra,
      )
      return text.removesuffix(omitted) if prompt else text

    for case in CASES:
      row = case.conversation
      if reason := REFUSED.get(name, {}).get(case.name):
        with pytest.raises(RowError) as error:
          encode.encode_row(row, ours, options, max_length=10**6)
        assert reason in str(error.value), case.name
        continue
      made = encode.encode_row(row, ours, options, max_length=10**6)
      plain = _plain(
        row,
        strip=options.reasoning == "strip",
        in_content=not template.reads_reasoning,
      )
      turns = [i for i, one in enumerate(plain) if one["role"] == "assistant"]
      found = [
        (one, *run) for one in made.examples for run in _runs(one.loss_weights)
      ]
      assert len(found) == len(turns), case.name
      for (one, start, end), turn in zip(found, turns, strict=True):
        tokens = one.tokens.tolist()
        # What is before is what inference holds.
        prompt = render(plain[:turn], list(row.tools) or None, True)
        assert tokens[:start] == theirs.encode(
          prompt, add_special_tokens=False
        ), case.name
        if exported:
          assert prompt == theirs.apply_chat_template(
            plain[:turn],
            tools=list(row.tools) or None,
            chat_template=exported,
            add_generation_prompt=True,
            tokenize=False,
          )
        so_far = Conversation(row.messages[:turn], row.tools)
        assert tokens[:start] == encode.prompt_ids(so_far, ours, options)
        # It stops at the first stop token, and there alone.
        stops = [token in ours.stop_ids for token in tokens[start:end]]
        assert stops == [False] * (end - start - 1) + [True], case.name
        # The reply is what the template renders for the turn.
        reply = theirs.decode(tokens[start : end - 1])
        full = render(plain[: turn + 1], list(row.tools) or None, False)
        assert reply in full
        if full.startswith(prompt):
          assert full[len(prompt) :].startswith(reply)
        assert row.messages[turn].content.strip() in reply
        for call in row.messages[turn].tool_calls:
          assert call.name in reply
        if full.startswith(prompt):  # Nothing rewritten: ids of the whole.
          ids = theirs.encode(full, add_special_tokens=False)
          assert ids[: end - 1] == tokens[: end - 1], case.name
