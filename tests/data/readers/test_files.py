"""Rows from files: every fault is found and placed."""

import csv
import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_jax.common import hub
from sft_jax.data.conversation import RowError
from sft_jax.data.formats import formats
from sft_jax.data.readers import files
from tiny_tokenizers import SHARED


def test_every_kind_of_file(tmp_path):
  made = [{"text": "one"}, {"text": "zwei ü"}]
  (tmp_path / "a.jsonl").write_text(
    "\n".join(json.dumps(row) for row in made) + "\n\n"
  )
  (tmp_path / "b.json").write_text(json.dumps(made))
  table = pyarrow.Table.from_pylist(made)
  pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
  (tmp_path / "d.txt").write_text("one\n\ntwo\n")
  got = list(files.read_rows(tmp_path / "*"))
  assert got == [
    ("a.jsonl:1", made[0]),
    ("a.jsonl:2", made[1]),
    ("b.json[0]", made[0]),
    ("b.json[1]", made[1]),
    ("c.parquet[0]", made[0]),
    ("c.parquet[1]", made[1]),
    ("d.txt", {"text": "one\n\ntwo\n"}),
  ]


@pytest.mark.parametrize(
  ("line", "place", "said"),
  [
    (b'{"a": 1', ":2 column 8", "delimiter"),
    (b'{"a": 1, "b": {"c": 1, "c": 2}}', ":2", "the key 'c' twice"),
    (b'{"a": NaN}', ":2", "NaN"),
    (b'{"a": -Infinity}', ":2", "-Infinity"),
    (b'{"a": "\xff"}', ":2 byte 7", "0xff"),
    (b'{"a": "\\ud83d"}', ":2", "half a surrogate pair"),
    (b"[1, 2]", ":2", "a JSON list"),
    (b'{"a": ' + b"[" * 100_000, ":2", "nested too deep"),
  ],
)
def test_bad_lines_are_placed(tmp_path, line, place, said):
  (tmp_path / "bad.jsonl").write_bytes(b'{"ok": 1}\n' + line + b"\n")
  stream = files.read_rows(tmp_path / "bad.jsonl")
  # Streamed: the good line arrives before the bad one is read.
  assert next(stream) == ("bad.jsonl:1", {"ok": 1})
  with pytest.raises(RowError) as error:
    next(stream)
  assert str(error.value).startswith(f"bad.jsonl{place}: got ")
  assert said in str(error.value)


def test_line_and_column_in_an_array(tmp_path):
  (tmp_path / "bad.json").write_text('[\n  {"a": 1},\n  {"a": }\n]')
  with pytest.raises(RowError, match=r"^bad.json line 3 column 9: got "):
    list(files.read_rows(tmp_path / "bad.json"))
  (tmp_path / "object.json").write_text("{\n}")
  with pytest.raises(RowError, match="expected an array"):
    list(files.read_rows(tmp_path / "object.json"))


def test_whole_surrogate_pairs_and_separators_are_text(tmp_path):
  # U+2028 ends a line for str.splitlines, but not in JSON lines.
  (tmp_path / "a.jsonl").write_bytes(
    b'{"a": "\\ud83d\\ude00 \xe2\x80\xa8 x"}\r\n{"a": "y"}'
  )
  got = [row["a"] for _, row in files.read_rows(tmp_path / "a.jsonl")]
  assert got == ["\U0001f600 \u2028 x", "y"]


def test_missing_files_and_unknown_suffixes(tmp_path):
  with pytest.raises(ValueError, match="no such file"):
    list(files.read_rows(tmp_path / "none.jsonl"))
  with pytest.raises(ValueError, match="no such file"):
    list(files.read_rows(tmp_path / "*.jsonl"))
  (tmp_path / "a.xlsx").write_text("a,b")
  with pytest.raises(ValueError, match=r"suffix '\.xlsx'"):
    list(files.read_rows(tmp_path / "a.xlsx"))


def test_a_saved_folder_and_its_splits(tmp_path):
  made = [{"text": "one"}, {"text": "two"}]
  table = pyarrow.Table.from_pylist(made)
  for split in ("train", "test"):
    folder = tmp_path / "both" / split
    folder.mkdir(parents=True)
    for name in ("data-00000-of-00002", "data-00001-of-00002", "cache-1"):
      with pyarrow.ipc.new_stream(
        folder / f"{name}.arrow", table.schema
      ) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text("{}")
  (tmp_path / "both" / "dataset_dict.json").write_text("{}")
  path = f"{tmp_path}/both"
  for named in (f"{path}#train", f"{path}/train", path):
    got = list(files.read_rows(named))
    assert got[1:3] == [
      ("data-00000-of-00002.arrow[1]", made[1]),
      ("data-00001-of-00002.arrow[0]", made[0]),
    ]
    assert len(got) == 4
  with pytest.raises(ValueError, match=r"got 0 sets .*train/data\.arrow"):
    files.find_files(f"{path}#dev")
  (tmp_path / "both" / "test" / "data-00001-of-00002.arrow").unlink()
  with pytest.raises(ValueError, match=r"got 1 files of .*, expected 2"):
    files.find_files(f"{path}#test")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="got 0 sets of files, of none"):
    files.find_files(tmp_path / "empty")
  # A file of this very name is that file.
  (tmp_path / "a#b.jsonl").write_text('{"text": "x"}')
  assert len(files.find_files(tmp_path / "a#b.jsonl")) == 1


# -- The hub, which stands aside ----------------------------------------------

HUB_FILES = (
  "README.md",
  "dataset_infos.json",
  "main/train-00000-of-00002.parquet",
  "main/train-00001-of-00002.parquet",
  "main/test-00000-of-00001.parquet",
  "extra/train_sft.jsonl",
)


@pytest.fixture
def fetched(tmp_path, monkeypatch):
  """A hub with one data set; gives the ids that were asked for."""
  asked = []
  for name in HUB_FILES:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")

  def fetch(repo_id, *, kind, patterns):
    assert kind == "dataset"
    assert patterns
    asked.append(repo_id)
    return hub.Snapshot(tmp_path, repo_id, "0" * 40)

  monkeypatch.setattr(hub, "fetch", fetch)
  return asked


@pytest.mark.parametrize(
  ("path", "count"),
  [
    ("org/name#main/train", 2),
    ("hf://org/name#main/train", 2),
    ("hf://datasets/org/name@v1#test", 1),
    ("org/name#train_sft", 1),
    ("org/name#extra", 1),
  ],
)
def test_a_part_of_the_name_chooses(fetched, path, count):
  assert len(files.find_files(path)) == count
  assert fetched == ["org/name@v1" if "@" in path else "org/name"]


def test_of_several_splits_train_is_taken(fetched):
  assert [file.name[:5] for file in files.find_files("org/name")] == [
    "train"
  ] * 2


@pytest.mark.parametrize("path", ["org/name#main", "org/name#dev"])
def test_several_splits_or_none(fetched, path):
  with pytest.raises(ValueError, match=r"main/train\.parquet.*as in org/name#"):
    files.find_files(path)


@pytest.mark.parametrize("path", ["data/typo.jsonl", "data/*", "a/b/c"])
def test_a_mistyped_local_path_asks_no_hub(fetched, path):
  with pytest.raises(ValueError, match="no such file"):
    files.find_files(path)
  assert not fetched


# -- Paths as people write them -----------------------------------------------


@pytest.fixture
def tree(tmp_path, monkeypatch):
  """Folders with files of ten rows each."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  lines = "".join(f'{{"text": "{i}"}}\n' for i in range(10))
  for name in (
    *("UPPER.JSONL", "a.ndjson", "set[v2]/a.jsonl", "set[v2]/b.jsonl"),
    *("shards/data/train-00000-of-00002.jsonl", "shards/README.jsonl.md"),
    *("shards/data/train-00001-of-00002.jsonl", "shards/data/test.jsonl"),
    *("one/data.jsonl", "one/dataset_infos.json", "x[:3]"),
  ):
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).write_text(lines)
  return tmp_path


def texts(path):
  return [row["text"] for _, row in files.read_rows(path)]


@pytest.mark.parametrize(
  ("path", "count"),
  [
    *[("UPPER.JSONL", 10), ("a.ndjson", 10), ("~/a.ndjson", 10)],
    *[("set[v2]/a.jsonl", 10), ("set[v2]/*.jsonl", 20), ("one", 10)],
    *[("shards", 20), ("shards#train", 20), ("shards#test", 10)],
    *[("set[[]v2]/*.jsonl", 20), ("~/one[:20%]", 2)],
  ],
)
def test_paths_as_people_write_them(tree, path, count):
  assert len(texts(path)) == count


@given(
  first=st.none() | st.integers(-12, 12),
  last=st.none() | st.integers(-12, 12),
  percent=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slices_are_those_of_a_list(tree, first, last, percent):
  every = [str(i) for i in range(10)]
  expected = every[first:last]
  if percent:
    first, last = (None if x is None else f"{x * 10}%" for x in (first, last))
  said = f"[{'' if first is None else first}:{'' if last is None else last}]"
  assert texts(f"one/data.jsonl{said}") == expected


def test_a_file_found_twice_by_links_is_read_once(tree):
  (tree / "one" / "loop").symlink_to(tree / "one")
  (tree / "one" / "copy.jsonl").symlink_to(tree / "one" / "data.jsonl")
  assert len(texts("one/**/*.jsonl")) == 10


@pytest.mark.parametrize(("suffix", "mark"), [(".csv", ","), (".tsv.gz", "\t")])
@given(
  rows=st.lists(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")),
             min_size=2, max_size=2),
    max_size=5,
  ),
)  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tables_hold_any_text(tmp_path, suffix, mark, rows):
  path = tmp_path / f"a{suffix}"
  text = io.StringIO(newline="")
  writer = csv.writer(text, delimiter=mark, quoting=csv.QUOTE_ALL)
  writer.writerows([["prompt", "completion"], *rows])
  data = text.getvalue().encode()
  path.write_bytes(gzip.compress(data) if "gz" in suffix else data)
  got = [list(row.values()) for _, row in files.read_rows(path)]
  assert got == rows


def test_faults_of_a_table_are_placed(tmp_path):
  path = tmp_path / "a.csv"
  path.write_text('p,c\n"1\n1",2\n3\n\n4,5\n')
  bad = []
  got = list(files.read_rows(path, on_bad_row=bad.append))
  assert got == [
    ("a.csv:2", {"p": "1\n1", "c": "2"}),
    ("a.csv:6", {"p": "4", "c": "5"}),
  ]
  assert [one.where for one in bad] == ["a.csv:4"]
  for text, said in (
    ('p,c\n"1,2\n', "a.csv:2: got unexpected end"),
    ("p,p\n", r"a.csv:1: got columns"),
  ):
    path.write_text(text)
    with pytest.raises(RowError, match=said):
      list(files.read_rows(path, on_bad_row=print))
  path.write_bytes("p,c\n1,ü\n".encode("latin-1"))
  with pytest.raises(RowError, match=r"a\.csv:2 byte 2"):
    list(files.read_rows(path))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize(
  "name",
  [
    *("UPPER.JSONL", "dataset[v2]/rows.jsonl", "hub_clone", "rows.csv"),
    *("rows.jsonl.bz2", "rows.ndjson", "rows.tsv", "dataset[v2]"),
  ],
)
def test_files_of_the_wild(name):
  path = SHARED.parent / "cases" / "files" / name
  for where, row in files.read_rows(path):
    assert formats.to_conversation(row, source=where).messages


def test_splits_in_any_case_and_hidden_folders(tmp_path):
  for name in ("TRAIN.jsonl", "Test.jsonl", ".git/x.jsonl"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}\n")
  assert files.find_files(tmp_path) == [tmp_path / "TRAIN.jsonl"]
  (tmp_path / "TRAIN.jsonl").rename(tmp_path / "train_sft.jsonlines")
  assert files.find_files(tmp_path) == [tmp_path / "train_sft.jsonlines"]
  with pytest.raises(ValueError, match=r"as in .*#train_sft, or"):
    files.find_files(f"{tmp_path}#validation")


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\ud800b", "a\0b"])
def test_names_in_errors_are_one_printable_line(name, tmp_path):
  with pytest.raises(ValueError, match="no such file") as caught:
    files.find_files(f"{name}.jsonl")
  assert str(caught.value).isprintable()
