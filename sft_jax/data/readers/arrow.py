"""Rows of Parquet and Arrow files, strictly.

Arrow has no absent keys: a struct column gives every row every key, and null
where the row had none. That null is taken out of structs again, as one that
somebody wrote looks the same. Tools and arguments that mean their nulls, or
the order of their keys, belong in columns of JSON text.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from pyarrow import compute

from sft_jax.data.conversation import RowError, one_line
from sft_jax.data.readers import json
from sft_jax.data.readers.json import OnBadRow, Rows

# Rows that are Python objects at a time.
_BATCH = 256
# Of a value that is there and has no Python form: bytes that are not UTF-8, a
# time beyond the calendar.
_FAULTS = (ValueError, OverflowError, pyarrow.ArrowException)
# What an Arrow stream ends with (IPC format, "end-of-stream").
_END = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(file: Path, on_bad_row: OnBadRow) -> Rows:
  """Rows of a Parquet file; places are 'rows.parquet[3]', from 0."""
  with _reading(file):
    # Buffered ahead, a row group would be held whole.
    table = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
  with table:
    _check_names(table.schema_arrow, file)
    batches = table.iter_batches(batch_size=_BATCH)
    yield from _rows(batches, file, on_bad_row)


def read_arrow(file: Path, on_bad_row: OnBadRow) -> Rows:
  """Rows of an Arrow file: a stream, as `datasets` writes, or Feather."""
  with _reading(file), file.open("rb") as stream:
    is_stream = stream.read(6) != b"ARROW1"
    stream.seek(-min(len(_END), file.stat().st_size), io.SEEK_END)
    # One that breaks off between two batches looks whole otherwise.
    if is_stream and stream.read() != _END:
      raise pyarrow.ArrowInvalid("no end-of-stream mark")
  with pyarrow.memory_map(str(file)) as mapped:
    with _reading(file):
      if is_stream:
        whole = table = pyarrow.ipc.open_stream(mapped)
      else:
        table = pyarrow.ipc.open_file(mapped)
        whole = map(table.get_batch, range(table.num_record_batches))
    _check_names(table.schema, file)
    batches = (
      batch.slice(start, _BATCH)
      for batch in whole
      for start in range(0, batch.num_rows, _BATCH)
    )
    yield from _rows(batches, file, on_bad_row)


def _rows(
  batches: Iterator[pyarrow.RecordBatch], file: Path, on_bad_row: OnBadRow
) -> Rows:
  index = 0
  while True:
    with _reading(file):
      batch = next(batches, None)
    if batch is None:
      return
    structs = [one.name for one in batch.schema if _has_struct(one.type)]
    rows = None
    with contextlib.suppress(*_FAULTS):
      # Offsets that lead out of a buffer would be followed.
      batch.validate(full=True)
      if batch.nbytes <= json.MAX_ROW_BYTES and _not_finite(batch) is None:
        rows = enumerate(batch.to_pylist(), start=index)
    for at, row in rows or _one_by_one(batch, file, index, on_bad_row):
      for name in structs:
        row[name] = _without_nulls(row[name])
      yield f"{one_line(file.name)}[{at}]", row
    index += batch.num_rows


def _one_by_one(
  batch: pyarrow.RecordBatch, file: Path, index: int, on_bad_row: OnBadRow
) -> Iterator[tuple[int, dict[str, Any]]]:
  """(index, row) of a batch that is too large, or has a fault, as a whole."""
  for at in range(index, index + batch.num_rows):
    where = f"{one_line(file.name)}[{at}]"
    one = batch.slice(at - index, 1)
    try:
      one.validate(full=True)
      if one.nbytes > json.MAX_ROW_BYTES:
        raise json.too_long(where)
      if name := _not_finite(one):
        raise ValueError(f"NaN or infinity in the column {name}")
      (row,) = one.to_pylist()
    except RowError as error:
      on_bad_row(error)
    except _FAULTS as error:
      got = f"a value that cannot be read ({error})"
      expected = "UTF-8 text, finite numbers and values that Python has"
      on_bad_row(RowError(where, got, expected, "Correct or drop the row."))
    else:
      yield at, row


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
  """Damage that Arrow meets is a RowError that names the file."""
  try:
    yield
  except (pyarrow.ArrowException, OSError) as error:
    if isinstance(error, FileNotFoundError | PermissionError):
      raise
    got = f"a file that is damaged or breaks off ({error})"
    expected = f"a whole {file.suffix} file"
    raise RowError(
      one_line(file.name), got, expected, "Fetch or write the file again."
    ) from None


def _check_names(schema: pyarrow.Schema, file: Path) -> None:
  twice = [name for name in schema.names if schema.names.count(name) > 1]
  if twice:
    got, expected = f"two columns of the name {twice[0]!r}", "each name once"
    raise RowError(one_line(file.name), got, expected, "Rename one of them.")


def _not_finite(batch: pyarrow.RecordBatch) -> str | None:
  """The first column with a number that is not finite."""

  def finite(values: pyarrow.Array) -> bool:
    kind = values.type
    if pyarrow.types.is_floating(kind):
      finite_ones = compute.call_function("is_finite", [values]).drop_null()
      return finite_ones.true_count == len(finite_ones)
    if pyarrow.types.is_struct(kind):
      return all(map(finite, values.flatten()))
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
      return finite(values.flatten())
    return True

  names = zip(batch.schema.names, batch.columns, strict=True)
  return next((name for name, column in names if not finite(column)), None)


def _has_struct(kind: pyarrow.DataType) -> bool:
  return pyarrow.types.is_struct(kind) or any(
    _has_struct(kind.field(i).type) for i in range(kind.num_fields)
  )


def _without_nulls(value: Any) -> Any:
  if isinstance(value, dict):
    pairs = ((key, held) for key, held in value.items() if held is not None)
    return {key: _without_nulls(held) for key, held in pairs}
  if isinstance(value, list):
    return [_without_nulls(held) for held in value]
  return value
