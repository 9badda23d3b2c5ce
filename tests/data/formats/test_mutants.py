"""Damaged rows are trained or dropped with a reason; nothing else happens."""

import collections
import contextlib
import gzip
import json
import random
import resource
import time

import pyarrow
import pyarrow.parquet
import pytest

from mutants import KEYS, VALUES, mutated
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.conversation import NothingToTrain, RowError
from sft_jax.data.encoding import encode
from sft_jax.data.formats import formats
from sft_jax.data.readers import files
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from tiny_tokenizers import byte_level


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return load_tokenizer(byte_level(tmp_path_factory.mktemp("tokenizer")))


def outcome(where, row, tokenizer):
  """'trained', or why the row is dropped."""
  try:
    made = formats.to_conversation(row, source=where)
    examples, dropped, _ = encode.encode_row(
      made, tokenizer, RenderOptions(), max_length=4096
    )
  except NothingToTrain as nothing:
    return nothing.reason
  except RowError as error:
    said = str(error)
  else:
    said = ""
  if said:
    assert said.startswith(where)
    assert len(said) < 5000
    return "malformed"
  assert all(one.loss_weights.any() for one in examples)
  return "trained" if examples else next(iter(dropped))


def read_mutants(path, lines, tokenizer):
  """Outcomes of a file of lines, each of which must have exactly one."""
  path.write_bytes(b"\n".join(lines))
  places, outcomes, slowest = [], collections.Counter(), 0.0

  def unreadable(error):
    places.append(error.where.split()[0])
    outcomes["malformed"] += 1

  start = time.process_time()
  for where, row in files.read_rows(path, on_bad_row=unreadable):
    outcomes[outcome(where, row, tokenizer)] += 1
    places.append(where)
    slowest = max(slowest, time.process_time() - start)
    start = time.process_time()
  filled = [i for i, line in enumerate(lines, start=1) if line.strip()]
  assert sorted(places) == sorted(f"{path.name}:{i}" for i in filled)
  assert slowest < 5
  return outcomes


def test_mutated_lines(tmp_path, tokenizer):
  rng = random.Random(0)
  lines = [mutated(rng) for _ in range(300)]
  outcomes = read_mutants(tmp_path / "a.jsonl", lines, tokenizer)
  # Enough of both, or the mutants would be too tame or too wild.
  assert 30 < outcomes["trained"] < 270
  assert 30 < outcomes["malformed"] < 270


@pytest.mark.slow
def test_ten_thousand_mutated_lines_in_bounded_memory(tmp_path, tokenizer):
  rng = random.Random(1)
  read_mutants(tmp_path / "a.jsonl", [mutated(rng)] * 100, tokenizer)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  outcomes = collections.Counter()
  for _ in range(10):
    lines = [mutated(rng) for _ in range(1000)]
    outcomes += read_mutants(tmp_path / "a.jsonl", lines, tokenizer)
  assert outcomes.total() > 9900  # A few lines have become blank.
  assert outcomes["trained"] > 1000
  # In KiB: no more than buffers.
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_mutated_arrays(tmp_path):
  """Of an array, what stands before the damage is read, then it is refused."""
  rng = random.Random(2)
  path = tmp_path / "a.json"
  for _ in range(100):
    path.write_bytes(b"[%s]" % b",".join(mutated(rng) for _ in range(3)))
    with contextlib.suppress(RowError):
      for _, row in files.read_rows(path, on_bad_row=lambda error: None):
        assert isinstance(row, dict)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl.gz"])
def test_mutated_files(tmp_path, suffix):
  """Any byte of a binary file may be wrong."""
  rng = random.Random(3)
  path = tmp_path / ("a" + suffix)
  made = [{"prompt": f"{i}?", "completion": str(i)} for i in range(50)]
  if suffix == ".parquet":
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), path)
  elif suffix == ".arrow":
    table = pyarrow.Table.from_pylist(made)
    with pyarrow.ipc.new_stream(path, table.schema) as stream:
      stream.write_table(table)
  else:
    with gzip.open(path, "wt") as stream:
      stream.writelines(json.dumps(row) + "\n" for row in made)
  whole = path.read_bytes()
  for _ in range(60):
    data = bytearray(whole)
    for _ in range(rng.choice([1, 3])):
      data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)
    with contextlib.suppress(RowError):
      for where, row in files.read_rows(path, on_bad_row=lambda error: None):
        with contextlib.suppress(NothingToTrain):
          formats.to_conversation(row, source=where)


PYTHON = [
  *VALUES,
  *(float("nan"), float("inf"), b"x", (1, 2), {1: 2}, object(), {"a": {1}}),
]


def test_rows_that_no_file_holds(tokenizer):
  """What a program may hand over."""
  rng = random.Random(4)
  circle: list = []
  circle.append(circle)
  deep: list = []
  for _ in range(5000):
    deep = [deep]
  for _ in range(300):
    row = {
      rng.choice([*KEYS, 3]): rng.choice([*PYTHON, circle, deep])
      for _ in range(rng.randrange(1, 4))
    }
    outcome("a.jsonl:1", row, tokenizer)
