"""Replies become rows only when they pass, and every one is accounted for."""

import pytest

from sft_jax.data.conversation import Conversation, Message, RowError, ToolCall
from sft_jax.data.formats import formats
from sft_jax.evals import synthesis
from sft_jax.evals.behaviors import Item
from sft_jax.inference.generate import Reply


def item(n, text="yes", group="g", **fields):
  turns = (Message("user", f"Question number {n}?"),)
  return Item(
    group,
    Conversation(messages=turns, **fields),
    ({"check": "contains", "text": text}, {"check": "max_words", "count": 3}),
    f"p.jsonl:{n}",
  )


def reply(text, stopped=True, **fields):
  return Reply(
    text, [1] * len(text), stopped, Message("assistant", text, **fields)
  )


class Teacher:
  """Says in turn, of each prompt, what it is given."""

  def __init__(self, said):
    self.said, self.asked = said, []

  def __call__(self, prompts, seeds):
    made = []
    for prompt, seed in zip(prompts, seeds, strict=True):
      n = int(prompt.messages[0].content.split()[-1].rstrip("?"))
      attempt = sum(n == other for other, _ in self.asked)
      self.asked.append((n, seed))
      made.append(self.said[n][attempt])
    return made


def run(said, items=None, **choices):
  teacher = Teacher(said)
  made = synthesis.synthesize(
    items or [item(n) for n in said],
    teacher,
    teacher="t",
    log=lambda line: None,
    **{"attempts": 3, **choices},
  )
  synthesis.check_sums(made)
  return made, teacher


SAID = {
  1: [reply("no"), reply("yes it is"), reply("yes")],
  2: [reply("yes", stopped=False), reply("yes a b c d"), reply("no")],
  3: [reply("oh yes"), reply("oh yes"), reply("yes")],
}


def answers(made):
  return [row["messages"][-1]["content"] for row in made.rows]


def test_pairs_are_one_that_passes_and_one_that_fails():
  made, teacher = run(SAID, keep="pairs")
  (row,) = made.rows
  found = formats.to_conversation(row)
  assert [one.content for one in found.messages] == [
    "Question number 1?", "yes it is"
  ]  # fmt: skip
  assert found.rejected[-1].content == "no"
  assert [n for n, _ in teacher.asked] == [1, 2, 3, 1, 2, 3, 2, 3]
  # One that did not stop is no worse answer: it is cut off.
  assert made.groups["g"].refused == {
    "check contains": 2, "did not stop": 1, "check max_words": 1,
    "no other failed": 3,
  }  # fmt: skip


def test_the_first_that_passes_ends_the_asking():
  made, teacher = run(SAID)
  assert answers(made) == ["yes it is", "oh yes"]
  assert [n for n, _ in teacher.asked] == [1, 2, 3, 1, 2, 2]
  group = made.groups["g"]
  assert (group.prompts, group.solved, group.kept) == (3, 2, 2)
  assert group.refused == {
    "check contains": 2, "did not stop": 1, "check max_words": 1
  }  # fmt: skip
  about = made.rows[0]["synthetic"]
  assert about == {
    "teacher": "t", "prompt": "p.jsonl:1", "group": "g", "attempt": 1,
    "seed": synthesis.seed_of(0, "p.jsonl:1", 1),
  }  # fmt: skip
  assert (1, about["seed"]) in teacher.asked


def test_the_shortest_and_all_different_ones():
  made, teacher = run(SAID, keep="shortest")
  assert answers(made) == ["yes", "yes"]
  assert len(teacher.asked) == 9
  assert made.groups["g"].refused["not the shortest"] == 3
  made, _ = run(SAID, keep="all")
  assert answers(made) == ["yes it is", "yes", "oh yes", "yes"]
  assert made.groups["g"].refused["repeated"] == 1


def test_seeds_are_of_the_prompt_and_not_of_its_neighbours():
  _, all_ = run(SAID)
  _, alone = run({3: SAID[3]})
  assert alone.asked == [one for one in all_.asked if one[0] == 3]
  assert len({seed for _, seed in all_.asked}) == len(all_.asked)
  _, other = run(SAID, seed=1)
  assert {s for _, s in other.asked}.isdisjoint({s for _, s in all_.asked})


def test_prompts_of_evaluation_sets_are_not_asked():
  long = " ".join(f"word{i}" for i in range(40))
  items = [
    item(1), item(2),
    item(3)._replace(
      prompt=Conversation(messages=(Message("user", long + " 3"),))
    ),
  ]  # fmt: skip
  against = [
    # Told apart by case and spacing alone; and half of it, word for word.
    item(9)._replace(
      prompt=Conversation(messages=(Message("user", "question NUMBER  2"),))
    ),
    item(9)._replace(
      prompt=Conversation(messages=(Message("user", "So: " + long),))
    ),
  ]
  made, teacher = run({1: [reply("yes")]}, items, against=against)
  assert [n for n, _ in teacher.asked] == [1]
  group = made.groups["g"]
  assert (group.prompts, group.overlapping, group.solved) == (3, 2, 1)


def test_rows_are_read_back_and_train_the_teachers_turn_alone():
  call = ToolCall("tide", {"town": "Sulvik"}, id="c1")
  tools = ({"type": "function", "function": {"name": "tide"}},)
  prompt = Conversation(
    messages=(
      Message("user", "The tide at Sulvik?"),
      Message("assistant", "", tool_calls=(call,)),
      Message("tool", "12", tool_call_id="c1"),
    ),
    tools=tools,
  )
  one = item(1)._replace(prompt=prompt)
  made = synthesis.synthesize(
    [one],
    lambda prompts, seeds: [reply("yes at 12", reasoning="It says 12.")],
    teacher="t",
    attempts=1,
    log=lambda line: None,
  )
  read = formats.to_conversation(made.rows[0])
  assert read.tools == tools
  assert [m.weight for m in read.messages] == [None, 0.0, None, None]
  assert read.messages[1].tool_calls == (call,)
  assert read.messages[-1] == Message(
    "assistant", "yes at 12", reasoning="It says 12."
  )


def test_what_cannot_be_trained_on_or_says_nothing_is_refused():
  def usable(conversation):
    if "yes it" in conversation.messages[-1].content:
      raise RowError("row", "a control token", "none", "Escape it.")

  made, _ = run({1: SAID[1]}, usable=usable)
  assert answers(made) == ["yes"]
  assert made.groups["g"].refused["cannot be trained on"] == 1
  # Without being told: what no file of rows may hold.
  made, _ = run({1: [reply("yes \0"), reply("yes")]})
  assert answers(made) == ["yes"]
  assert made.groups["g"].refused["cannot be trained on"] == 1
  silent = item(1)._replace(checks=({"check": "max_words", "count": 3},))
  made, _ = run({1: [reply("")] * 3}, [silent])
  assert made.groups["g"].refused == {"says nothing": 3}
  assert made.rows == []


def test_choices_that_make_no_sense():
  for choices in ({"keep": "best"}, {"attempts": 0}):
    with pytest.raises(ValueError, match="synthesize: got keep"):
      run(SAID, **choices)
