"""Rows of JSON lines, JSON arrays and plain text, compressed or not.

Every reader streams: of a file of any size it holds one row and a buffer, also
of a small .gz that unpacks to terabytes. A fault of one row is handed to
`on_bad_row` and reading goes on with the next. A file that breaks off is
refused in any case, since nobody knows how many rows are missing.
"""

import codecs
import gzip
import io
import itertools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow

from sft_jax.data.conversation import RowError
from sft_jax.data.readers import json_array, strict_json

Rows = Iterator[tuple[str, dict[str, Any]]]
OnBadRow = Callable[[RowError], None]

PACKINGS = (".gz", ".zst")

_CHUNK = 2**20


def read_jsonl(file: Path, on_bad_row: OnBadRow) -> Rows:
  """An object on each line; places are 'rows.jsonl:12', counted from 1."""
  with _open(file) as stream:
    # Bytes, so that a line ends at \n alone and faults have a line number.
    for number, line in _lines(stream, file):
      if line.isspace():
        continue
      where = f"{file.name}:{number}"
      try:
        if len(line) > strict_json.MAX_ROW_BYTES:
          raise strict_json.too_long(where)
        text = _decoded(line.rstrip(), where)
        row = _object(strict_json.loads(text, where), where)
      except RowError as error:
        on_bad_row(error)
      else:
        yield where, row


def read_json(file: Path, on_bad_row: OnBadRow) -> Rows:
  """An array of objects ('rows.json[3]', from 0), or what is JSON lines."""
  with _open(file) as stream:
    texts = _texts(stream, file)
    # Spaces may fill any number of pieces.
    first = next((piece for piece in texts if piece.strip()), "")
    if first.lstrip().startswith("["):
      texts = itertools.chain([first], texts)
      for where, row in json_array.read_array(texts, file.name, on_bad_row):
        try:
          made = _object(row, where)
        except RowError as error:
          on_bad_row(error)
        else:
          yield where, made
      return
  start = first.lstrip()[:20]
  if not start.startswith("{") or start.split("\n")[0].strip() == "{":
    raise RowError(
      file.name,
      f"text that begins with {start!r}" if start else "an empty file",
      "an array of objects, or an object on each line",
      "Wrap the rows in an array.",
    )
  yield from read_jsonl(file, on_bad_row)


def read_txt(file: Path, on_bad_row: OnBadRow) -> Rows:
  """The whole file as one row of raw text, whose place is its name."""
  with _open(file) as stream:
    data = _guarded(stream.read, strict_json.MAX_ROW_BYTES + 1, file)
  try:
    if len(data) > strict_json.MAX_ROW_BYTES:
      raise strict_json.too_long(file.name)
    text = _decoded(data, file.name)
  except RowError as error:
    on_bad_row(error)
  else:
    yield file.name, {"text": text}


def _open(file: Path) -> io.BufferedIOBase:
  """The file's bytes, unpacked, after a byte order mark if there is one."""
  if file.suffix == ".gz":
    stream = io.BufferedReader(gzip.GzipFile(file), _CHUNK)
  elif file.suffix == ".zst":
    packed = pyarrow.OSFile(str(file))
    unpacked = pyarrow.CompressedInputStream(packed, "zstd")
    stream = io.BufferedReader(unpacked, _CHUNK)
  else:
    stream = file.open("rb")
  if _guarded(stream.peek, 3, file).startswith(codecs.BOM_UTF8):
    stream.read(3)
  return stream


def _guarded(read: Callable[[int], bytes], size: int, file: Path) -> bytes:
  """What `read` gives; packed data that is damaged is a RowError."""
  try:
    return read(size)
  except (EOFError, OSError, zlib.error) as error:
    if file.suffix not in PACKINGS:
      raise
    raise RowError(
      file.name,
      f"packed data that is damaged or breaks off ({error})",
      f"a whole {file.suffix} file",
      "Fetch or pack the file again.",
    ) from None


def _lines(stream: Any, file: Path) -> Iterator[tuple[int, bytes]]:
  """Numbered lines; of one that is too long, only its beginning."""
  limit = strict_json.MAX_ROW_BYTES + 1
  for number in itertools.count(1):
    line = _guarded(stream.readline, limit, file)
    if not line:
      return
    rest = line
    while len(rest) == limit and not rest.endswith(b"\n"):
      rest = _guarded(stream.readline, limit, file)
    yield number, line


def _texts(stream: Any, file: Path) -> Iterator[str]:
  """The text in pieces, none of them empty."""
  decoder = codecs.getincrementaldecoder("utf-8")()
  read = 0
  while data := _guarded(stream.read, _CHUNK, file):
    # What the decoder keeps of a character that was cut.
    held = len(decoder.getstate()[0])
    try:
      piece = decoder.decode(data)
    except UnicodeDecodeError as error:
      raise _not_utf8(error, file.name, read - held) from None
    read += len(data)
    if piece:
      yield piece
  try:
    decoder.decode(b"", final=True)
  except UnicodeDecodeError as error:
    raise _not_utf8(error, file.name, read - len(error.object)) from None


def _decoded(data: bytes, where: str) -> str:
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    raise _not_utf8(error, where, 0) from None


def _not_utf8(error: UnicodeDecodeError, where: str, before: int) -> RowError:
  return RowError(
    f"{where} byte {before + error.start}",
    f"the byte 0x{error.object[error.start]:02x}, which is not UTF-8",
    "UTF-8",
    "Convert the file, or mend or drop the row.",
  )


def _object(row: Any, where: str) -> dict[str, Any]:
  if not isinstance(row, dict):
    raise RowError(
      where,
      f"a JSON {type(row).__name__}",
      "an object",
      "Give every row as {...}.",
    )
  return row
