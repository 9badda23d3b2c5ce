"""Strict JSON reads what is valid exactly, and refuses the rest by name."""

import contextlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_jax.data.conversation import RowError
from sft_jax.data.readers import strict_json

json_values = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats(allow_nan=False, allow_infinity=False)
  | st.text(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
  max_leaves=20,
)


@given(json_values)
def test_valid_json_is_read_exactly(value):
  got = strict_json.loads(json.dumps(value), "here")
  # Compared as text, so that the order of keys counts too.
  assert json.dumps(got) == json.dumps(value)


@given(st.text(alphabet='{}[]":,\\ud8a1 N\n', max_size=30))
def test_any_text_is_read_or_refused(text):
  try:
    expected = json.loads(text)
  except ValueError:
    with pytest.raises(RowError, match=r"^here"):
      strict_json.loads(text, "here")
  else:
    # Valid for Python's lenient reader: read the same, or refused.
    with contextlib.suppress(RowError):
      assert strict_json.loads(text, "here") == expected


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ('{"a": 1, "a": 2}', "the key 'a' twice"),
    ("[NaN]", "NaN"),
    ("[-Infinity]", "-Infinity"),
    ("[1e999]", "the number 1e999"),
    ("1" * 5000, "an integer of thousands of digits"),
    ("[" * 101 + "]" * 101, "nested too deep"),
    ("[" * 100_000, "nested too deep"),
    ('{"a":' * 100_000, "nested too deep"),
    (r'"\ud83d"', "half a surrogate pair"),
    (r'{"\udc00": 1}', "half a surrogate pair"),
    (r'"\\ud83d\udc00"', "half a surrogate pair"),
    ("[1] [2]", "extra data"),
    ("[1]\ufeff", "extra data"),
    ("", "expecting value"),
    ("[1,\n 2", "line 2 column 3"),
    ('"a\x00b"', "invalid control character"),
  ],
)
def test_refusals(text, said):
  with pytest.raises(RowError, match=r"^here") as error:
    strict_json.loads(text, "here")
  assert said in str(error.value)
  assert len(str(error.value)) < 400


@pytest.mark.parametrize(
  "text",
  [
    "[" * 100 + "]" * 100,
    '"' + "[{" * 5000 + '"',
    r'"\ud83d\ude00"',
    r'"\\ud83d"',
    " [1.5e300, -0, 12345678901234567890] ",
  ],
)
def test_what_looks_like_a_fault_and_is_none(text):
  assert strict_json.loads(text, "here") == json.loads(text)


def test_a_key_twice_among_a_million_is_found_at_once():
  keys = ", ".join(f'"{i}": 0' for i in range(50_000))
  start = time.process_time()
  with pytest.raises(RowError, match="the key '49999' twice"):
    strict_json.loads(f'{{{keys}, "49999": 1}}', "here")
  assert time.process_time() - start < 5  # Quadratic, it would take minutes.


@given(json_values, st.text(alphabet=" \n,]", max_size=3))
def test_find_end_is_where_the_value_ends(value, after):
  text = json.dumps(value)
  # A number could go on, so that something must follow it.
  assert strict_json.find_end(text + "," + after, 0) == len(text)
