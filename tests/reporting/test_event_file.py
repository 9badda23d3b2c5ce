"""Event files are what TensorBoard reads: by the format, and by itself."""

import struct

import pytest

from sft_jax.reporting.event_file import (
  EventFile,
  crc32c,
  record,
  scalars,
  version,
)


def test_crc32c_of_the_rfc():
  """RFC 3720, B.4, and the usual check value."""
  assert crc32c(b"123456789") == 0xE3069283
  assert crc32c(bytes(32)) == 0x8A9136AA
  assert crc32c(b"\xff" * 32) == 0x62A8AB43
  assert crc32c(bytes(range(32))) == 0x46DD794E


def test_a_record_and_its_events_byte_by_byte():
  # TFRecord's mask: the CRC turned right by 15, plus a constant.
  crc = crc32c(b"abc")
  masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
  framed = record(b"abc")
  assert len(framed) == 8 + 4 + 3 + 4
  assert framed[:8] == struct.pack("<Q", 3)
  assert framed[12:15] == b"abc"
  assert framed[15:] == struct.pack("<I", masked)
  when = b"\x09" + struct.pack("<d", 2.5)
  assert version(2.5) == when + b"\x1a\x0dbrain.Event:2"
  # Step 300 is the varint AC 02.
  value = b"\x0a\x01a\x15" + struct.pack("<f", 0.5)
  summary = b"\x0a" + bytes([len(value)]) + value
  want = when + b"\x10\xac\x02" + b"\x2a" + bytes([len(summary)]) + summary
  assert scalars(2.5, 300, {"a": 0.5}) == want


def test_a_start_has_a_file_of_its_own(tmp_path):
  for _ in range(2):
    EventFile(tmp_path).close()
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == [f"events.out.tfevents.{i:010}.sft_jax" for i in (1, 2)]


def test_tensorboard_reads_them(tmp_path):
  """Two starts; long names, large steps; a file cut in the middle."""
  reader = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator",
    reason="the reader of TensorBoard itself: pip install tensorboard",
  )
  steps = [*range(1, 60), 10**6, 2**40]
  name = "loss/source/" + "ü" * 200
  file = EventFile(tmp_path, wall_clock=lambda: 1e9)
  for step in steps:
    file.write(step, {"loss/nats_per_token": 1 / step, name: -float(step)})
  file.close()
  file = EventFile(tmp_path, wall_clock=lambda: 2e9)
  file.write(2**40 + 1, {"loss/nats_per_token": 7.0})
  file.write(2**40 + 2, {"loss/nats_per_token": 8.0})
  file.close()
  last = max(tmp_path.iterdir())
  last.write_bytes(last.read_bytes()[:-5])
  found = reader.EventAccumulator(str(tmp_path), {"scalars": 0})
  found.Reload()
  events = found.Scalars("loss/nats_per_token")
  assert [e.step for e in events] == [*steps, 2**40 + 1]
  assert [e.value for e in events[:-1]] == pytest.approx([1 / s for s in steps])
  assert [e.value for e in found.Scalars(name)] == [-float(s) for s in steps]
  assert {e.wall_time for e in events[:-1]} == {1e9}
  assert (events[-1].wall_time, events[-1].value) == (2e9, 7.0)
