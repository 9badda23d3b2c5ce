"""What is trained of a conversation under each render option, in ids."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.conversation import (
  Conversation,
  Message,
  NothingToTrain,
  RowError,
  ToolCall,
)
from sft_jax.data.encoding import encode
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from tiny_rows import chat
from tiny_tokenizers import (
  CHATML,
  FORGETFUL,
  GLUED,
  byte_level,
  load_all,
  metaspace,
  sentence_piece,
)

# Opens a think block in its prompt that its replies do not have.
THINKER = CHATML.replace(
  "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"
)
THINKING = CHATML.replace(
  "{{ m.content }}",
  "{% if m.reasoning_content is defined %}<think>\n{{ m.reasoning_content }}"
  "\n</think>\n\n{% endif %}{{ m.content }}",
)
MAKERS = {
  "byte_level": (byte_level, CHATML),
  "sentence_piece": (sentence_piece, CHATML),
  "metaspace": (metaspace, CHATML),
  "glued": (metaspace, GLUED),
  "thinker": (byte_level, THINKER),
  "thinking": (byte_level, THINKING),
  "forgetful": (byte_level, FORGETFUL),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  return load_all(tmp_path_factory.mktemp("tokenizers"), MAKERS)


def trained(row, tokenizer, **options):
  """The trained text of each Example, runs apart by |."""
  made = encode.encode(row, tokenizer, max_length=999, **options)
  texts = []
  for one in made:
    edges = np.flatnonzero(np.diff([0, *(one.loss_weights > 0), 0]))
    runs = zip(edges[::2], edges[1::2], strict=True)
    texts.append(
      "|".join(
        tokenizer.decode(one.tokens[a:b].tolist(), skip_special=False)
        for a, b in runs
      )
    )
  return texts


THOUGHTS = chat(
  "u:the cat",
  Message("assistant", "the dog", "a house"),
  "u:a house",
  Message("assistant", "the town", "the hill"),
)
TWO = chat("u:the cat", "a:the dog", "u:a house", "a:the town")


# -- generation_prompt --------------------------------------------------------


def test_omit_trains_and_samples_from_the_common_prefix(tiny):
  one = tiny["thinker"]
  with pytest.raises(RowError) as error:
    encode.encode(TWO, one, max_length=999)
  # Both texts, and the ways out.
  assert "'im_start|>assistant\\n<think>\\n' against" in str(error.value)
  assert "data.generation_prompt to omit" in str(error.value)
  options = RenderOptions(generation_prompt="omit")
  assert trained(TWO, one, generation_prompt="omit") == [
    "the dog<|im_end|>|the town<|im_end|>"
  ]
  (made,) = encode.encode_row(TWO, one, options, max_length=999).examples
  for count in (1, 3):
    so_far = Conversation(TWO.messages[:count])
    prompt = encode.prompt_ids(so_far, one, options)
    assert one.decode(prompt, skip_special=False).endswith("assistant\n")
    assert made.tokens[: len(prompt)].tolist() == prompt
    assert made.loss_weights[len(prompt)] == 1


def test_omit_refuses_what_is_no_constant_end(tiny, tmp_path):
  # The prompt's end depends on the row: what inference strips would differ.
  source = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{{ '<think>' if messages | length > 1 }}{% endif %}",
  )
  one = load_tokenizer(byte_level(tmp_path, source))
  assert trained(chat("u:Hi", "a:Hello."), one, generation_prompt="omit")
  with pytest.raises(RowError, match="does not begin with"):
    trained(TWO, one, generation_prompt="omit")


# -- train_on -----------------------------------------------------------------


def test_last_turn(tiny):
  assert trained(TWO, tiny["byte_level"], train_on="last_turn") == [
    "the town<|im_end|>"
  ]
  rest = chat("u:Hi", "a:Hello.", "u:Bye", Message("assistant", "x", weight=0))
  assert trained(rest, tiny["byte_level"], train_on="last_turn") == [
    "Hello.<|im_end|>"
  ]


def test_all_trains_the_rendering_as_text(tiny):
  one = tiny["byte_level"]
  (made,) = encode.encode(TWO, one, max_length=999, train_on="all")
  assert made.loss_weights.tolist() == [0] + [1] * (len(made.tokens) - 1)
  assert one.decode(made.tokens.tolist(), skip_special=False).endswith(
    "<|im_start|>assistant\nthe town<|im_end|>\n"
  )
  # No turn is looked for, and no generation prompt.
  assert trained(chat("u:the cat"), tiny["thinker"], train_on="all")
  odd = chat("u:Hi", Message("assistant", "Hello.", weight=0.5))
  with pytest.raises(RowError, match="a weight or spans of its own"):
    trained(odd, one, train_on="all")
  with pytest.raises(ValueError, match="reasoning: got 'hide' with"):
    RenderOptions(train_on="all", reasoning="hide")


# -- reasoning ----------------------------------------------------------------


def test_reasoning(tiny):
  one = tiny["thinking"]
  assert trained(THOUGHTS, one) == [
    "<think>\na house\n</think>\n\nthe dog<|im_end|>|"
    "<think>\nthe hill\n</think>\n\nthe town<|im_end|>"
  ]
  assert trained(THOUGHTS, one, reasoning="hide") == [
    "the dog<|im_end|>|the town<|im_end|>"
  ]
  (made,) = encode.encode(THOUGHTS, one, max_length=999, reasoning="hide")
  assert "<think>\na house" in one.decode(made.tokens.tolist())
  (made,) = encode.encode(THOUGHTS, one, max_length=999, reasoning="strip")
  assert "<think>" not in one.decode(made.tokens.tolist())
  # Inference strips the thinking of earlier turns too.
  so_far = Conversation(THOUGHTS.messages[:3])
  prompt = encode.prompt_ids(so_far, one, RenderOptions(reasoning="strip"))
  assert made.tokens[: len(prompt)].tolist() == prompt


def test_hidden_thinking_before_a_call(tiny):
  call = ToolCall("look", {"at": "the cat"})
  row = chat("u:the cat", Message("assistant", "", "a house", (call,)))
  assert trained(row, tiny["thinking"], reasoning="hide") == [
    '<call>look {"at": "the cat"}</call><|im_end|>'
  ]


def test_thinking_in_a_template_that_reads_none_and_history(tiny):
  # It goes into the content, and is hidden there as well.
  assert trained(THOUGHTS, tiny["byte_level"], reasoning="hide") == [
    "the dog<|im_end|>|the town<|im_end|>"
  ]
  assert trained(THOUGHTS, tiny["forgetful"], reasoning="hide") == [
    "the dog<|im_end|>",
    "the town<|im_end|>",
  ]
  only = chat("u:Hi", Message("assistant", "", "a house"))
  with pytest.raises(NothingToTrain) as error:
    trained(only, tiny["thinking"], reasoning="strip")
  assert error.value.reason == "only reasoning"


# -- a message's own spans ----------------------------------------------------


@pytest.mark.parametrize(
  ("spans", "text"),
  [
    (((4, 7),), " dog"),
    (((0, 3), (8, 11)), "the| and"),
    (((12, 19),), " the cat<|im_end|>"),
    (((0, 19),), "the dog and the cat<|im_end|>"),
    # Half a token is not trained.
    (((5, 11),), " and"),
  ],
)
def test_spans(tiny, spans, text):
  turn = Message("assistant", "the dog and the cat", spans=spans)
  assert trained(chat("u:Hi", turn), tiny["byte_level"]) == [text]


def test_spans_among_spaces_and_thinking(tiny):
  turn = Message("assistant", "  the dog ", "a house", spans=((6, 9),))
  # Whoever trains the last word trains to stop after it.
  for name in ("byte_level", "thinking", "sentence_piece", "metaspace"):
    (text,) = trained(chat("u:Hi", turn), tiny[name])
    assert text.strip() == "dog <|im_end|>"


def test_spans_that_train_nothing_are_dropped_and_counted(tiny):
  for spans in ((), ((5, 6),)):
    turn = Message("assistant", "the dog", spans=spans)
    made = encode.encode_row(
      chat("u:Hi", turn), tiny["byte_level"], RenderOptions(), max_length=99
    )
    assert made == ([], {"nothing trained": 1}, {})


def test_spans_must_be_certain(tiny, tmp_path):
  source = CHATML.replace("{{ m.content }}", "{{ m.content | tojson }}")
  one = load_tokenizer(byte_level(tmp_path, source))
  turn = Message("assistant", 'say "the"', spans=((0, 3),))
  with pytest.raises(RowError, match="the content cannot be separated"):
    trained(chat("u:Hi", turn), one)
  assert trained(chat("u:Hi", Message("assistant", 'say "a"')), one) == [
    '"say \\"a\\""<|im_end|>'
  ]


# -- over_long ----------------------------------------------------------------


def test_a_cut_answer_is_counted_and_has_no_stop(tiny):
  one = tiny["byte_level"]
  row = chat("u:the cat", "a:" + "the dog " * 20)
  options = RenderOptions(over_long="truncate")
  (made,), dropped, notes = encode.encode_row(row, one, options, max_length=40)
  assert (dropped, notes) == ({}, {"cut answer": 1})
  assert not set(made.tokens[made.loss_weights > 0]) & set(one.stop_ids)
  assert len(made.tokens) == len(made.roles) == 40


# -- control tokens -----------------------------------------------------------

BITS = (
  "<|im_end|>,<|im_start|>,</s>,<s>,<|im_,end|>, ,\n,the cat,ü,😀,assistant\n,"
  "<|im_end|>\n<|im_start|>user\n"
)
CONTROL = st.lists(
  st.sampled_from(BITS.split(",")), min_size=1, max_size=6
).map("".join)


@settings(max_examples=25, deadline=None)
@given(asked=CONTROL, answer=CONTROL)
@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece", "metaspace"])
def test_escaped_control_tokens_are_text(tiny, kind, asked, answer):
  # A turn that ends so is a rendered prompt, and refused as one.
  assume(not asked.rstrip().endswith("<|im_start|>assistant"))
  one = tiny[kind]
  row = chat(f"u:{asked}", f"a:the {answer}", "u:Bye", "a:Goodbye.")
  options = RenderOptions(control_tokens="escape")
  (made,) = encode.encode_row(row, one, options, max_length=9999).examples
  tokens = made.tokens.tolist()
  plain = encode.encode(
    chat("u:x", "a:the y", "u:Bye", "a:Goodbye."), one, max_length=999
  )[0].tokens.tolist()
  # As many control tokens as without any in the texts, and in their order.
  control = set(one.special_tokens.values())
  assert [t for t in tokens if t in control] == [
    t for t in plain if t in control
  ]
  # The characters are all there.
  shown = one.decode(tokens, skip_special=False)
  for text in (asked, f"the {answer}"):
    assert text.strip() in shown
  # And inference sees the same.
  prompt = encode.prompt_ids(Conversation(row.messages[:1]), one, options)
  assert tokens[: len(prompt)] == prompt
  assert made.loss_weights[len(prompt)] == 1
  stops = [t for t in made.tokens[made.loss_weights > 0] if t in one.stop_ids]
  assert len(stops) == 2


@pytest.mark.parametrize("kind", MAKERS)
def test_escaping_changes_no_other_ids(tiny, kind):
  """A literal range without control tokens gives the very ids of `encode`."""
  one = tiny[kind]
  for text in ("<s>the cat<|im_end|>\nü 😀 the", "  the  dog</s> a", "a"):
    plain = one.encode_with_offsets(text)
    ranges = [(text.index("a"), text.index("a") + 1)]
    assert one.encode_with_offsets(text, ranges) == plain


def test_control_tokens_made_by_text_and_template_together(tmp_path):
  source = CHATML.replace("{{ m.content }}", "<{{ m.content }}|>")
  one = load_tokenizer(byte_level(tmp_path, source))
  row = chat("u:|im_end", "a:Hi")
  with pytest.raises(RowError, match="made up by a text and the template"):
    trained(row, one, control_tokens="error")
  assert trained(row, one) == ["<Hi|><|im_end|>"]


def test_allowed_control_tokens_are_control_tokens(tiny):
  one = tiny["byte_level"]
  row = chat("u:a <s> b", "a:Hi")
  (made,) = encode.encode(row, one, max_length=99, control_tokens="allow")
  assert one.bos_id in made.tokens.tolist()
  with pytest.raises(RowError, match="control_tokens to escape"):
    trained(row, one, control_tokens="error")
  # A stop token said in the middle of a reply would end it there.
  with pytest.raises(RowError, match="after the stop token"):
    trained(chat("u:a", "a:b</s> c"), one, control_tokens="allow")


def test_raw_text_is_escaped_and_counted(tiny):
  for name in ("byte_level", "sentence_piece"):
    one = tiny[name]
    row = encode.encode_row(
      Conversation(text="a </s> b"), one, RenderOptions(), max_length=99
    )
    (made,) = row.examples
    assert row.notes == {"escaped control token": 1}
    assert made.tokens.tolist().count(one.eos_id) == 1
    assert one.decode(made.tokens.tolist()) == "a </s> b"


# -- ids made elsewhere -------------------------------------------------------


def test_given_ids_are_trained_as_they_are(tiny):
  one = tiny["byte_level"]
  row = Conversation(ids=(5, 6, 7), id_weights=(1, 0, 0.5), source="rows:1")
  (made,) = encode.encode(row, one, max_length=9)
  assert made.tokens.tolist() == [5, 6, 7]
  assert made.loss_weights.tolist() == [0, 0, 0.5]
  assert {TOKEN_ROLES[part] for part in made.roles} == {"text"}
  strange = Conversation(ids=(5, 10**6), id_weights=(1, 1), source="rows:1")
  with pytest.raises(RowError, match=r"rows:1: got the id 1000000; expected"):
    encode.encode(strange, one, max_length=9)
  with pytest.raises(NothingToTrain) as error:
    encode.encode(
      Conversation(ids=(5, 6), id_weights=(1, 0)), one, max_length=9
    )
  assert error.value.reason == "no trained token"
  for how, left in (("drop", 0), ("truncate", 1)):
    long = Conversation(ids=(5,) * 12, id_weights=(1,) * 12)
    found = encode.encode_row(
      long, one, RenderOptions(over_long=how), max_length=9
    )
    assert len(found.examples) == left
    assert found.dropped == ({} if left else {"over long": 1})
