"""Templates made to mislead: Law 1, or a refusal that says why."""

import json
import re

import pytest

from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.conversation import Conversation, Message, RowError, ToolCall
from sft_jax.data.encoding import encode
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from tiny_rows import runs
from tiny_tokenizers import CHATML, FORGETFUL, byte_level

CALL = ToolCall("look", {"at": 'the "cat"', "n": 3}, "id1")
ROWS = {
  "one turn": Conversation((Message("user", "Hi"), Message("assistant", "4"))),
  "three turns": Conversation(
    tuple(
      Message("user" if i % 2 == 0 else "assistant", f"text {i // 2}")
      for i in range(6)
    )
  ),
  "the same again": Conversation(
    tuple(Message(role, "user") for role in ("user", "assistant") * 2)
  ),
  "system": Conversation(
    (
      Message("system", "Be brief."),
      Message("user", "  Hi\n"),
      Message("assistant", "\n Hello.  "),
      Message("user", "Bye"),
      Message("assistant", "Bye"),
    )
  ),
  "thinking": Conversation(
    (
      Message("user", "2 + 2?"),
      Message("assistant", "4", "Twos."),
      Message("user", "3 + 3?"),
      Message("assistant", "6", "Threes."),
    )
  ),
  "calls": Conversation(
    (
      Message("user", "Where?"),
      Message("assistant", "", tool_calls=(CALL, CALL)),
      Message("tool", "on the mat", name="look", tool_call_id="id1"),
      Message("assistant", "On the mat."),
    )
  ),
}
USER = "<|im_start|>user\n{{ m.content }}<|im_end|>\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LOOP = "{% for m in messages %}"
HEAD = "<|im_start|>{{ m.role }}\n"


def template(body, before="", after=PROMPT):
  return before + LOOP + body + "{% endfor %}" + after


CHATTY = HEAD + "{{ m.content }}<|im_end|>"
ALL = set(ROWS)
NO_CALLS = ALL - {"calls"}
# {name: (source, rows that must be trained, what the refusal of others says)};
# None: the others are not looked at.
NASTY = {
  "newlines after the stop": (template(CHATTY + "\n\n\n"), NO_CALLS, "'look'"),
  "nothing between turns": (template(CHATTY), NO_CALLS, "'look'"),
  "prompt by message count": (
    template(
      CHATTY,
      after="{% if add_generation_prompt %}<|im_start|>assistant{{ '!' * "
      "(messages | length) }}\n{% endif %}",
    ),
    set(),
    "its generation prompt",
  ),
  "stop only in the last turn": (
    template(
      HEAD + "{{ m.content }}{{ '<|im_end|>' if loop.last or m.role != "
      "'assistant' }}\n"
    ),
    NO_CALLS,
    "'look'",
  ),
  "another stop in the last turn": (
    template(
      HEAD + "{{ m.content }}{{ '</s>' if loop.last and m.role == 'assistant' "
      "else '<|im_end|>' }}"
    ),
    NO_CALLS,
    "'look'",
  ),
  "no stop in the last turn": (
    template(HEAD + "{{ m.content }}{{ '<|im_end|>' if not loop.last or m.role"
             " != 'assistant' }}"),
    NO_CALLS, "a reply without a stop token",
  ),
  "no stop at all": (
    template("{{ m.role }}: {{ m.content }}\n",
             after="{% if add_generation_prompt %}assistant: {% endif %}"),
    set(),
    "a reply without a stop token",
  ),
  "stops by opening the next": (
    template("</s>{{ m.role }}\n{{ m.content }}",
             after="{% if add_generation_prompt %}</s>assistant\n{% endif %}"),
    NO_CALLS, "a reply without a stop token",
  ),
  "the stop is BOS": (
    template("{{ m.role }} {{ m.content }}<s>",
             after="{% if add_generation_prompt %}assistant {% endif %}"),
    set(),
    "a reply without a stop token",
  ),
  "header in the middle": (
    template(HEAD + "assistant\n{{ m.content }}<|im_end|>\n",
             after=PROMPT.replace("\n{%", "\nassistant\n{%")),
    NO_CALLS,
    "'look'",
  ),
  "strips": (
    template(HEAD + "{{ m.content | trim }}<|im_end|>"), NO_CALLS, "'look'",
  ),
  "replies in JSON": (
    template(HEAD + "{{ m.content | tojson }}<|im_end|>"),
    NO_CALLS - {"thinking"},  # Its <think> tags are JSON too, and all there.
    None,
  ),
  "replies in ASCII": (
    template(HEAD + "{{ m.content | tojson(ensure_ascii=true) }}<|im_end|>"),
    NO_CALLS - {"thinking"},
    None,
  ),
  "replies rewritten": (
    template(HEAD + "{{ m.content | replace('e', 'E') | replace('4', 'four') "
             "| replace('x', 'X') }}<|im_end|>"),
    set(),
    "leaves out or changes",
  ),
  "replies cut": (
    template(HEAD + "{{ m.content[:3] }}<|im_end|>"),
    {"one turn"},
    "leaves out or changes",
  ),
  "the whole in one JSON": (
    "{{ messages | tojson }}" + PROMPT, set(), "its generation prompt",
  ),
  "system dropped": (
    template("{% if m.role != 'system' %}" + CHATTY + "{% endif %}"),
    NO_CALLS - {"system"},
    "leaves out or changes",
  ),
  "system moved to the last user turn": (
    template(
      "{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ system if "
      "loop.last and m.role == 'user' }}{{ m.content }}<|im_end|>{% endif %}",
      before="{% if messages[0].role == 'system' %}{% set system = "
      "messages[0].content %}{% endif %}",
    ),
    NO_CALLS,
    "'look'",
  ),
  "system repeated": (
    template(
      "{% if m.role == 'user' %}<|im_start|>system\n{{ messages[0].content }}"
      "<|im_end|>{% endif %}" + CHATTY
    ),
    NO_CALLS,
    "'look'",
  ),
  "turns in reverse": (
    "{% for m in messages[::-1] %}" + CHATTY + "{% endfor %}" + PROMPT,
    set(),
    "its generation prompt",
  ),
  "only the last turns": (
    "{% for m in messages[-2:] %}" + CHATTY + "{% endfor %}" + PROMPT,
    {"one turn"}, "leaves out or changes",
  ),
  "says the length": (
    template(CHATTY, before="{{ messages | length }} turns\n"),
    NO_CALLS, "its generation prompt",
  ),
  "generation prompt always": (
    template(CHATTY, after="<|im_start|>assistant\n"), NO_CALLS, "'look'",
  ),
  "no generation prompt": (
    template(CHATTY, after=""),
    NO_CALLS, "'look'",
  ),
  "refuses": (
    template("{{ raise_exception('Not today.') }}"), set(), "Not today.",
  ),
  "date": (
    template(CHATTY, before="{{ strftime_now('%d %B %Y') }}\n"),
    NO_CALLS,
    "'look'",
  ),
  "calls in Python": (
    CHATML.replace("call.function.arguments | tojson",
                   "call.function.arguments | string"),
    ALL,
    "",
  ),
  "calls without content only": (
    template(
      HEAD + "{% if m.content is none %}{% for c in m.tool_calls %}"
      "{{ c.function.name + c.function.arguments }}{% endfor %}{% else %}"
      "{{ m.content }}{% endif %}<|im_end|>"
    ),
    ALL,
    "",
  ),
  "looks at contents": (
    template(
      "{% if m.content[0:1] in ['H', '2', 't', 'u', 'W', 'B', ' ', '4', 'o'] "
      "or m.role != 'user' %}" + CHATTY + "{% endif %}"
    ),
    NO_CALLS - {"thinking"},
    None,
  ),
  "forgets thinking": (FORGETFUL, NO_CALLS, "'look'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
  folder = tmp_path_factory.mktemp("nasty")
  return {
    name: load_tokenizer(byte_level(folder / str(i), source))
    for i, (name, (source, _, _)) in enumerate(NASTY.items())
  }


@pytest.mark.parametrize("name", NASTY)
def test_law_1_or_a_reason(tokenizers, name):
  one = tokenizers[name]
  _, must, reason = NASTY[name]
  options = RenderOptions({"date": "2026-01-31"})
  for label, row in ROWS.items():
    if label not in must:
      if reason is not None:
        with pytest.raises(RowError, match=re.escape(reason)):
          encode.encode_row(row, one, options, max_length=9999)
      continue
    examples = encode.encode_row(row, one, options, max_length=9999).examples
    turns = [i for i, m in enumerate(row.messages) if m.role == "assistant"]
    found = [(e, *run) for e in examples for run in runs(e.loss_weights)]
    assert len(found) == len(turns)
    for (made, start, end), turn in zip(found, turns, strict=True):
      tokens = made.tokens.tolist()
      so_far = Conversation(row.messages[:turn], row.tools)
      assert tokens[:start] == encode.prompt_ids(so_far, one, options)
      stops = [token in one.stop_ids for token in tokens[start:end]]
      assert stops == [False] * (end - start - 1) + [True]
      said = one.decode(tokens[start:end], skip_special=False)
      message = row.messages[turn]
      assert message.content.strip() in said
      for call in message.tool_calls:
        assert call.name in said
        assert '"n": 3' in said
        assert '"the \\"cat\\""' in said
    # Never all, and never nothing.
    for made in examples:
      assert 0 < (made.loss_weights > 0).sum() < len(made.tokens) - 1


def test_a_stop_that_is_bos(tmp_path):
  source = "<s>" + template("{{ m.role }}\n{{ m.content }}<s>", after="")
  folder = byte_level(tmp_path, source + "{% if add_generation_prompt %}"
                      "assistant\n{% endif %}")  # fmt: skip
  (folder / "generation_config.json").write_text(
    json.dumps({"eos_token_id": [1]})
  )
  one = load_tokenizer(folder)
  (made,) = encode.encode(ROWS["three turns"], one, max_length=999)
  assert [
    one.decode(made.tokens[a:b].tolist(), skip_special=False)
    for a, b in runs(made.loss_weights)
  ] == ["text 0<s>", "text 1<s>", "text 2<s>"]
  assert made.loss_weights[0] == 0


def test_an_answer_to_nothing_is_refused(tmp_path):
  """A prompt inside the loop: of no turns there is none."""
  source = LOOP + CHATTY + "{% if loop.last %}" + PROMPT + "{% endif %}"
  one = load_tokenizer(byte_level(tmp_path, source + "{% endfor %}"))
  turns = (Message("assistant", "Hello."), *ROWS["one turn"].messages)
  with pytest.raises(RowError, match="nothing comes before"):
    encode.encode(Conversation(turns), one, max_length=999)
  unasked = Message("assistant", "Hello.", weight=0.0)
  (made,) = encode.encode(
    Conversation((unasked, *turns[1:])), one, max_length=999
  )
  ((start, end),) = runs(made.loss_weights)
  assert one.decode(made.tokens[start:end].tolist()) == "4"
