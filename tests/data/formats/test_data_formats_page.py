"""Every row that docs/data_formats.md shows is one that loads."""

import json
import re
from pathlib import Path

import pytest

from sft_jax.data.formats import formats

PAGE = Path(__file__).parents[3] / "docs" / "data_formats.md"
ROWS = [
  line
  for block in re.findall(r"```jsonl\n(.*?)```", PAGE.read_text(), re.DOTALL)
  for line in block.splitlines()
]


def test_the_page_has_rows_of_every_format():
  fitting = {
    name
    for row in map(json.loads, ROWS)
    for name, made in formats.FORMATS.items()
    if made.fits(row)
  }
  assert fitting == set(formats.FORMATS)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_page_loads(row):
  made = formats.to_conversation(json.loads(row))
  answer = made.messages[-1] if made.messages else None
  if answer is None:
    assert made.text or made.ids
  else:
    assert answer.role == "assistant"
    assert "4" in answer.content or answer.content in ("Yes.", "Ann.", "6")
    if answer.spans is not None:
      assert [answer.content[a:b] for a, b in answer.spans] == ["4"]
