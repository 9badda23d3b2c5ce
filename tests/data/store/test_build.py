"""A store holds every row, is keyed by its causes, and is whole or absent."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny_tokenizers
from sft_jax.data.audit import checks, token_checks
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.conversation import RowError
from sft_jax.data.encoding import encode
from sft_jax.data.formats import formats
from sft_jax.data.pipeline import Stream
from sft_jax.data.sources import Source
from sft_jax.data.store import build, shards
from sft_jax.data.tokenizers.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  return load_tokenizer(tiny_tokenizers.byte_level(folder))


def _row(i, answer="The cat."):
  return {"prompt": f"What is {i}?", "completion": answer}


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def _build(sources, tokenizer, folder, **kwargs):
  told = []
  fields = {field.name for field in dataclasses.fields(RenderOptions)}
  options = RenderOptions(**{k: v for k, v in kwargs.items() if k in fields})
  arguments = {"directory": folder, "max_length": 64, "log": told.append}
  arguments |= {k: v for k, v in kwargs.items() if k not in fields}
  return build.build(sources, tokenizer, options, **arguments), told


def _same(a, b):
  return np.array_equal(a.tokens, b.tokens) and np.array_equal(
    a.loss_weights, b.loss_weights
  )


def _bytes(folder):
  return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_store_holds_what_encode_makes(tmp_path, tokenizer):
  rows = [_row(1), {"text": "The dog ran. " * 20}, _row(2, ""), _row(3)]
  path = _write(tmp_path / "rows.jsonl", rows)
  store, _ = _build(path, tokenizer, tmp_path / "cache")

  expected = [
    (example, f"rows.jsonl:{i + 1}")
    for i in (0, 1, 3)
    for example in encode.encode(
      formats.to_conversation(rows[i]), tokenizer, max_length=64
    )
  ]
  assert len(expected) > 3, "the long text should take several windows"
  assert len(store.index) == len(expected)
  for i, (example, place) in enumerate(expected):
    assert _same(store.example(i), example)
    assert store.place(i) == place
    assert store.lengths[i] == len(example.tokens)

  entry = store.stats.source(path)
  assert (entry.rows_in, entry.rows_trained, entry.rows_text) == (4, 3, 1)
  assert entry.dropped == {"empty answer": 1}
  assert entry.places == {"empty answer": ["rows.jsonl:3"]}
  assert entry.tokens_prompt + entry.tokens_trained == store.lengths.sum()
  findings = checks.check_store(store, token_checks.facts(tokenizer))
  assert not [finding for finding in findings if finding.count]
  stream = Stream(store, seq_len=64, batch_size=2, epochs=1)
  trained = sum((b.loss_weights > 0).sum() for b in stream.batches())
  assert trained == entry.tokens_trained


def test_long_rows_are_dropped_or_cut_and_counted(tmp_path, tokenizer):
  path = _write(tmp_path / "rows.jsonl", [_row(1), _row(2, "The cat. " * 50)])
  dropped, _ = _build(path, tokenizer, tmp_path / "cache")
  assert dropped.stats.source(path).dropped == {"over long": 1}
  cut, _ = _build(path, tokenizer, tmp_path / "cache", over_long="truncate")
  assert cut.lengths[1] == 64
  assert cut.index["may_run_on"].tolist() == [False, True]


def test_second_build_reads_the_first(tmp_path, tokenizer, monkeypatch):
  path = _write(tmp_path / "rows.jsonl", [_row(i) for i in range(5)])
  first, _ = _build(path, tokenizer, tmp_path / "cache")
  monkeypatch.delattr(encode, "encode_rows")
  second, told = _build((path,), tokenizer, tmp_path / "cache")
  assert "from cache" in told[0]
  assert second.fingerprint == first.fingerprint
  assert second.stats == first.stats
  assert all(_same(first.example(i), second.example(i)) for i in range(5))


def test_key_is_of_every_cause(tmp_path, tokenizer, monkeypatch):
  path = _write(tmp_path / "rows.jsonl", [_row(1)])
  folder = tmp_path / "cache"
  for change in (
    {},
    {"max_length": 63},
    {"history": "split"},
    {"over_long": "truncate"},
    {"on_bad_row": "skip"},
    {"format": "prompt_completion"},
    {"template_kwargs": {"enable_thinking": False}},
  ):
    _, told = _build(path, tokenizer, folder, **change)
    assert "encoding" in told[0], change
  _write(tmp_path / "rows.jsonl", [_row(2)])
  _, told = _build(path, tokenizer, folder)
  assert "encoding" in told[0]
  monkeypatch.setattr(tokenizer, "fingerprint", "another template")
  _, told = _build(path, tokenizer, folder)
  assert "encoding" in told[0]


def test_weights_and_folders_are_no_part_of_the_key(tmp_path, tokenizer):
  path = _write(tmp_path / "rows.jsonl", [_row(1)])
  _build(path, tokenizer, tmp_path / "cache")
  (tmp_path / "moved").mkdir()
  moved = shutil.copy(path, tmp_path / "moved")
  store, told = _build([(str(moved), 2.5)], tokenizer, tmp_path / "cache")
  assert "from cache" in told[0]
  assert store.copies == (2.5,)
  assert list(store.stats.sources) == [str(moved)]


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
@pytest.mark.parametrize(
  "name", ["tokens.bin", "runs.bin", "index.bin", "places.txt", "meta.json"]
)
def test_damaged_store_is_made_again(tmp_path, tokenizer, name, how):
  path = _write(tmp_path / "rows.jsonl", [_row(i) for i in range(3)])
  _build(path, tokenizer, tmp_path / "cache")
  (folder,) = (tmp_path / "cache").iterdir()
  written = {file.name: file.read_bytes() for file in folder.iterdir()}
  data = bytearray(written[name])
  if how == "flip":
    data[len(data) // 2] ^= 1
  elif how == "truncate":
    del data[len(data) // 2 :]
  (folder / name).unlink()
  if how != "delete":
    (folder / name).write_bytes(data)
  _, told = _build(path, tokenizer, tmp_path / "cache")
  assert str(folder) in told[0]
  assert "again" in told[0]
  assert {file.name: file.read_bytes() for file in folder.iterdir()} == written


def test_failed_build_leaves_nothing(tmp_path, tokenizer):
  path = _write(tmp_path / "rows.jsonl", [_row(1), {"prompt": "No answer?"}])
  with pytest.raises(RowError, match=r"rows\.jsonl:2"):
    _build(path, tokenizer, tmp_path / "cache")
  assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def many_chunks(monkeypatch):
  """Two rows per chunk, and workers from the second chunk on."""
  monkeypatch.setattr(build, "_ALONE", 1)
  read = shards.read
  monkeypatch.setattr(
    shards, "read", lambda *args, **kwargs: read(*args, **kwargs, chunk_rows=2)
  )


def test_any_number_of_workers_writes_the_same_bytes(
  tmp_path, tokenizer, many_chunks
):
  rows = [_row(i, "The cat. " * (i % 5)) for i in range(20)]
  rows += [{"text": "The dog ran. " * 20}, {"a": 1}]
  one = _write(tmp_path / "one.jsonl", rows)
  two = _write(tmp_path / "two.jsonl", [{"a": 2}, _row(99), *rows[:7]])
  with open(two, "a") as file:
    file.write("not json\n")
  made = {}
  for number in (1, 2, 3):
    directory = tmp_path / str(number)
    store, _ = _build(
      (one, {"path": two, "limit": 5, "loss_weight": 0.5}),
      tokenizer,
      directory,
      num_workers=number,
      on_bad_row="skip",
    )
    (folder,) = directory.iterdir()
    made[number] = (folder.name, store.fingerprint, _bytes(folder))
    assert store.stats.dropped("beyond limit") == 5
  assert made[1] == made[2] == made[3]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_first_fault_stops_the_build(
  tmp_path, tokenizer, many_chunks, num_workers
):
  """Also where a later one is met first: a file that cannot be read."""
  path = _write(
    tmp_path / "a.jsonl", [*map(_row, range(7)), {"b": 1}, {"c": 1}]
  )
  (tmp_path / "b.parquet").write_bytes(b"not parquet")
  with pytest.raises(RowError, match=r"a\.jsonl:8"):
    _build(
      (path, str(tmp_path / "b.parquet")),
      tokenizer,
      tmp_path / "cache",
      num_workers=num_workers,
    )
  assert list((tmp_path / "cache").iterdir()) == []


def test_a_limit_takes_rows_by_seed(tmp_path, tokenizer):
  path = _write(tmp_path / "rows.jsonl", map(_row, range(40)))

  def taken(limit, seed):
    store, _ = _build(
      {"path": path, "limit": limit}, tokenizer, tmp_path / "cache", seed=seed
    )
    assert store.stats.source(path).rows_in == 40
    return [store.place(i) for i in range(len(store.index))]

  assert len(taken(10, 0)) == 10
  assert taken(10, 0) == taken(10, 0) != taken(10, 1)
  assert taken(10, 0) != [f"rows.jsonl:{i}" for i in range(1, 11)]
  assert len(taken(99, 0)) == 40


KILLED = """
import os, signal, sys
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.store import build, shards
from sft_jax.data.tokenizers.tokenizer import load_tokenizer

folder, rows, directory, when = sys.argv[1:]
build._ALONE = 1
read = shards.read
shards.read = lambda *args, **kwargs: read(*args, **kwargs, chunk_rows=2)


def die(*_):
  os.kill(os.getpid(), signal.SIGKILL if when != "term" else signal.SIGTERM)


if when in ("seal", "sync_folder"):
  setattr(build, "_seal" if when == "seal" else when, die)
else:
  append, left = build._Writer.append, [3]

  def count_down(self, chunk):
    left[0] -= 1
    append(self, chunk) if left[0] else die()

  build._Writer.append = count_down
build.build(rows, load_tokenizer(folder), RenderOptions(), directory=directory,
            max_length=64, num_workers=2)
"""


@pytest.mark.parametrize("when", ["append", "term", "seal", "sync_folder"])
def test_a_killed_build_is_begun_again(tmp_path, tokenizer, when):
  path = _write(tmp_path / "rows.jsonl", map(_row, range(20)))
  directory = tmp_path / "cache"
  killed = subprocess.run(
    [
      *(sys.executable, "-c", KILLED),
      *(str(tokenizer.folder), path, str(directory), when),
    ],
    capture_output=True,
    cwd=Path(build.__file__).parents[3],
  )
  assert killed.returncode in (-signal.SIGKILL, -signal.SIGTERM), killed.stderr
  left = {file.name[:10] for file in directory.iterdir()}
  assert left == {".building-"}, "nothing that looks whole"
  store, told = _build(path, tokenizer, directory)
  assert len(store.index) == 20
  assert "encoding" in told[0]
  (folder,) = directory.iterdir()
  assert not folder.name.startswith("."), "and what was left is gone"


def test_a_build_of_a_living_process_is_left_alone(tmp_path):
  with build._turn(tmp_path, "x", print):
    place = tmp_path / ".building-x.1"
    place.mkdir()
    build._remove_dead(tmp_path)
    assert place.exists()
  build._remove_dead(tmp_path)
  assert not (tmp_path / ".building-x.lock").exists()


def test_store_of_another_process_is_used(tmp_path, tokenizer, monkeypatch):
  """Two build at once; the second to finish finds the first's in place."""
  path = _write(tmp_path / "rows.jsonl", [_row(1)])
  _build(path, tokenizer, tmp_path / "other")
  (other,) = (tmp_path / "other").iterdir()
  seal = build._seal

  def seal_late(building, *args):
    seal(building, *args)
    shutil.copytree(other, tmp_path / "cache" / other.name)

  monkeypatch.setattr(build, "_seal", seal_late)
  store, _ = _build(path, tokenizer, tmp_path / "cache")
  assert len(store.index) == 1
  assert [f.name for f in (tmp_path / "cache").iterdir()] == [other.name]


def test_bad_rows_can_be_skipped_and_are_written_down(tmp_path, tokenizer):
  path = tmp_path / "rows.jsonl"
  good = json.dumps(_row(1))
  path.write_text(f'{good}\n{{"prompt": broken\n{{"a": 1}}\n{good}\n')
  with pytest.raises(RowError, match=r"rows\.jsonl:2"):
    _build(str(path), tokenizer, tmp_path / "cache")
  store, told = _build(
    str(path), tokenizer, tmp_path / "cache", on_bad_row="skip"
  )
  entry = store.stats.source(str(path))
  assert (entry.rows_in, entry.rows_trained) == (4, 2)
  assert entry.dropped == {"malformed": 2}
  assert "2 malformed rows" in told[-1]
  (folder,) = (tmp_path / "cache").iterdir()
  lines = (folder / "bad_rows.jsonl").read_text().splitlines()
  places = [json.loads(line)["where"] for line in lines]
  assert [place.split()[0] for place in places] == [
    "rows.jsonl:2",
    "rows.jsonl:3",
  ]


def test_sources_are_counted_apart(tmp_path, tokenizer):
  one = _write(tmp_path / "one.jsonl", [_row(1), _row(2)])
  _write(tmp_path / "two_a.jsonl", [_row(3)])
  _write(tmp_path / "two_b.jsonl", [_row(4), _row(5, "")])
  two = str(tmp_path / "two_*.jsonl")
  store, _ = _build((one, (two, 0.5)), tokenizer, tmp_path / "cache")
  assert store.source.tolist() == [0, 0, 1, 1]
  assert store.copies == (1.0, 0.5)
  assert store.stats.source(one).rows_in == 2
  assert store.stats.source(two).rows_in == 3
  assert store.stats.source(two).rows_trained == 2


def test_unknown_policy(tmp_path, tokenizer):
  path = _write(tmp_path / "rows.jsonl", [_row(1)])
  with pytest.raises(ValueError, match=r"data\.on_bad_row: got 'ignore'"):
    _build(path, tokenizer, tmp_path, on_bad_row="ignore")


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_in_memory_are_those_of_a_file(tmp_path, tokenizer, workers):
  rows = [_row(i) for i in range(3000 if workers > 1 else 6)] + [_row(9, "")]
  path = _write(tmp_path / "rows.jsonl", rows)
  file, _ = _build(path, tokenizer, tmp_path / "a", num_workers=1)
  conversations = [formats.to_conversation(row) for row in rows[:-1]]
  for given in (iter(rows), [*conversations, rows[-1]]):
    store, _ = _build(
      Source(rows=given), tokenizer, tmp_path / "b", num_workers=workers
    )
    assert store.stats.source("rows").dropped == {"empty answer": 1}
    assert len(store.index) == len(file.index)
    for i in (0, 1, len(file.index) - 1):
      assert _same(store.example(i), file.example(i))
      assert store.place(i) == f"rows[{i}]"


def test_rows_in_memory_are_known_by_their_content(tmp_path, tokenizer):
  rows = [_row(i) for i in range(5)]
  first, _ = _build(Source(rows=rows), tokenizer, tmp_path / "cache")
  again, told = _build(
    Source(rows=(dict(row) for row in rows)), tokenizer, tmp_path / "cache"
  )
  assert "from cache" in told[0]
  assert again.fingerprint == first.fingerprint
  other = [*rows[:4], _row(4, "The cats.")]
  store, told = _build(Source(rows=other), tokenizer, tmp_path / "cache")
  assert "from cache" not in told[0]
  few = Source(rows=rows, limit=2)
  store, _ = _build(few, tokenizer, tmp_path / "cache")
  assert store.stats.source("rows").dropped == {"beyond limit": 3}
  bad = Source(rows=[rows[0], {"a": 1}], name="mine")
  with pytest.raises(RowError, match=r"^mine\[1\]: got .*no known format"):
    _build(bad, tokenizer, tmp_path / "cache")


def _change_in_place(path, other):
  path.write_text(other)


def _replace(path, other):
  (path.parent / "new").write_text(other)
  (path.parent / "new").rename(path)


def _change_for_a_while(path, other):
  """The old bytes and times are back before anyone looks again."""
  before, times = path.read_text(), path.stat()
  path.write_text(other)
  yield
  path.write_text(before)
  os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _remove(path, other):
  path.unlink()


def _add(path, other):
  path.with_name("more.jsonl").write_text(other)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
  ("change", "word"),
  [
    (_change_in_place, "has changed"),
    (_replace, "has changed"),
    (_change_for_a_while, "has changed"),
    (_remove, "no such file"),
    (_add, "is new"),
  ],
)
def test_a_file_that_changes_while_it_is_read_is_refused(
  tmp_path, tokenizer, monkeypatch, change, word, workers
):
  """Rows of one content are never kept under the digest of another."""
  if workers == 2:
    monkeypatch.setattr(build, "_ALONE", 1)
  old = [_row(i) for i in range(8)]
  new = [_row(i, "A dog.") for i in range(8)]
  (tmp_path / "rows").mkdir()
  path = tmp_path / "rows" / "a.jsonl"
  _write(path, old)
  glob = Source(str(tmp_path / "rows" / "*.jsonl"), name="all")
  other = "".join(json.dumps(row) + "\n" for row in new)
  read = shards.read

  def read_what_changes(*args, **kwargs):
    under_way = change(path, other)  # After the digest, before the reading.
    if under_way:
      next(under_way)
    yield from read(*args, **kwargs, chunk_rows=2)
    if under_way:
      next(under_way, None)

  with monkeypatch.context() as patch:
    patch.setattr(shards, "read", read_what_changes)
    with pytest.raises(ValueError, match=word):
      _build(glob, tokenizer, tmp_path / "cache", num_workers=workers)
  assert list((tmp_path / "cache").iterdir()) == []
  _write(path, old)
  path.with_name("more.jsonl").unlink(missing_ok=True)
  store, _ = _build(glob, tokenizer, tmp_path / "cache")
  again, told = _build(glob, tokenizer, tmp_path / "cache")
  assert "from cache" in told[0]
  for one in (store, again):
    assert tokenizer.decode(one.example(0).tokens.tolist()).count("The cat.")


def test_a_column_that_is_no_weight_is_not_read_and_said(tmp_path, tokenizer):
  weights = [0.5, 70.5, 1, None]
  rows = [_row(i) | {"weight": x} for i, x in enumerate(weights)]
  path = _write(tmp_path / "rows.jsonl", rows)
  store, _ = _build(path, tokenizer, tmp_path / "cache")
  for i in range(len(rows)):
    assert set(np.unique(store.example(i).loss_weights)) == {0, 1}
  said = "not read as a weight: weight, 0.5 to 70.5"
  assert store.stats.source(path).notes == {said: 3}
  assert any(said in line for line in store.stats.lines())
  # All within [0, 1], or asked for, it is one.
  asked = Source(path, columns={"weight": "loss_weight"})
  store, _ = _build(asked, tokenizer, tmp_path / "cache")
  assert store.example(1).loss_weights.max() == 70.5
  path = _write(tmp_path / "b.jsonl", [rows[0], rows[2]])
  store, _ = _build(path, tokenizer, tmp_path / "cache")
  assert store.example(0).loss_weights.max() == 0.5
  assert not store.stats.source(path).notes


def test_fields_that_nothing_reads_are_counted(tmp_path, tokenizer):
  rows = [_row(i) | {"explanation": "It is." * (i % 2)} for i in range(6)]
  path = _write(tmp_path / "rows.jsonl", rows)
  store, _ = _build(path, tokenizer, tmp_path / "cache")
  entry = store.stats.source(path)
  assert entry.notes == {"field not read: explanation": 3}
  assert entry.places["field not read: explanation"][0] == "rows.jsonl:2"


def test_a_slice_of_the_rows_is_in_the_key(tmp_path, tokenizer):
  path = _write(tmp_path / "rows.jsonl", [_row(i) for i in range(10)])
  for cut, count in (("[:20%]", 2), ("[7:]", 3), ("", 10)):
    store, _ = _build(path + cut, tokenizer, tmp_path / "cache")
    assert len(store.index) == count
