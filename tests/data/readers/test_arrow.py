"""Parquet and Arrow: rows as they were before Arrow had them."""

import datetime
import decimal
import json

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from sft_jax.data.conversation import RowError
from sft_jax.data.formats import formats
from sft_jax.data.readers import files
from sft_jax.data.readers import json as json_reader

CALL = {"name": "f", "arguments": {"city": "Ulm"}}
TRACE = [
  {
    "messages": [
      {"role": "user", "content": "Go"},
      {"role": "assistant", "content": "", "tool_calls": [CALL]},
      {"role": "tool", "content": "Done"},
    ]
  },
  {
    "messages": [
      {"role": "user", "content": "Go"},
      {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "g", "arguments": {"days": 3}}],
      },
    ]
  },
]


def write(table, path):
  if path.suffix == ".parquet":
    pyarrow.parquet.write_table(table, path)
  elif path.stem == "feather":
    pyarrow.feather.write_feather(table, path)
  else:
    with pyarrow.ipc.new_stream(path, table.schema) as stream:
      stream.write_table(table, max_chunksize=300)
  return path


NAMES = ["a.parquet", "stream.arrow", "feather.arrow"]


def read(path, **kwargs):
  return [row for _, row in files.read_rows(path, **kwargs)]


@pytest.mark.parametrize("name", NAMES)
def test_rows_in_order_with_their_places(tmp_path, name):
  made = [{"text": str(i)} for i in range(1000)]
  path = write(pyarrow.Table.from_pylist(made), tmp_path / name)
  got = list(files.read_rows(path))
  assert got == [(f"{name}[{i}]", row) for i, row in enumerate(made)]


@pytest.mark.parametrize("name", NAMES)
def test_nulls_that_arrow_fills_in_are_taken_out(tmp_path, name):
  path = write(pyarrow.Table.from_pylist(TRACE), tmp_path / name)
  for row, expected in zip(read(path), TRACE, strict=True):
    got = formats.to_conversation(row)
    assert got == formats.to_conversation(expected)
    # Arrow alone would give f a 'days' and g a 'city', both null.
    (call,) = got.messages[1].tool_calls
    assert len(call.arguments) == 1


def test_json_text_keeps_nulls_and_order(tmp_path):
  tools = json.dumps([{"name": "f", "default": None, "a": 1}])
  made = [{"messages": [{"role": "user", "content": "Go"}], "tools": tools}]
  path = write(pyarrow.Table.from_pylist(made), tmp_path / "a.parquet")
  (row,) = read(path)
  assert json.dumps(list(formats.to_conversation(row).tools)) == tools


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_file_is_refused(tmp_path, name, part):
  made = [{"text": str(i) * 50} for i in range(1000)]
  path = write(pyarrow.Table.from_pylist(made), tmp_path / name)
  data = path.read_bytes()
  path.write_bytes(data[: int(len(data) * part)])
  with pytest.raises(RowError, match=r"damaged or breaks off"):
    read(path, on_bad_row=print)


def test_a_stream_cut_between_two_batches_is_refused(tmp_path):
  made = pyarrow.Table.from_pylist([{"text": str(i)} for i in range(600)])
  path = write(made, tmp_path / "a.arrow")
  data = path.read_bytes()
  path.write_bytes(data[:-8])  # All batches are there, but not the end mark.
  with pytest.raises(RowError, match="no end-of-stream mark"):
    read(path)


def not_utf8(count=3):
  values = pyarrow.array([b"ok", b"\xff\xfe", b"last"][:count])
  buffers = values.buffers()
  return pyarrow.StringArray.from_buffers(count, buffers[1], buffers[2])


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow"])
def test_a_value_that_is_not_utf8_is_one_bad_row(tmp_path, name):
  path = write(pyarrow.table({"text": not_utf8()}), tmp_path / name)
  skipped = []
  assert read(path, on_bad_row=skipped.append) == [
    {"text": "ok"},
    {"text": "last"},
  ]
  (error,) = skipped
  assert str(error).startswith(f"{name}[1]: got a value that cannot be read")


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow"])
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
  "holds", [lambda x: x, lambda x: [x], lambda x: {"a": [{"b": x}]}]
)
def test_a_number_that_is_not_finite_is_one_bad_row(
  tmp_path, name, number, holds
):
  made = [{"text": str(i), "n": holds(x)} for i, x in enumerate((1.0, number))]
  made.append({"text": "2", "n": None})
  path = write(pyarrow.Table.from_pylist(made), tmp_path / name)
  skipped = []
  got = read(path, on_bad_row=skipped.append)
  assert [row["text"] for row in got] == ["0", "2"]
  (error,) = skipped
  assert str(error).startswith(f"{name}[1]: got ")
  assert "NaN or infinity in the column n" in str(error)


def test_a_row_that_is_too_long_is_one_bad_row(tmp_path, monkeypatch):
  monkeypatch.setattr(json_reader, "MAX_ROW_BYTES", 1000)
  made = [{"text": "x" * n} for n in (10, 2000, 20)]
  path = write(pyarrow.Table.from_pylist(made), tmp_path / "a.parquet")
  skipped = []
  got = read(path, on_bad_row=skipped.append)
  assert [len(row["text"]) for row in got] == [10, 20]
  assert [error.where for error in skipped] == ["a.parquet[1]"]


ODD = {
  "bytes": b"x",
  "time": datetime.datetime(2024, 1, 1),
  "decimal": decimal.Decimal("1.5"),
  "number": 3,
  "list": ["a"],
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_types_are_refused_where_text_is_meant(tmp_path, kind):
  made = [{"prompt": ODD[kind], "completion": "x", "other": ODD[kind]}]
  path = write(pyarrow.Table.from_pylist(made), tmp_path / "a.parquet")
  (row,) = read(path)
  with pytest.raises(RowError, match="row"):
    formats.to_conversation(row)
  # Where nothing is read, anything may stand.
  row["prompt"] = "Go"
  assert formats.to_conversation(row).messages[0].content == "Go"
  row["tools"] = [{"name": "f", "default": ODD[kind]}]
  if kind in ("bytes", "time", "decimal"):
    with pytest.raises(RowError, match="JSON cannot hold"):
      formats.to_conversation(row)


def test_two_columns_of_one_name(tmp_path):
  twice = pyarrow.table([pyarrow.array(["a"])] * 2, names=["text", "text"])
  path = write(twice, tmp_path / "a.arrow")
  with pytest.raises(RowError, match="two columns of the name 'text'"):
    read(path)
