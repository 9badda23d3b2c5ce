"""Conflicts: planted ones are found, and what only looks like one is not."""

import numpy as np
import pytest

from sft_jax.data.audit import conflicts
from sft_jax.data.audit.row_texts import Row, Texts


@pytest.mark.parametrize(
  ("one", "other"),
  [
    ("Paris", "Rome"),
    ("Yes, it is.", "No, it is not."),
    ("The answer is 42.", "The answer is 43."),
    ("Each box holds six, and there are seven boxes in all. So it is 42.",
     "There are six in each of the boxes, which are seven. So it is 44."),
    ("True. Water boils at a hundred degrees at the level of the sea.",
     "False. Water boils at a hundred degrees at the level of the sea."),
  ],
)  # fmt: skip
def test_answers_that_disagree(one, other):
  assert conflicts.disagree(one, other)
  assert conflicts.disagree(other, one)


@pytest.mark.parametrize(
  ("one", "other"),
  [
    ("Paris", "paris."),
    ("Paris", "The capital of France is Paris."),
    ("42", "So the answer is 42."),
    ("Wash the rice well, boil it in water for ten minutes, and let it rest.",
     "Wash the rice, boil it for ten minutes in water, and then let it rest."),
  ],
)  # fmt: skip
def test_answers_that_agree(one, other):
  assert not conflicts.disagree(one, other)


@pytest.fixture
def texts(tmp_path):
  with Texts(tmp_path) as made:
    yield made


def test_planted_conflicts(texts):
  """All of 40 planted are found, and nothing else among 1,000 rows."""
  rng = np.random.default_rng(0)
  vocabulary = [f"w{'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10 % 10]}"
                f"{'uvwxyz'[i // 100]}" for i in range(600)]  # fmt: skip
  say = lambda size: " ".join(rng.choice(vocabulary, size))
  planted = set()

  def add(prompt: str, answer: str, system: str = "") -> int:
    row = Row(f"rows.jsonl:{len(texts)}", system, prompt, "", answer)
    texts.add(row, held_out=False, text=False)
    return len(texts) - 1

  for _ in range(900):
    add(say(int(rng.integers(6, 30))), say(int(rng.integers(1, 30))))
  for i in range(40):
    prompt = say(30)
    # Exactly the same; another case; a word more; a word changed.
    again = [prompt, prompt.upper() + "!", f"please {prompt}",
             prompt.rsplit(" ", 1)[0] + " anything"][i % 4]  # fmt: skip
    planted.add((add(prompt, say(5)), add(again, say(5))))
    # The same prompt and answer; another persona; another number asked for.
    answer = say(5)
    add(prompt := say(30), answer)
    add(prompt, answer + ".")
    add(f"{prompt} {say(3)}", say(5), system="Be rude.")
    add(prompt := f"{say(20)} 12 {say(10)}", say(5))
    add(prompt.replace("12", "13"), say(5))
  found = {tuple(sorted(pair)) for pair in conflicts.find_conflicts(texts)}
  assert found == planted
