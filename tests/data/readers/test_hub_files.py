"""Which files of a hub data set are read; the hub itself stands aside."""

import pytest

from sft_jax.common import hub
from sft_jax.data.readers import files

FILES = (
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
  for name in FILES:
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
