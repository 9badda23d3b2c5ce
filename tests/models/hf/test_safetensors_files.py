"""Safetensors files: what the reference library says, or a named refusal."""

import json
import shutil
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import tiny
from sft_jax.checkpointing import export
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from sft_jax.models.hf import load_save
from sft_jax.models.hf.safetensors_files import (
  CHECKSUMS,
  Pending,
  check_checksums,
  read_header,
  write_file,
)

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16, np.int64, np.uint8]


def pending(tensors):
  return [
    Pending(name, x.dtype, x.shape, lambda x=x: x)
    for name, x in tensors.items()
  ]


def arrays():
  """{name: array}, names and shapes as odd as they may be."""
  shape = st.lists(st.integers(0, 5), max_size=3)
  one = st.builds(
    lambda shape, dtype, seed: (
      np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)
    ),
    shape,
    st.sampled_from(DTYPES),
    st.integers(0, 9),
  )
  names = st.text(st.characters(codec="utf-8"), max_size=6).filter(
    lambda name: name != "__metadata__"
  )
  return st.dictionaries(names, one, max_size=5)


@given(arrays())
@settings(max_examples=60, deadline=None)
def test_reads_what_the_library_wrote_and_writes_what_it_writes(
  tmp_path_factory, tensors
):
  folder = tmp_path_factory.mktemp("file")
  save_file(tensors, folder / "theirs", metadata={"format": "pt"})
  found = read_header(folder / "theirs")
  assert found.keys() == tensors.keys()
  for name, x in tensors.items():
    got = found[name].read()
    assert (got.dtype, got.shape) == (x.dtype, x.shape)
    assert got.tobytes() == x.tobytes()
    assert found[name].num_bytes == x.nbytes
    if x.ndim:
      assert found[name].read(1, 3).tobytes() == x[1:3].tobytes()
  write_file(folder / "ours", pending(tensors))
  theirs = load_file(folder / "ours")
  assert theirs.keys() == tensors.keys()
  for name, x in tensors.items():
    assert (theirs[name].dtype, theirs[name].shape) == (x.dtype, x.shape)
    assert theirs[name].tobytes() == x.tobytes()


def test_strided_arrays_are_written_as_they_read(tmp_path):
  x = np.arange(12, dtype=np.float32).reshape(3, 4)
  write_file(tmp_path / "file", pending({"x": x.T, "y": x[:, ::2]}))
  theirs = load_file(tmp_path / "file")
  np.testing.assert_array_equal(theirs["x"], x.T)
  np.testing.assert_array_equal(theirs["y"], x[:, ::2])


def test_without_a_file_every_tensor_is_still_made():
  """The other processes of a run gather with the one that writes."""
  made = []

  def make(name):
    made.append(name)
    return np.zeros(1, np.float32)

  wide, narrow = np.dtype(np.float32), np.dtype(np.float16)
  write_file(
    None,
    [
      Pending("b", narrow, (1,), lambda: make("b")),
      Pending("c", wide, (1,), lambda: make("c")),
      Pending("a", wide, (1,), lambda: make("a")),
    ],
  )
  assert made == ["a", "c", "b"]


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
  """40 MB in tensors of 4 are written and read back in less than 13."""
  one = np.dtype(np.float32)
  shape = (1_000_000,)
  tracemalloc.start()
  write_file(
    tmp_path / "file",
    [
      Pending(f"{i}", one, shape, lambda i=i: np.full(shape, i, one))
      for i in range(10)
    ],
  )
  for name, tensor in read_header(tmp_path / "file").items():
    assert (tensor.read() == float(name)).all()
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert 4e6 < peak < 13e6


# -- What is refused -----------------------------------------------------------


def raw(header, data=b"", length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  return length.to_bytes(8, "little") + text + data


def entry(shape, begin, end, dtype="F32"):
  return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TWO = {"a": entry([2], 0, 8), "b": entry([1], 8, 12)}
MALFORMED = {
  "empty file": b"",
  "seven bytes": b"\0" * 7,
  "header longer than the file": raw(b"{}", length=3),
  "header of 2^64 bytes": raw(b"{}", length=2**64 - 1),
  "not JSON": raw(b"{"),
  "not UTF-8": raw(b'{"\xff": 1}'),
  "a list": raw([]),
  "nested too deep": raw(b"[" * 100_000),
  "an entry that is none": raw({"a": 3}),
  "no offsets": raw({"a": {"dtype": "F32", "shape": []}}),
  "three offsets": raw(
    {"a": TWO["a"] | {"data_offsets": [0, 4, 8]}}, b"\0" * 8
  ),
  "an unknown dtype": raw({"a": entry([2], 0, 8, "F31")}, b"\0" * 8),
  "a dtype that is a list": raw({"a": entry([2], 0, 8, [])}, b"\0" * 8),
  "a negative size": raw({"a": entry([-2], 0, 8)}, b"\0" * 8),
  "a broken size": raw({"a": entry([2.0], 0, 8)}, b"\0" * 8),
  "a true size": raw({"a": entry([True], 0, 4)}, b"\0" * 4),
  "sizes that overflow": raw({"a": entry([2**62, 2**62], 0, 8)}, b"\0" * 8),
  "a size of 10^5000": raw(b'{"a": {"dtype": "U8", "shape": [1' + b"0" * 5000),
  "shape beyond the bytes": raw({"a": entry([3], 0, 8)}, b"\0" * 8),
  "ends before it begins": raw({"a": entry([0], 8, 0)}, b"\0" * 8),
  "overlapping": raw(TWO | {"b": entry([1], 4, 8)}, b"\0" * 8),
  "the same bytes twice": raw(TWO | {"b": entry([2], 0, 8)}, b"\0" * 8),
  "a hole": raw(TWO | {"b": entry([1], 12, 16)}, b"\0" * 16),
  "not from the start": raw({"a": entry([2], 4, 12)}, b"\0" * 12),
  "beyond the end": raw(TWO, b"\0" * 11),
  "cut off": raw(TWO, b"\0" * 4),
  "bytes left over": raw(TWO, b"\0" * 13),
  "a tensor twice": raw(
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
    b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    b"\0" * 4,
  ),
  "a shape twice": raw(
    b'{"a": {"dtype": "F32", "shape": [1], "shape": [1], '
    b'"data_offsets": [0, 4]}}',
    b"\0" * 4,
  ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_by_name(name, tmp_path):
  path = tmp_path / "model.safetensors"
  path.write_bytes(MALFORMED[name])
  with pytest.raises(ValueError, match=r"model\.safetensors: not a whole"):
    read_header(path)


def test_a_file_that_cannot_be_opened_is_refused_in_one_line(tmp_path):
  with pytest.raises(ValueError, match=r"gone: not a whole .*No such file"):
    read_header(tmp_path / "gone")


def test_a_file_that_shrinks_meanwhile_is_refused(tmp_path):
  path = tmp_path / "model.safetensors"
  path.write_bytes(raw(TWO, b"\0" * 12))
  found = read_header(path)
  path.write_bytes(raw(TWO, b"\0" * 3))
  with pytest.raises(ValueError, match=r"3 bytes of 'a'"):
    found["a"].read()


GOOD = raw(
  {"a": entry([2, 3], 0, 24), "b": entry([4], 24, 32, "BF16")},
  bytes(range(32)),
)


@given(
  st.lists(
    st.tuples(
      st.sampled_from(["set", "cut", "insert", "drop", "repeat"]),
      st.integers(0, len(GOOD) - 1),
      st.one_of(
        st.integers(0, 255),
        st.sampled_from(list(b'{}[]",:0123456789-.eE ')),
      ),
    ),
    min_size=1,
    max_size=4,
  )
)
@example([("set", 7, 255)])
@settings(max_examples=400, deadline=1000)
def test_any_change_is_refused_or_read_as_the_library_reads_it(
  tmp_path_factory, changes
):
  """Never a crash, a hang or a large allocation."""
  data = bytearray(GOOD)
  for what, at, value in changes:
    at = min(at, max(len(data) - 1, 0))
    match what:
      case "set" if data:
        data[at] = value
      case "cut":
        del data[at:]
      case "insert":
        data.insert(at, value)
      case "drop" if data:
        del data[at]
      case "repeat":
        data[at:at] = data[at : at + 8]
  path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
  path.write_bytes(data)
  try:
    found = read_header(path)
  except ValueError as error:
    message = str(error)
  else:
    message = ""
  if message:
    assert message.startswith(f"{path}: not a whole safetensors file")
    return
  # What we take, the library takes too, and reads the same.
  with safetensors.safe_open(path, framework="numpy") as theirs:
    assert set(theirs.keys()) == found.keys()
    for name, tensor in found.items():
      if tensor.dtype in (np.float32, ml_dtypes.bfloat16):
        assert theirs.get_tensor(name).tobytes() == tensor.read().tobytes()


# -- Checksums --------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
  place = tmp_path_factory.mktemp("exported")
  folder = tiny.model_folder(place / "model")
  model, params = load_save.load_pretrained(folder)
  export.save_pretrained(
    place / "out",
    model,
    params,
    load_tokenizer(folder),
    max_shard_bytes=200_000,
  )
  return place / "out"


def test_every_file_is_under_a_digest(exported):
  lines = (exported / CHECKSUMS).read_text().splitlines()
  named = {line.split("  ")[1] for line in lines}
  assert named == {p.name for p in exported.iterdir()} - {CHECKSUMS}
  assert sum(name.endswith(".safetensors") for name in named) > 1
  check_checksums(exported)


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_damage_of_any_file_is_named(tmp_path, exported, how):
  for file in sorted(exported.iterdir()):
    folder = Path(shutil.copytree(exported, tmp_path / file.name))
    raw = bytearray(file.read_bytes())
    if how == "flip":
      raw[len(raw) // 3] ^= 0x04
    elif how == "truncate":
      raw = raw[: len(raw) // 2]
    path = folder / file.name
    path.unlink()
    if how != "delete":
      path.write_bytes(raw)
    elif file.name == CHECKSUMS:
      continue  # Without digests a folder is like any other.
    with pytest.raises(ValueError, match=r"expected|missing"):
      load_save.load_pretrained(folder)
