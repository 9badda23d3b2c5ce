"""Rows of JSON lines, JSON arrays, CSV and plain text, read strictly.

A key given twice, NaN, a number beyond every float, half a surrogate pair and
very deep nesting all pass `json.loads`: here each is a RowError.

Lines are streamed: one row and a buffer are held, also of a small .gz that
unpacks to terabytes. A JSON array is read whole. A fault of one row goes to
`on_bad_row`; a file that breaks off is refused, since nobody knows how many
rows are missing.
"""

import bz2
import codecs
import csv
import functools
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow

from sft_jax.data.conversation import RowError, one_line

Rows = Iterator[tuple[str, dict[str, Any]]]
OnBadRow = Callable[[RowError], None]

COMPRESSIONS = {
  ".gz": gzip.GzipFile,
  ".bz2": bz2.BZ2File,
  ".xz": lzma.LZMAFile,
  ".zst": lambda file: pyarrow.CompressedInputStream(str(file), "zstd"),
}
# The longest row, in bytes of its file: some four million tokens. Parsed JSON
# may take thirty times its text, so that this bounds memory too.
MAX_ROW_BYTES = 16 * 2**20
# The longest file that is one JSON array: memory holds it whole.
MAX_ARRAY_BYTES = 2**30
# Levels of lists and objects: tool schemas take about twenty.
MAX_DEPTH = 100


def read_jsonl(file: Path, on_bad_row: OnBadRow) -> Rows:
  """An object on each line; places are 'rows.jsonl:12', counted from 1."""
  with open_bytes(file) as stream:
    # Bytes, so that a line ends at \n alone and faults have a line number.
    for number, line in _lines(stream, file):
      if line.isspace():
        continue
      where = f"{one_line(file.name)}:{number}"
      try:
        row = _object(loads(_decoded(line, where).rstrip(), where), where)
      except RowError as error:
        on_bad_row(error)
      else:
        yield where, row


def read_json(file: Path, on_bad_row: OnBadRow) -> Rows:
  """An array of objects ('rows.json[3]', from 0), or what is JSON lines.

  Raises RowError: an array of more than `MAX_ARRAY_BYTES`; text that is not
  JSON, with line and column: nobody knows where the next value begins.
  """
  name = one_line(file.name)
  with open_bytes(file) as stream:
    head = _guarded(stream.peek, 1, file).lstrip()
    if head.startswith(b"["):
      data = _guarded(stream.read, MAX_ARRAY_BYTES + 1, file)
  if head.startswith(b"["):
    if len(data) > MAX_ARRAY_BYTES:
      raise _long_array(file)
    text = _decoded(data, name, MAX_ARRAY_BYTES)
    del data
    yield from read_array(text, name, on_bad_row)
    return
  start = head[:20].decode(errors="replace")
  if not start.startswith("{") or start.split("\n")[0].strip() == "{":
    got = f"text that begins with {start!r}" if start else "an empty file"
    expected = "an array of objects, or an object on each line"
    raise RowError(name, got, expected, "Wrap the rows in an array.")
  yield from read_jsonl(file, on_bad_row)


def check_array(file: Path) -> None:
  """Raises a RowError of an array that is too long, of its first bytes."""
  if file.stat().st_size > MAX_ARRAY_BYTES:
    with open_bytes(file) as stream:
      if stream.peek(1).lstrip().startswith(b"["):
        raise _long_array(file)


def _long_array(file: Path) -> RowError:
  got = f"a JSON array of more than {MAX_ARRAY_BYTES // 2**20} MiB"
  cure = "Convert it: jq -c '.[]' rows.json > rows.jsonl."
  return RowError(
    one_line(file.name), got, "JSON lines, which are read row by row", cure
  )


def read_array(text: str, name: str, on_bad_row: OnBadRow) -> Rows:
  """The objects of one JSON array, decoded one by one; see `read_json`."""
  try:
    at, index = _skip(text, 0, "["), 0
    while not text.startswith("]", at):
      if index:
        at = _skip(text, at, ",")
      where = f"{name}[{index}]"
      try:
        value, end = _decode(text, at)
        if end - at > MAX_ROW_BYTES:
          raise too_long(where)
        row = _object(value, where)
      except _Fault as fault:
        error = RowError(where, *fault.args)
        try:  # Python's own reader knows where the value ends.
          end = _LENIENT.raw_decode(text, at)[1]
        except RecursionError:
          raise error from None
        on_bad_row(error)
      except RowError as error:
        on_bad_row(error)
      else:
        yield where, row
      at, index = _skip(text, end), index + 1
    if (end := _skip(text, at, "]")) < len(text):
      raise json.JSONDecodeError("extra data", text, end)
  except json.JSONDecodeError as error:
    where = f"{name} line {error.lineno} column {error.colno}"
    raise _syntax_error(error, where) from None


def read_csv(file: Path, on_bad_row: OnBadRow, delimiter: str = ",") -> Rows:
  """Records below a line of names, all text; 'rows.csv:12' is a first line.

  Raises RowError: two columns of one name, text that is not UTF-8, a quotation
  that does not end: where the next record begins cannot be known then.
  """

  def text_lines(stream: io.BufferedReader) -> Iterator[str]:
    for number, line in _lines(stream, file):
      yield _decoded(line, f"{one_line(file.name)}:{number}")

  csv.field_size_limit(MAX_ROW_BYTES)
  at, names = 1, None
  with open_bytes(file) as stream:
    records = csv.reader(text_lines(stream), delimiter=delimiter, strict=True)
    while True:
      where = f"{one_line(file.name)}:{at}"
      try:
        cells = next(records, None)
      except csv.Error as error:
        got, cure = str(error), "Correct the file."
        raise RowError(where, got, "quoted text that ends", cure) from None
      at = records.line_num + 1
      if cells is None:
        return
      if names is None:
        names = cells
        if len(set(names)) < len(names):
          got, cure = f"columns {names}", "Rename one of them."
          raise RowError(where, got, "each name once", cure)
      elif len(cells) == len(names):
        yield where, dict(zip(names, cells, strict=True))
      elif cells:  # An empty line is none.
        got = f"{len(cells)} cells under {len(names)} names"
        on_bad_row(RowError(where, got, "as many", "Correct or drop the row."))


read_tsv = functools.partial(read_csv, delimiter="\t")


def read_txt(file: Path, on_bad_row: OnBadRow) -> Rows:
  """The whole file as one row of raw text, whose place is its name."""
  with open_bytes(file) as stream:
    data = _guarded(stream.read, MAX_ROW_BYTES + 1, file)
  try:
    text = _decoded(data, one_line(file.name))
  except RowError as error:
    on_bad_row(error)
  else:
    yield one_line(file.name), {"text": text}


def open_bytes(file: Path) -> io.BufferedReader:
  """The file's bytes, unpacked, after a byte order mark if there is one."""
  unpack = COMPRESSIONS.get(file.suffix.lower())
  stream = io.BufferedReader(unpack(file), 2**20) if unpack else file.open("rb")
  if _guarded(stream.peek, 3, file).startswith(codecs.BOM_UTF8):
    stream.read(3)
  return stream


def _guarded(read: Callable[[int], bytes], size: int, file: Path) -> bytes:
  """What `read` gives; packed data that is damaged is a RowError."""
  try:
    return read(size)
  except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
    if file.suffix.lower() not in COMPRESSIONS:
      raise
    got = f"packed data that is damaged or breaks off ({error})"
    expected = f"a whole {file.suffix} file"
    raise RowError(
      one_line(file.name), got, expected, "Fetch or pack the file again."
    ) from None


def _lines(stream: Any, file: Path) -> Iterator[tuple[int, bytes]]:
  """Numbered lines; of one that is too long, only its beginning."""
  limit = MAX_ROW_BYTES + 1
  for number in itertools.count(1):
    rest = line = _guarded(stream.readline, limit, file)
    if not line:
      return
    while len(rest) == limit and not rest.endswith(b"\n"):
      rest = _guarded(stream.readline, limit, file)
    yield number, line


def _decoded(data: bytes, where: str, most: int = 0) -> str:
  if len(data) > (most or MAX_ROW_BYTES):
    raise too_long(where)
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    got = f"the byte 0x{data[error.start]:02x}, which is not UTF-8"
    cure = "Convert the file, or correct or drop the row."
    raise RowError(f"{where} byte {error.start}", got, "UTF-8", cure) from None


def _object(row: Any, where: str) -> dict[str, Any]:
  if not isinstance(row, dict):
    got = f"a JSON {type(row).__name__}"
    raise RowError(where, got, "an object", "Give every row as {...}.")
  return row


def too_long(where: str) -> RowError:
  """What is wrong with a row of more than `MAX_ROW_BYTES`."""
  got = f"a row of more than {MAX_ROW_BYTES // 2**20} MiB"
  expected = f"rows of at most {MAX_ROW_BYTES // 2**20} MiB"
  return RowError(where, got, expected, "Cut it into several rows.")


class _Fault(Exception):
  """(got, expected, cure) of JSON that is well formed and still refused."""


_TOO_DEEP = _Fault(
  "JSON nested too deep", f"at most {MAX_DEPTH} levels", "Drop the row."
)
_SPACE = re.compile(r"[ \t\n\r]*+")
# A lone half of a surrogate pair can only come from an escape.
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def loads(text: str, where: str) -> Any:
  """The value of a JSON text.

  Raises RowError: text that is not JSON, with its column (and line, where it
  has several); a key given twice; NaN or infinity; half a surrogate pair;
  integers of thousands of digits; more than `MAX_DEPTH` levels.
  """
  try:
    value, end = _decode(text, _skip(text, 0))
    if _skip(text, end) != len(text):
      raise json.JSONDecodeError("extra data", text, _skip(text, end))
  except json.JSONDecodeError as error:
    line = f" line {error.lineno}" if "\n" in text else ""
    raise _syntax_error(error, f"{where}{line} column {error.colno}") from None
  except _Fault as fault:
    raise RowError(where, *fault.args) from None
  return value


def _skip(text: str, at: int, mark: str = "") -> int:
  """Where the text continues after white space and `mark`, and white space."""
  at = _SPACE.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
  if not text.startswith(mark, at):
    raise json.JSONDecodeError(f"expecting {mark!r}", text, at)
  return _SPACE.match(text, at + len(mark)).end()  # pyright: ignore[reportOptionalMemberAccess]


def _decode(text: str, start: int) -> tuple[Any, int]:
  """The value that begins at `start`, and where it ends.

  Raises JSONDecodeError: none is complete there; `_Fault`: it is refused.
  """
  try:
    value, end = _DECODER.raw_decode(text, start)
  except RecursionError:
    raise _TOO_DEEP from None
  except json.JSONDecodeError:
    raise
  except ValueError:
    # Of Python's limit on digits, which keeps conversion from hanging.
    got = "an integer of thousands of digits"
    cure = "Write it as a string, or drop the row."
    raise _Fault(got, "a number of ordinary size", cure) from None
  nested = text.count("[", start, end) + text.count("{", start, end)
  if nested > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
    raise _TOO_DEEP
  if _SURROGATE_ESCAPE.search(text, start, end):
    # Whole pairs became one character in reading; halves cannot be encoded.
    try:
      json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
      got = f"half a surrogate pair ({error.object[error.start]!r})"
      cure = "Correct the escape or drop the row."
      raise _Fault(got, "whole characters", cure) from None
  return value, end


def _syntax_error(error: json.JSONDecodeError, where: str) -> RowError:
  near = error.doc[max(0, error.pos - 10) : error.pos + 20]
  got = f"{error.msg.lower()} at {near!r}"
  return RowError(where, got, "valid JSON", "Correct or drop the row.")


def _is_deeper(value: Any, levels: int) -> bool:
  if not isinstance(value, dict | list):
    return False
  inner = value.values() if isinstance(value, dict) else value
  return not levels or any(_is_deeper(one, levels - 1) for one in inner)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  made = dict(pairs)
  if len(made) != len(pairs):
    known = set()
    for key, _ in pairs:
      if key in known:
        got = f"the key {key!r} twice in one object"
        raise _Fault(got, "each key once", "Keep one of the two values.")
      known.add(key)
  return made


def _no_constant(name: str) -> Any:
  raise _Fault(name, "a JSON number", "Replace it: JSON has no such value.")


def _float(text: str) -> float:
  value = float(text)
  if value in (float("inf"), float("-inf")):
    got = f"the number {text[:40]}"
    raise _Fault(got, "a number that fits a float", "Correct it.")
  return value


# Made once: making a decoder takes longer than reading a short row.
_DECODER = json.JSONDecoder(
  object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_float
)
# For where a refused value ends.
_LENIENT = json.JSONDecoder(parse_int=len, parse_float=len)
