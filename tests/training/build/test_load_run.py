"""Models of runs in a bucket: which run, and its address in what is said."""

import contextlib

import pytest

from sft_jax.training.build import load_run

RUN = "s3://bucket/checkpoints/demo"


@pytest.mark.parametrize("address", [RUN, f"{RUN}/checkpoints/7"])
def test_a_run_below_a_folder_of_checkpoints(address, tmp_path, monkeypatch):
  (tmp_path / "checkpoints").mkdir()
  asked, lines = [], []

  @contextlib.contextmanager
  def copied(url, *, checkpoints):
    assert checkpoints
    asked.append(url)
    yield tmp_path

  def damaged(path):
    raise ValueError(f"{path}: damaged")

  monkeypatch.setattr(load_run.remote_workdir, "copied", copied)
  monkeypatch.setattr(load_run.remote_workdir, "is_run", lambda x: x == RUN)
  monkeypatch.setattr(load_run, "_read_manifest", damaged)
  step = address.endswith("7")
  match = f"^{RUN}/checkpoints" + ("/7: damaged" if step else ": got no")
  with pytest.raises(ValueError, match=match):
    load_run.load(address, log=lines.append)
  assert asked == [RUN]
  assert lines == [f"Loading {address} ..."] * step
