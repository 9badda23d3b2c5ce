"""JSON and text, packed or not: exact, strict, bounded, faults placed."""

import bz2
import contextlib
import gzip
import json
import lzma
import time
import tracemalloc

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_jax.data.conversation import RowError
from sft_jax.data.readers import files
from sft_jax.data.readers import json as json_reader

MADE = [{"text": "one"}, {"text": "zwei ü"}, {"text": "3"}]
LINES = "".join(json.dumps(row) + "\n" for row in MADE).encode()


def zstd(data):
  sink = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
    stream.write(data)
  return sink.getvalue().to_pybytes()


PACK = {
  "": bytes,
  ".gz": gzip.compress,
  ".bz2": bz2.compress,
  ".xz": lzma.compress,
  ".zst": zstd,
}


def read(path, **kwargs):
  return [row for _, row in files.read_rows(path, **kwargs)]


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize(
  ("name", "data"),
  [
    ("a.jsonl", LINES),
    ("a.jsonl", LINES.replace(b"\n", b"\r\n")),
    ("a.jsonl", b"\xef\xbb\xbf" + LINES),
    ("a.jsonl", b"\n" + LINES.replace(b"\n", b"\n \n")),
    ("a.json", json.dumps(MADE).encode()),
    ("a.json", b"\xef\xbb\xbf \n" + json.dumps(MADE, indent=2).encode()),
    ("a.json", json.dumps(MADE, ensure_ascii=False).encode()),
    ("a.json", LINES),  # As the hub has them.
  ],
)
def test_every_packing_and_form(tmp_path, packing, name, data):
  path = tmp_path / (name + packing)
  path.write_bytes(PACK[packing](data))
  assert read(path) == MADE


@pytest.mark.parametrize("packing", [one for one in PACK if one])
def test_packed_pieces_one_after_another(tmp_path, packing):
  path = tmp_path / ("a.jsonl" + packing)
  path.write_bytes(PACK[packing](LINES[:7]) + PACK[packing](LINES[7:]))
  assert read(path) == MADE


@pytest.mark.parametrize("packing", [one for one in PACK if one])
@pytest.mark.parametrize("damage", ["cut", "head", "middle"])
def test_damaged_packing_is_refused_though_rows_are_skipped(
  tmp_path, packing, damage
):
  many = "".join(f'{{"text": "{i * i}"}}\n' for i in range(2000)).encode()
  data = PACK[packing](many)
  data = {
    "cut": data[: len(data) // 2],
    "head": b"xx" + data,
    "middle": data[: len(data) // 2] + b"????" + data[len(data) // 2 + 4 :],
  }[damage]
  path = tmp_path / ("a.jsonl" + packing)
  path.write_bytes(data)
  skipped = []
  with pytest.raises(RowError, match=r"^a\.jsonl.*damaged or breaks off"):
    # Damage may show as bad rows before it shows as damage.
    read(path, on_bad_row=skipped.append)
  assert len(skipped) < 2000


@pytest.mark.parametrize(
  ("name", "data", "said"),
  [
    ("a.json", b"", "an empty file"),
    ("a.json", b" \n", "an empty file"),
    ("a.json", b'"text"', "text that begins with"),
    ("a.json", b'{\n"text": 1}', "text that begins with"),
    ("a.json", b'[{"text": "\xff"}]', "byte 11: got the byte 0xff"),
    ("a.json", b'[{"text": "\xc3', "byte 11: got the byte 0xc3"),
    ("a.json", b'[{"text": "x"}', "line 1 column 15"),
    ("a.txt", b"ab\xff", "byte 2: got the byte 0xff"),
    ("a.jsonl", "one".encode("utf-16"), "0xff"),
  ],
)
def test_files_that_are_no_rows(tmp_path, name, data, said):
  (tmp_path / name).write_bytes(data)
  with pytest.raises(RowError) as error:
    read(tmp_path / name)
  assert said in str(error.value)


def test_an_empty_file_of_lines_has_no_rows(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(b"")
  assert read(tmp_path / "a.jsonl") == []


def test_a_character_cut_by_a_buffer_is_whole(tmp_path):
  made = [{"text": "x" * i + "é" * 700_000} for i in (0, 1)]
  path = tmp_path / "a.json"
  path.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
  assert read(path) == made


BAD = [
  b'{"a": 1',
  b'{"a": "\xff"}',
  b'{"a": NaN}',
  b"[1]",
  b'{"a": "' + b"x" * 3000 + b'"}',
  b'{"a": ' + b"[" * 900,
]


def test_each_bad_line_is_counted_once(tmp_path, monkeypatch):
  monkeypatch.setattr(json_reader, "MAX_ROW_BYTES", 2000)
  lines = [line for bad in BAD for line in (bad, b'{"text": "ok"}')]
  for end in (b"\n", b""):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + end)
    skipped = []
    got = read(tmp_path / "a.jsonl", on_bad_row=skipped.append)
    assert got == [{"text": "ok"}] * len(BAD)
    numbers = [int(e.where.split(":")[1].split()[0]) for e in skipped]
    assert numbers == list(range(1, 2 * len(BAD), 2))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.txt.gz"])
def test_a_bomb_is_refused_in_bounded_memory(tmp_path, monkeypatch, name):
  monkeypatch.setattr(json_reader, "MAX_ROW_BYTES", 2**20)
  monkeypatch.setattr(json_reader, "MAX_ARRAY_BYTES", 4 * 2**20)
  path = tmp_path / name
  with gzip.open(path, "wb", compresslevel=1) as stream:
    stream.write(b'[{"text": "' if "json." in name else b'{"text": "')
    for _ in range(64):
      stream.write(b"x" * 2**20)
    stream.write(b'"}\n{"text": "after"}\n')
  assert path.stat().st_size < 2**20  # Unpacked it is 64 times this.
  tracemalloc.start()
  skipped, got = [], []
  try:
    got = read(path, on_bad_row=skipped.append)
  except RowError as error:
    skipped.append(error)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert len(skipped) == 1
  said = "a JSON array of more than 4" if "json." in name else "a row of more"
  assert said in str(skipped[0])
  assert got == ([{"text": "after"}] if "jsonl" in name else [])
  assert peak < 16 * 2**20


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
  got = json_reader.loads(json.dumps(value), "here")
  # Compared as text, so that the order of keys counts too.
  assert json.dumps(got) == json.dumps(value)


@given(st.text(alphabet='{}[]":,\\ud8a1 N\n', max_size=30))
def test_any_text_is_read_or_refused(text):
  try:
    expected = json.loads(text)
  except ValueError:
    with pytest.raises(RowError, match=r"^here"):
      json_reader.loads(text, "here")
  else:
    # Valid for Python's lenient reader: read the same, or refused.
    with contextlib.suppress(RowError):
      assert json_reader.loads(text, "here") == expected


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
    json_reader.loads(text, "here")
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
  assert json_reader.loads(text, "here") == json.loads(text)


def test_a_key_twice_among_a_million_is_found_at_once():
  keys = ", ".join(f'"{i}": 0' for i in range(50_000))
  start = time.process_time()
  with pytest.raises(RowError, match="the key '49999' twice"):
    json_reader.loads(f'{{{keys}, "49999": 1}}', "here")
  assert time.process_time() - start < 5  # Quadratic, it would take minutes.


objects = st.lists(st.dictionaries(st.text(max_size=3), json_values))


def read_array(text):
  skipped = []
  got = list(json_reader.read_array(text, "a.json", skipped.append))
  return got, [str(error) for error in skipped]


@given(objects, st.sampled_from([None, 1]))
def test_an_array_is_read_exactly(array, indent):
  got, skipped = read_array(json.dumps(array, indent=indent))
  expected = [(f"a.json[{i}]", value) for i, value in enumerate(array)]
  assert json.dumps(got) == json.dumps(expected)
  assert not skipped


@given(st.text(alphabet='{}[]":,1 \n\\u', max_size=12))
def test_any_text_is_an_array_or_refused(text):
  text = "[" + text
  try:
    expected = json.loads(text)
  except ValueError:
    with pytest.raises(RowError, match=r"^a.json line"):
      read_array(text)
  else:
    got, skipped = read_array(text)
    assert [row for _, row in got] == [x for x in expected if type(x) is dict]
    assert len(got) + len(skipped) == len(expected)


@pytest.mark.parametrize(
  "bad",
  [
    '{"a": 1, "a": 2}',
    "NaN",
    "[1e999, [2]]",
    "1" * 5000,
    r'"\ud83d"',
    "[" * 101 + "]" * 101,
    "7",
    '{"a": "' + "x" * 2000 + '"}',
  ],
)
def test_a_refused_value_is_stepped_over(monkeypatch, bad):
  monkeypatch.setattr(json_reader, "MAX_ROW_BYTES", 2000)
  got, skipped = read_array(f'[{{"a": 1}}, {bad}, {{"b": 2}}]')
  assert got == [("a.json[0]", {"a": 1}), ("a.json[2]", {"b": 2})]
  (said,) = skipped
  assert said.startswith("a.json[1]: got ")


@pytest.mark.parametrize(
  ("text", "place"),
  [
    ('[\n  {"a": 1},\n  {"a": }\n]', " line 3 column 9"),
    ('[\n  {"a": 1}\n  {"a": 2}\n]', " line 3 column 3"),
    ('[{"a": 1}', " line 1 column 10"),
    ("[{}, {", " line 1 column 7"),
    ('[{}, "two', " line 1 column 6"),
    ("[{},]", " line 1 column 5"),
    ("[{}]\n[2]", " line 2 column 1"),
    # Of a value that Python's own reader cannot step over.
    ("[" * 100_000, "[0]"),
    ("[" * 5000 + "]" * 5000, "[0]"),
  ],
)
def test_faults_that_end_an_array_are_placed(text, place):
  with pytest.raises(RowError) as error:
    read_array(text)
  assert str(error.value).startswith(f"a.json{place}: got ")


def test_a_giant_array_is_refused_by_its_size_and_first_byte(tmp_path):
  """Nobody waits until 2 GiB are digested and read."""
  path = tmp_path / "a.json"
  with path.open("wb") as file:
    file.write(b'\xef\xbb\xbf [{"text": "')
    file.truncate(2**31)  # A hole, which takes no room on the disk.
  begin = time.perf_counter()
  with pytest.raises(RowError, match=r"more than 1024 MiB.*Convert it: jq"):
    files.find_files(path)
  assert time.perf_counter() - begin < 1
