"""A run is compared with its checkpoint; files of the workdir are copies."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import sft_jax
import tiny
from sft_jax.common import trees
from sft_jax.reporting.metrics import read_jsonl


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(config, result) of a LoRA run whose last checkpoint is taken away."""
  folder = tmp_path_factory.mktemp("resume")
  config = tiny.config(
    folder,
    tiny.model_folder(folder / "model"),
    tiny.rows_file(folder / "rows.jsonl"),
    steps=4,
    lora__rank=2,
    optim__learning_rate=2e-2,
    data__holdout=0.25,
    export=False,
  )
  result = sft_jax.train(config)
  cut(result.workdir)
  return config, result


def cut(workdir: Path) -> None:
  shutil.rmtree(workdir / "checkpoints" / "4")
  (workdir / "result.json").unlink()


def copy_of(made, tmp_path):
  config = made[0].copy_and_resolve_references()
  config.workdir = str(tmp_path / "run")
  shutil.copytree(made[1].workdir, config.workdir)
  return config, Path(config.workdir)


def test_what_changed_is_refused(made, tmp_path):
  """Whatever the files beside the checkpoint say."""
  config, workdir = copy_of(made, tmp_path)
  config.optim.learning_rate = 5e-4
  said = r"optim\.learning_rate: 0.02 -> 0.0005"
  for text in (None, config.to_json()):
    (workdir / "config.json").unlink(missing_ok=True)
    if text:
      (workdir / "config.json").write_text(text)
    with pytest.raises(ValueError, match=said):
      sft_jax.train(config)
  # The older of two checkpoints, of another config than the newest.
  config.seed = 1
  config.workdir = str(tmp_path / "other")
  other = sft_jax.train(config).workdir
  shutil.copytree(other / "checkpoints" / "4", workdir / "checkpoints" / "4")
  config = made[0].copy_and_resolve_references()
  config.workdir = str(workdir)
  with pytest.raises(ValueError, match="seed: 1 -> 0"):
    sft_jax.train(config)
  cut_only = workdir / "checkpoints" / "4"
  shutil.rmtree(cut_only)
  shutil.copy(other / "metrics.jsonl", workdir / "metrics.jsonl")
  with pytest.raises(ValueError, match=r"metrics\.jsonl: its records up to"):
    sft_jax.train(config)
  # The frozen base, by a field that changes no weight.
  model = Path(config.model.path) / "config.json"
  before = model.read_text()
  fields = json.loads(before)
  key = next(key for key in fields if "rms_norm_eps" in key)
  try:
    model.write_text(json.dumps(fields | {key: 1e-3}))
    with pytest.raises(ValueError, match=r"config\.json, rms_norm_eps"):
      sft_jax.train(config)
  finally:
    model.write_text(before)


def test_another_batch_size_says_where_the_data_continue(
  made, tmp_path, capsys
):
  config, _ = copy_of(made, tmp_path)
  config.batch_size = 16
  sft_jax.train(config, force=True)
  shown = " ".join(capsys.readouterr().out.split())
  assert "continues after 32 packs, and 16 were trained on: 16 are" in shown


def test_what_is_damaged_is_made_again(made, tmp_path, capsys):
  """Cut, deleted or filled with noise: the run ends as it would have."""
  config, workdir = copy_of(made, tmp_path)
  evals = workdir / "evals" / "before.json"
  before = json.loads(evals.read_text())
  for name in ("config.json", "writers.json", "incidents.jsonl", "model.json"):
    (workdir / name).write_text('{"a": \x00')
  evals.write_text("")
  records = (workdir / "metrics.jsonl").read_text().splitlines()
  records[0] = records[0][:20]  # Cut in the middle of the file.
  (workdir / "metrics.jsonl").write_text("\n".join(records) + "\n")
  again = sft_jax.train(config)
  jax.tree.map(
    np.testing.assert_array_equal,
    trees.flatten(again.params),
    trees.flatten(made[1].params),
  )
  assert "before.json: is damaged" in capsys.readouterr().err
  # The base is measured, not what had been trained by then.
  name = "held_out/nats_per_token"
  assert json.loads(evals.read_text())[name] == pytest.approx(
    before[name], rel=1e-5
  )
  assert json.loads((workdir / "config.json").read_text())["seed"] == 0
  steps = [r["step"] for r in read_jsonl(workdir / "metrics.jsonl")]
  assert steps == sorted(steps)
  assert 1 not in steps
  # Without any record: said, and kept for the report.
  cut(workdir)
  (workdir / "metrics.jsonl").unlink()
  sft_jax.train(config)
  lost = [i for i in sft_jax.read_run(workdir)["incidents"]
          if i["kind"] == "records lost"]  # fmt: skip
  assert lost[0]["step"] == 2
