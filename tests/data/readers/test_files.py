"""Rows from files: every fault is found and placed."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from sft_jax.common import hub
from sft_jax.data.conversation import RowError
from sft_jax.data.readers import files


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
  (tmp_path / "a.csv").write_text("a,b")
  with pytest.raises(ValueError, match=r"suffix '\.csv'"):
    list(files.read_rows(tmp_path / "a.csv"))


def test_a_saved_folder_and_its_splits(tmp_path):
  made = [{"text": "one"}, {"text": "two"}]
  for split in ("train", "test"):
    folder = tmp_path / "both" / split
    folder.mkdir(parents=True)
    with pyarrow.ipc.new_stream(
      folder / "data-0.arrow", (table := pyarrow.Table.from_pylist(made)).schema
    ) as stream:
      stream.write_table(table)
    state = {"_data_files": [{"filename": "data-0.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
  listing = tmp_path / "both" / "dataset_dict.json"
  listing.write_text('{"splits": ["train", "test"]}')
  path = f"{tmp_path}/both"
  for named in (f"{path}#train", f"{path}/train"):
    got = list(files.read_rows(named))
    assert got == [("data-0.arrow[0]", made[0]), ("data-0.arrow[1]", made[1])]
  with pytest.raises(ValueError, match=r"got no split; expected one of train"):
    files.find_files(path)
  with pytest.raises(ValueError, match="the split 'dev'"):
    files.find_files(f"{path}#dev")
  with pytest.raises(ValueError, match="got a folder; expected"):
    files.find_files(tmp_path)
  # A file of this very name is that file.
  (tmp_path / "a#b.jsonl").write_text('{"text": "x"}')
  assert len(files.find_files(tmp_path / "a#b.jsonl")) == 1


@pytest.mark.parametrize(
  "state",
  [
    {"_data_files": [{"filename": "../../elsewhere.arrow"}]},
    {"_data_files": [{"filename": "gone.arrow"}]},
    {"_data_files": []},
    {"_data_files": [{}]},
    [],
  ],
)
def test_a_saved_folder_that_cannot_be_trusted(tmp_path, state):
  (tmp_path / "state.json").write_text(json.dumps(state))
  (tmp_path.parent / "elsewhere.arrow").write_bytes(b"x")
  with pytest.raises(ValueError, match="expected"):
    files.find_files(tmp_path)


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


@pytest.mark.parametrize("path", ["org/name", "org/name#main", "org/name#dev"])
def test_several_splits_or_none(fetched, path):
  with pytest.raises(ValueError, match=r"main/train\.parquet.*as in org/name#"):
    files.find_files(path)


@pytest.mark.parametrize("path", ["data/typo.jsonl", "data/*", "a/b/c"])
def test_a_mistyped_local_path_asks_no_hub(fetched, path):
  with pytest.raises(ValueError, match="no such file"):
    files.find_files(path)
  assert not fetched
