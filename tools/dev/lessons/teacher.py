"""A lesson's teacher: prompts for it, and rows of its replies to them.

The asking is that of sft-jax synthesize, and its account of what was kept
and refused lies beside the rows.
"""

from collections.abc import Sequence
from pathlib import Path

from demo_world.conversations import Check, Row
from examples.lessons.common import Answers
from sft_jax.commands import synthesize

# What stands for no check: a behavior set must have one.
ANY: Check = {"check": "min_words", "count": 1}


def prompts(rows: Sequence[Row], answers: Answers) -> list[Row]:
  """A behavior set that asks for the replies of rows."""
  return [
    {
      "group": row["group"],
      "messages": row["messages"][:-1],
      "checks": row["checks"] if answers.checked else [ANY],
    }
    for row in rows
  ]


def write(
  path: Path,
  teacher: Path,
  asked: Path,
  against: Path,
  answers: Answers,
  *,
  seed: int,
  max_new_tokens: int,
) -> None:
  """Writes rows of what a teacher answers.

  Args:
    path: of the rows.
    teacher: the model's folder.
    asked: `prompts`, as a file.
    against: the behavior set that no prompt may give away.
  """
  synthesize.main(
    [
      f"--out={path}",
      f"--teacher={teacher}",
      f"--prompts={asked}",
      f"--against={against}",
      f"--samples={answers.attempts}",
      f"--temperature={answers.temperature}",
      f"--seed={seed}",
      f"--max_new_tokens={max_new_tokens}",
    ]
  )
