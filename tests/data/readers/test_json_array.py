"""An array read piece by piece gives what reading it whole gives."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_jax.data.conversation import RowError
from sft_jax.data.readers import json_array, strict_json

values = st.recursive(
  st.none() | st.booleans() | st.integers() | st.text(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner)
  ),
  max_leaves=6,
)


def pieces(text, size):
  return (text[i : i + size] for i in range(0, len(text), size))


def read(text, size=4, on_bad_row=None):
  skipped = []
  on_bad_row = on_bad_row or skipped.append
  got = list(json_array.read_array(pieces(text, size), "a.json", on_bad_row))
  return got, [str(error) for error in skipped]


@given(
  st.lists(values, max_size=5),
  st.sampled_from([None, 1]),
  st.integers(1, 9),
)
def test_cut_anywhere(array, indent, size):
  got, skipped = read(json.dumps(array, indent=indent), size)
  expected = [(f"a.json[{i}]", value) for i, value in enumerate(array)]
  assert json.dumps(got) == json.dumps(expected)
  assert not skipped


@given(st.text(alphabet='{}[]":,1 \n\\u', max_size=12), st.integers(1, 5))
def test_any_text_is_read_or_refused(text, size):
  text = "[" + text
  try:
    expected = json.loads(text)
  except ValueError:
    with pytest.raises(RowError, match=r"^a.json line"):
      read(text, size)
  else:
    assert [value for _, value in read(text, size)[0]] == expected


@pytest.mark.parametrize(
  "bad",
  [
    '{"a": 1, "a": 2}',
    "NaN",
    "[1e999, [2]]",
    "1" * 5000,
    r'"\ud83d"',
    "[" * 5000 + "]" * 5000,
  ],
)
@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_a_refused_value_is_stepped_over(bad, size):
  got, skipped = read(f'[1, {bad}, {{"b": 2}}]', size)
  assert got == [("a.json[0]", 1), ("a.json[2]", {"b": 2})]
  (said,) = skipped
  assert said.startswith("a.json[1]: got ")


@pytest.mark.parametrize(
  ("text", "place"),
  [
    ('[\n  {"a": 1},\n  {"a": }\n]', "line 3 column 9"),
    ('[\n  {"a": 1}\n  {"a": 2}\n]', "line 3 column 3"),
    ('[{"a": 1}', "line 1 column 10"),
    ("[1, 2", "line 1 column 6"),
    ('[1, "two', "line 1 column 5"),
    ("[1,]", "line 1 column 4"),
    ("[1]\n[2]", "line 2 column 1"),
    ("[[" * 5000, "line 1 column 2"),
  ],
)
@pytest.mark.parametrize("size", [1, 5, 100_000])
def test_faults_are_placed_in_the_file(text, place, size):
  with pytest.raises(RowError) as error:
    read(text, size)
  assert str(error.value).startswith(f"a.json {place}: got ")


def test_a_value_that_is_too_long_ends_the_reading(monkeypatch):
  monkeypatch.setattr(strict_json, "MAX_ROW_BYTES", 1000)
  taken = []

  def endless():
    yield '[1, "'
    while True:
      taken.append(1)
      yield "x" * 100

  stream = json_array.read_array(endless(), "a.json", print)
  assert next(stream) == ("a.json[0]", 1)
  with pytest.raises(RowError, match=r"a.json\[1\]: got a row of more than"):
    next(stream)
  assert len(taken) < 50
