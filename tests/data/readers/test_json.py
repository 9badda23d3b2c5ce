"""Text files, packed or not: streamed, bounded, and honest about damage."""

import gzip
import json
import tracemalloc

import pyarrow
import pytest

from sft_jax.data.conversation import RowError
from sft_jax.data.readers import files, strict_json

MADE = [{"text": "one"}, {"text": "zwei ü"}, {"text": "3"}]
LINES = "".join(json.dumps(row) + "\n" for row in MADE).encode()


def zstd(data):
  sink = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
    stream.write(data)
  return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


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


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_packed_pieces_one_after_another(tmp_path, packing):
  path = tmp_path / ("a.jsonl" + packing)
  path.write_bytes(PACK[packing](LINES[:7]) + PACK[packing](LINES[7:]))
  assert read(path) == MADE


@pytest.mark.parametrize("packing", [".gz", ".zst"])
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
  monkeypatch.setattr(strict_json, "MAX_ROW_BYTES", 2000)
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
  monkeypatch.setattr(strict_json, "MAX_ROW_BYTES", 2**20)
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
  assert "a row of more than 1 MiB" in str(skipped[0])
  assert got == ([{"text": "after"}] if "jsonl" in name else [])
  assert peak < 16 * 2**20
