"""Files of scores: whole, found again by place, and never taken for rows."""

import numpy as np
import pytest

import tiny
from sft_jax.data import scores
from sft_jax.data.readers import files
from sft_jax.data.scores import RowScore

MADE = [
  RowScore("a.jsonl:1", 7, (1.5, 0.5, 3.0, 4)),
  RowScore("a.jsonl:2", 2**64 - 1, (2.5, None, None, 9)),
]


def test_what_is_written_is_read(tmp_path):
  path = scores.path_of(tmp_path / "a.jsonl")
  assert path.name == "a.jsonl.scores.jsonl"
  scores.write(path, {"model": "m"}, MADE)
  before = path.read_bytes()
  found = scores.read(path)
  assert found.by == {"scores": 1, "model": "m"}
  for row in MADE:
    at = found.find(row.place)
    assert int(found.contents[at]) == row.content
    want = [np.nan if x is None else x for x in row.values]
    np.testing.assert_array_equal(found.values[at], want)
  assert found.find("a.jsonl:3") is None
  scores.write(path, {"model": "m"}, MADE)
  assert path.read_bytes() == before
  other = scores.path_of("rows/a.jsonl", tmp_path / "s")
  assert other == tmp_path / "s" / "a.jsonl.scores.jsonl"


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
  path = tmp_path / "a.jsonl.scores.jsonl"
  scores.write(path, {}, MADE)
  before = path.read_bytes()

  def breaks():
    yield MADE[0]
    raise OSError("full")

  with pytest.raises(OSError, match="full"):
    scores.write(path, {}, breaks())
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
  "text",
  [
    "", '{"scores": 2}\n', '{"scores": 1}\n{"place": "a"',
    '{"scores": 1}\n{"place": "a", "content": "z"}\n', "[]\n", '"x"\n',
  ],
)  # fmt: skip
def test_what_is_no_file_of_scores_is_refused_with_the_cure(tmp_path, text):
  path = tmp_path / "a.jsonl.scores.jsonl"
  path.write_text(text)
  with pytest.raises(ValueError, match=r"scores\.jsonl:\d.*score_data"):
    scores.read(path)


def test_no_file_and_a_place_twice(tmp_path):
  path = tmp_path / "a.jsonl.scores.jsonl"
  with pytest.raises(ValueError, match="no such file"):
    scores.read(path)
  scores.write(path, {}, [MADE[0], MADE[0]])
  with pytest.raises(ValueError, match="a place twice"):
    scores.read(path)


def test_a_glob_takes_rows_and_not_their_scores(tmp_path):
  file = tiny.rows_file(tmp_path / "a.jsonl")
  # Named like scores, but of no file here: these are somebody's rows.
  orphan = tiny.rows_file(tmp_path / "b.jsonl.scores.jsonl")
  scores.write(scores.path_of(file), {}, MADE)
  assert files.find_files(tmp_path / "*.jsonl") == [file, orphan]
