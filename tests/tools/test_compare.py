"""The tools of the pages: workdirs in, a page out, by the folders' names."""

import pytest

import fake_runs
from page_reader import Page
from sft_jax.commands import compare


@pytest.fixture
def workdirs(tmp_path):
  return [
    fake_runs.write(tmp_path / name, fake_runs.finished("plain"))
    for name in ("first", "second")
  ]


def test_two_workdirs_make_a_page(tmp_path, workdirs, monkeypatch, capsys):
  out = tmp_path / "page.html"
  argv = ["compare.py", *map(str, workdirs), f"--out={out}"]
  monkeypatch.setattr("sys.argv", argv)
  compare.main()
  assert capsys.readouterr().out == f"{out}\n"
  page = Page(out.read_text())
  assert "2 runs: first, second" in page.text


def test_folders_of_one_name_are_told_apart_by_path(tmp_path):
  paths = [str(tmp_path / side / "run") for side in "ab"]
  assert compare._names(paths) == paths
  with pytest.raises(ValueError, match="different runs"):
    compare._names([paths[0]] * 2)


def test_the_report_is_made_anew(tmp_path, workdirs, monkeypatch):
  (workdirs[0] / "result.json").unlink()  # Not finished yet.
  monkeypatch.setattr("sys.argv", ["report.py", str(workdirs[0])])
  compare.report()
  page = Page((workdirs[0] / "report.html").read_text())
  assert "Replies, side by side" in page.text
  assert "Losses and forgetting" not in page.text
