"""The examples of docs/evaluation.md, run as they stand."""

import json
import re
from pathlib import Path

import pytest

from sft_jax.evals.checks import checks, ifeval
from sft_jax.inference import generate
from sft_jax.inference.generate import Reply

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
(BLOCK,) = re.findall(r"```json\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
EXAMPLES = [json.loads(line) for line in BLOCK.splitlines()]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda x: x["check"])
def test_example(example):
  if example["check"].startswith("language:"):
    pytest.importorskip("langdetect", reason="needs langdetect")
  told = ("passes", "fails")
  check = {key: x for key, x in example.items() if key not in told}
  checks.validate(check, "here")
  for name in told:
    message = generate.parse(example[name])
    reply = Reply(message.content, [], True, message)
    assert checks.passes(reply, check) == (name == "passes"), name


def test_every_check_is_on_the_page():
  shown = {example["check"] for example in EXAMPLES}
  assert checks.CHECKS.keys() - shown <= ifeval.INSTRUCTIONS.keys()
  assert checks.CHECKS.keys() >= checks.FORMAT
