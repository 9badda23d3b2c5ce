"""Replies: what a scripted model emits comes back as the Message it meant."""

import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import tokenizers

import tiny
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.conversation import Conversation, Message, ToolCall
from sft_jax.data.encoding import encode
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from sft_jax.inference import generate
from sft_jax.training.build import build, evals

TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
  "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
  "{% if opened %}<think>\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  """Bytes and five special tokens, two of which stop."""
  folder = tmp_path_factory.mktemp("tokenizer")
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  model = tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
  made = tokenizers.Tokenizer(model)
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  made.decoder = tokenizers.decoders.ByteLevel()
  made.add_special_tokens(
    ["<|im_start|>", "<|im_end|>", "<|end|>", "<think>", "</think>"]
  )
  made.save(str(folder / "tokenizer.json"))
  config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  stops = {"eos_token_id": [257, 258]}
  (folder / "generation_config.json").write_text(json.dumps(stops))
  return load_tokenizer(folder)


class Scripted:
  """A model that says the same whatever it is asked: `params` is its script.

  The cache holds each row's prompt length, seen at the prefill.
  """

  config = SimpleNamespace(position_limit=None)

  @staticmethod
  def init_cache(batch, length):
    del length
    return jnp.zeros((batch,), jnp.int32)

  @staticmethod
  def decode(params, tokens, positions, cache):
    del params
    if tokens.shape[1] > 1:
      cache = jnp.max(positions, axis=1)
    return (positions - cache[:, None])[..., None], cache

  @staticmethod
  def logits(params, hidden):
    return jax.nn.one_hot(params[hidden[..., 0]], 300)


def ask(text, **kwargs):
  message = Message("user", text)
  return Conversation(messages=(message,), **kwargs)


def say(tokenizer, script, questions=("Hi",), **kwargs):
  kwargs = {"max_new_tokens": 80, **kwargs}
  return generate.generate(
    Scripted, jnp.asarray(tokenizer.encode(script)), tokenizer,
    [ask(q) for q in questions], **kwargs,
  )  # fmt: skip


def test_reply(tokenizer):
  for stop in ("<|im_end|>", "<|end|>"):
    for reply in say(tokenizer, f" Hé! {stop}never", ["Hi", "A longer one?"]):
      assert reply.text == "Hé!"
      assert reply.stopped
      assert tokenizer.decode(reply.tokens) == " Hé! "
      assert reply.message == Message("assistant", "Hé!")


def test_out_of_tokens(tokenizer):
  (reply,) = say(tokenizer, "abcdefg<|im_end|>", max_new_tokens=7)
  assert (reply.text, reply.stopped) == ("abcdefg", False)
  (reply,) = say(tokenizer, "abcdefg<|im_end|>", max_new_tokens=8)
  assert (reply.text, reply.stopped) == ("abcdefg", True)


def test_thinking_is_not_what_is_said(tokenizer):
  (reply,) = say(tokenizer, "<think>\n2+2\n</think>\n\n4<|im_end|>")
  assert reply.message == Message("assistant", "4", reasoning="2+2")
  assert reply.text == "4"
  # The same when the generation prompt has opened it.
  (reply,) = say(
    tokenizer,
    "2+2\n</think>\n\n4<|im_end|>",
    options=RenderOptions({"opened": True}),
  )
  assert reply.message == Message("assistant", "4", reasoning="2+2")


def test_stray_special_tokens_show(tokenizer):
  (reply,) = say(tokenizer, "a<|im_start|>b<|im_end|>")
  assert reply.text == "a<|im_start|>b"


def test_prompts_are_those_of_training(tokenizer):
  """The sampler is given `encode.prompt_ids` and nothing else."""
  seen = []

  class Watching(Scripted):
    @staticmethod
    def decode(params, tokens, positions, cache):
      jax.debug.callback(
        lambda t, p: seen.append(t[0][p[0] >= 0].tolist()), tokens, positions
      )
      return Scripted.decode(params, tokens, positions, cache)

  script = jnp.asarray(tokenizer.encode("<|im_end|>"))
  conversation = ask("Hi")
  options = RenderOptions({"opened": True})
  generate.generate(
    Watching,
    script,
    tokenizer,
    [conversation],
    max_new_tokens=2,
    options=options,
  )
  jax.effects_barrier()
  assert seen == [encode.prompt_ids(conversation, tokenizer, options)]


def test_no_more_tokens_than_the_model_has_positions(tokenizer):
  prompt = encode.prompt_ids(ask("Hi"), tokenizer, RenderOptions())

  class Short(Scripted):
    config = SimpleNamespace(position_limit=len(prompt) + 7)

  def answer(max_new_tokens):
    return generate.generate(
      Short, jnp.asarray(tokenizer.encode("abcdefgh")), tokenizer, [ask("Hi")],
      max_new_tokens=max_new_tokens,
    )  # fmt: skip

  assert answer(7)[0].text == "abcdefg"
  with pytest.raises(ValueError, match="and may get 8 more; expected at most"):
    answer(8)


def test_nothing_to_answer(tokenizer):
  assert say(tokenizer, "x", questions=[]) == []


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": [1, 2]}}\n</tool_call>'
ADD = ToolCall("add", {"a": [1, 2]})


@pytest.mark.parametrize(
  ("text", "content", "reasoning", "calls"),
  [
    ("4", "4", None, ()),
    ("", "", None, ()),
    ("<think></think>4", "4", "", ()),
    ("\n<think>\na\n\nb\n</think>\n\n4\n", "4", "a\n\nb", ()),
    ("<think>and so on", "", "and so on", ()),
    # Only the start of a reply is thinking.
    ("Use <think> tags</think>", "Use <think> tags</think>", None, ()),
    (CALL, "", None, (ADD,)),
    (f"Wait.\n{CALL}\n{CALL}", "Wait.", None, (ADD, ADD)),
    (f"<think>call</think>{CALL}", "", "call", (ADD,)),
    # A call that is only thought of is not made.
    (f"<think>{CALL}</think>No.", "No.", CALL, ()),
  ],
)
def test_parse(text, content, reasoning, calls):
  want = Message("assistant", content, reasoning, calls)
  assert generate.parse(text) == want


@pytest.mark.parametrize(
  "body",
  [
    "{",
    "[]",
    "null",
    '"add"',
    "{}",
    '{"name": "add"}',
    '{"name": 1, "arguments": {}}',
    '{"name": "add", "arguments": "{}"}',
    '{"name": "add", "arguments": {}} {}',
    "[" * 200_000,
  ],
)
def test_malformed_calls_stay_in_the_content(body):
  text = f"{CALL}<tool_call>{body}</tool_call>"
  assert generate.parse(text) == Message("assistant", text)


def test_unclosed_call_stays_in_the_content():
  text = '<tool_call>{"name": "add", "arguments": {}}'
  assert generate.parse(text) == Message("assistant", text)


def test_a_stop_string_cuts_the_text_exactly_there(tokenizer):
  """Wherever the tokens and the looks of the host fall; rows apart."""
  script = "One. Two. END Three.<|im_end|>"
  for every in (1, 3, 64):
    for strings, want in (
      (["END"], "One. Two."),
      (["Two", "One. T"], "One. Two."[:0]),
      ([" Three", "ND"], "One. Two. E"),
      (["nowhere"], "One. Two. END Three."),
    ):
      for reply in say(
        tokenizer, script, ["Hi", "Longer?"], stop_strings=strings, every=every
      ):
        assert (reply.text, reply.stopped) == (want, True)
  (reply,) = say(tokenizer, script, stop_strings=["END"])
  # The tokens are all that was emitted when it was found.
  assert tokenizer.decode(reply.tokens) == "One. Two. END"


def test_a_stream_grows_and_takes_nothing_back(tokenizer):
  """No half characters, and nothing that becomes a stop string."""
  pieces = list(
    generate.stream(
      Scripted, jnp.asarray(tokenizer.encode("Hé! x END<|im_end|>")),
      tokenizer, [ask("Hi")], max_new_tokens=80, every=1,
      stop_strings=["END"],
    )
  )  # fmt: skip
  texts = [piece.text for piece in pieces]
  assert texts[:4] == ["H", "H", "Hé", "Hé!"]
  assert texts[-1] == "Hé! x "
  for shorter, longer in itertools.pairwise(texts):
    assert longer.startswith(shorter)
  assert [piece.reply for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
  assert pieces[-1].reply.text == "Hé! x"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  folder = tmp_path_factory.mktemp("row_replies")
  model = tiny.model_folder(folder / "model")
  text = {"text": "A raw text has no prompt."}
  held = tiny.rows_file(folder / "held.jsonl", [text, *tiny.ROWS[8:]])
  rows = tiny.rows_file(folder / "rows.jsonl", tiny.ROWS[:8])
  config = tiny.config(
    *(folder, model, rows),
    data__eval=str(held),
    eval__max_new_tokens=6,
    eval__samples=3,
  )
  run = build.build_run(config, lambda line: None)
  params = {**run.state.params, **run.state.frozen}
  return config, run, params


def test_a_row_gets_the_reply_that_its_conversation_gets(found):
  config, run, params = found
  (made,) = evals.sample_replies(config, run, params).values()
  assert len(made) == config.eval.samples == 3
  for row, answered in zip(tiny.ROWS[8:], made, strict=False):
    asked = Conversation((Message("user", row["instruction"]),))
    (reply,) = generate.generate(
      run.model, params, run.tokenizer, [asked], max_new_tokens=6
    )
    said = run.tokenizer.decode(reply.tokens, skip_special=False)
    assert answered["reply"] == said
    assert answered["stopped"] == reply.stopped
    assert row["instruction"] in answered["prompt"]
    # The row's own reply is whole: up to its stop token.
    stops = [
      run.tokenizer.decode([stop], skip_special=False)
      for stop in run.tokenizer.stop_ids
    ]
    assert answered["row"] in [row["output"] + stop for stop in stops]
  # The raw text is the first row, and is passed over.
  assert made[0]["where"] == "held.jsonl:2"
  json.dumps(made)


def test_behaviors_make_it_superfluous(found):
  config, run, params = found
  assert evals.sample_replies(config, run._replace(items=[1]), params) == {}
  assert evals.sample_replies(config, run._replace(held_out=None), params) == {}


def test_samples_are_paired():
  old = {"where": "w", "prompt": "p", "reply": "a", "stopped": False}
  new = {**old, "reply": "b", "stopped": True}
  (sample,) = evals.paired_samples({"replies": [old]}, {"replies": [new]})
  assert sample["before"] == {"text": "a", "stopped": False}
  assert sample["after"] == {"text": "b", "stopped": True}
  assert evals.paired_samples({}, {}) == []
  # Forced on with another number of samples.
  assert evals.paired_samples({}, {"replies": [new]}) == []
