"""Values in errors are short and harmless."""

import pytest

from sft_jax.data.formats import fields


@pytest.mark.parametrize(
  ("value", "shown"),
  [
    ("ü\x1b[2J", r"'\xfc\x1b[2J'"),
    ("x" * 50, "'" + "x" * 40 + "'..."),
    ({"a": [1, 2], "b": {"c": 1}}, "{'a': [2 items], 'b': {...}}"),
    (b"x", "type bytes"),
    (None, "None"),
    (10**100, "1" + "0" * 39),
  ],
)
def test_shown(value, shown):
  assert fields.shown(value) == shown


def test_shown_is_bounded():
  row = {f"key {i}": "\x00" * 10_000 for i in range(1000)}
  assert len(fields.shown(row)) < 3000
