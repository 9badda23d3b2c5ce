"""Event files: scalars in the format that TensorBoard reads, without it.

A file is a sequence of records; a record is

    length, 8 bytes | its masked CRC-32C, 4 | data | the data's masked CRC-32C

all little-endian, and its data an `Event` message of protocol buffers, of
which these fields are written (number, type):

    Event    wall_time (1, double), step (2, varint), file_version (3, string),
             summary (5, Summary)
    Summary  value (1, Value), repeated
    Value    tag (1, string), simple_value (2, float)
"""

import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def _table() -> list[int]:
  """CRC-32C (Castagnoli, reflected) of each byte."""
  table = []
  for crc in range(256):
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    table.append(crc)
  return table


_CRC = _table()


def crc32c(data: bytes) -> int:
  """The CRC-32C of RFC 3720.

  >>> hex(crc32c(b'123456789'))
  '0xe3069283'
  """
  crc = 0xFFFFFFFF
  for byte in data:
    crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
  return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
  """TFRecord's CRC: turned and shifted, so that a CRC of CRCs is none."""
  crc = crc32c(data)
  turned = crc >> 15 | crc << 17
  return struct.pack("<I", (turned + 0xA282EAD8) & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
  """The data framed as a record."""
  length = struct.pack("<Q", len(data))
  return length + _masked(length) + data + _masked(data)


def _varint(number: int) -> bytes:
  """Seven bits a byte, the lowest first; all but the last have bit 7 set."""
  out = bytearray()
  while number > 0x7F:
    out.append(number & 0x7F | 0x80)
    number >>= 7
  out.append(number)
  return bytes(out)


def _field(number: int, data: bytes) -> bytes:
  """A field of bytes, text or a message (wire type 2)."""
  return _varint(number << 3 | 2) + _varint(len(data)) + data


def version(wall_time: float) -> bytes:
  """The event that begins a file."""
  return b"\x09" + struct.pack("<d", wall_time) + _field(3, b"brain.Event:2")


def scalars(wall_time: float, step: int, values: Mapping[str, float]) -> bytes:
  """The event of a step: values by name, as float32."""
  summary = b"".join(
    _field(1, _field(1, name.encode()) + b"\x15" + struct.pack("<f", value))
    for name, value in values.items()
  )
  when = b"\x09" + struct.pack("<d", wall_time)
  return when + b"\x10" + _varint(step) + _field(5, summary)


class EventFile:
  """A new event file in a folder, after those that are there."""

  def __init__(
    self, folder: Path, *, wall_clock: Callable[[], float] = time.time
  ):
    """Opens it; readers take files in the order of their names."""
    self._clock = wall_clock
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + len(list(folder.glob("events.out.tfevents.*")))
    path = folder / f"events.out.tfevents.{number:010}.sft_jax"
    self._file = path.open("xb")
    self._add(version(self._clock()))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Appends the scalars of a step, down to the operating system."""
    self._add(scalars(self._clock(), step, values))

  def _add(self, event: bytes) -> None:
    self._file.write(record(event))
    self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()
