"""The grammar of turns, and errors that say where."""

import itertools
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_jax.data import conversation
from sft_jax.data.conversation import (
  Conversation,
  Message,
  NothingToTrain,
  RowError,
  ToolCall,
  check,
)

USER = Message("user", "Hi")
REPLY = Message("assistant", "Hello.")
CALL = Message("assistant", "", tool_calls=(ToolCall("look", {"at": 1}),))
RESULT = Message("tool", "A cat.")


@pytest.mark.parametrize(
  "messages",
  [
    (USER,),
    (USER, REPLY),
    (Message("system", "Be kind."), USER, REPLY, USER, REPLY),
    (USER, CALL, RESULT, RESULT, REPLY),
    (USER, CALL, RESULT, CALL, RESULT, REPLY),
    (USER, Message("assistant", "", reasoning="Well.")),
    (USER, Message("assistant", "Hello.", weight=0.5)),
  ],
)
def test_grammar_accepts(messages):
  made = Conversation(messages)
  assert check(made) is made


@pytest.mark.parametrize(
  ("messages", "index", "said"),
  [
    ((Message("bot", "Hi"),), 0, "role 'bot'"),
    ((USER, Message("system", "Late.")), 1, "system turn after a user"),
    ((USER, Message("assistant", "")), 1, "an empty assistant turn"),
    ((USER, RESULT), 1, "a tool turn after user"),
    ((RESULT,), 0, "a tool turn after nothing"),
    ((USER, REPLY, RESULT), 2, "a tool turn after assistant"),
    ((Message("user", "Hi", tool_calls=CALL.tool_calls),), 0, "tool calls in"),
    ((USER, Message("assistant", "Hi", weight=-1.0)), 1, "weight -1.0"),
    ((USER, Message("assistant", "Hi", weight=float("nan"))), 1, "weight nan"),
    ((Message("user", "Hi", weight=1.0), REPLY), 0, "weight 1.0 on a user"),
  ],
)
def test_grammar_refuses_and_names_the_turn(messages, index, said):
  with pytest.raises(RowError) as error:
    check(Conversation(messages, source="rows.jsonl:7"))
  assert str(error.value).startswith(f"rows.jsonl:7 messages[{index}]: got ")
  assert said in str(error.value)
  assert "expected" in str(error.value)


@pytest.mark.parametrize("spans", [None, (), ((0, 6),), ((0, 2), (2, 3))])
def test_spans_within_content(spans):
  check(Conversation((USER, Message("assistant", "Hello.", spans=spans))))


@pytest.mark.parametrize(
  "spans",
  [((0, 7),), ((-1, 3),), ((2, 2),), ((3, 2),), ((0, 3), (2, 4))],
)
def test_spans_outside_content_or_each_other(spans):
  message = Message("assistant", "Hello.", spans=spans)
  with pytest.raises(RowError, match="the trained span"):
    check(Conversation((USER, message)))


def test_spans_are_for_assistants():
  message = Message("user", "Hi", spans=((0, 1),))
  with pytest.raises(RowError, match="spans in a user turn"):
    check(Conversation((message,)))


def test_default_weights():
  assert REPLY.loss_weight == 1.0
  assert USER.loss_weight == RESULT.loss_weight == 0.0
  assert Message("assistant", "x", weight=0.0).loss_weight == 0.0


def test_messages_or_text_or_ids_but_no_two():
  assert Conversation(text="Once").text == "Once"
  with pytest.raises(RowError, match="no messages"):
    Conversation()
  with pytest.raises(RowError, match="both messages and text"):
    Conversation((USER,), text="Once")
  with pytest.raises(RowError, match="both text and ids"):
    Conversation(text="Once", ids=(1,), id_weights=(1.0,))
  with pytest.raises(RowError, match="1 weights for 2 ids"):
    Conversation(ids=(1, 2), id_weights=(1.0,))
  assert Conversation(ids=(1, 2), id_weights=(0.0, 1.0)).text is None


def test_errors_survive_pickling():
  # Worker processes send errors home by pickle.
  row = RowError("rows.jsonl:7", "this", "that", "Do so.")
  nothing = NothingToTrain("empty answer", "rows.jsonl:7")
  assert str(pickle.loads(pickle.dumps(row))) == str(row)
  assert str(row) == "rows.jsonl:7: got this; expected that. Do so."
  again = pickle.loads(pickle.dumps(nothing))
  assert (again.reason, str(again)) == (
    "empty answer",
    "empty answer: rows.jsonl:7",
  )


CONTENTS = st.text("ab", min_size=1, max_size=3)
ANY_TURN = st.one_of(
  st.builds(Message, st.just("user"), CONTENTS),
  st.builds(
    Message,
    st.just("assistant"),
    CONTENTS,
    reasoning=st.sampled_from([None, None, "r"]),
    tool_calls=st.sampled_from([(), (), (ToolCall("f", {}),)]),
    weight=st.sampled_from([None, 0.0]),
  ),
  st.builds(Message, st.just("tool"), CONTENTS),
)


@given(
  st.booleans(),
  st.lists(ANY_TURN, min_size=1, max_size=6),
  st.sampled_from(["", "turns", "system", "all"]),
)
def test_merging_keeps_every_text_weight_and_call_in_order(system, turns, what):
  before = [*([Message("system", "s")] if system else []), *turns]
  made = conversation.merged(Conversation(tuple(before)), what).messages

  def said(messages):
    return [
      (one.loss_weight, piece)
      for one in messages
      for piece in [one.reasoning, *one.content.split("\n\n")]
      if piece
    ]

  assert said(made) == said(before)
  calls = [call for one in before for call in one.tool_calls]
  assert [call for one in made for call in one.tool_calls] == calls
  users = [one.role == "user" for one in made]
  if what in ("turns", "all"):
    assert not any(a and b for a, b in itertools.pairwise(users))
  if what in ("system", "all") and system and turns[0].role == "user":
    assert made[0].content.startswith("s\n\n")
  if not what:
    assert list(made) == before
