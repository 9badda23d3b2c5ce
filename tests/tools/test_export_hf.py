"""tools/export_hf.py: a run's newest checkpoint becomes a verified folder."""

import filecmp
import importlib.util
import re
import shutil
import sys

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

import fake_hub
import sft_jax
import tiny
from sft_jax.commands import export
from sft_jax.common import trees


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of three steps that exported nothing, with adapters."""
  folder = tmp_path_factory.mktemp("run")
  model = tiny.model_folder(folder / "model")
  rows = tiny.rows_file(folder / "rows.jsonl")
  config = tiny.config(folder, model, rows, steps=3, lora__rank=2, export=False)
  return sft_jax.train(config)


def test_the_newest_checkpoint_is_written(run, tmp_path, monkeypatch, capsys):
  out = tmp_path / "out"
  monkeypatch.setattr(
    sys,
    "argv",
    ["export_hf.py", f"--workdir={run.workdir}", f"--out={out}"],
  )
  export.main()
  said = " ".join(capsys.readouterr().out.split())
  assert "Writing step 3" in said
  assert "float32 weights equal, logits within" in said
  model, params = sft_jax.load_pretrained(out)
  # The adapters are in the kernels, and nothing else has changed.
  flat, trained = trees.flatten(params), trees.flatten(run.params)
  for path, x in flat.items():
    adapted = trained[path]
    if path.endswith("/kernel"):
      at = path.removesuffix("/kernel")
      a, b = trained[f"{at}/lora_a"], trained[f"{at}/lora_b"]
      adapted = adapted + (16.0 / 2) * np.einsum("lir,lro->lio", a, b)
    np.testing.assert_allclose(x, adapted, atol=1e-6, err_msg=path)
  assert model.lora is None


@pytest.mark.filterwarnings("ignore:Use 'content=")  # The library's own.
def test_a_folder_is_copied_with_the_weights_of_the_run(
  run, tmp_path, monkeypatch
):
  """Every file but the weights is byte for byte that folder's; so pushed, with
  the card that was filled in."""
  source, out = run.workdir.parent / "model", tmp_path / "out"
  (source / "preprocessor_config.json").write_text("{}  ")
  shutil.copytree(source, out)
  card = '---\nlicense: "mit"\ntags: ["sft_jax"]\n---\nMine.\n'
  (out / "README.md").write_text(card)
  monkeypatch.setattr(
    sys,
    "argv",
    [
      *("export_hf.py", f"--workdir={run.workdir}"),
      *(f"--out={out}", f"--into={source}", f"--push={fake_hub.NAME}"),
    ],
  )
  with fake_hub.opened(monkeypatch) as hub:
    export.main()
  assert hub.files == {p.name: p.read_bytes() for p in out.iterdir()}
  assert hub.files["README.md"] == card.encode()
  names = [p.name for p in source.iterdir() if p.name != "SHA256SUMS"]
  _, changed, missing = filecmp.cmpfiles(source, out, names, shallow=False)
  assert (changed, missing) == (["model.safetensors"], [])
  _, params = sft_jax.load_pretrained(out)
  kernel = trees.flatten(params)["layers/mlp/up/kernel"]
  base = trees.flatten(run.params)["layers/mlp/up/kernel"]
  assert 0 < np.abs(kernel - base).max() < 0.1  # The adapters are merged.


def test_a_dtype_can_be_asked_for(run, tmp_path, monkeypatch, capsys):
  """Other tools load what was written, and say what the model says; a dry run
  shows what would be pushed."""
  more = ["--gguf=float32"] * bool(importlib.util.find_spec("gguf"))
  monkeypatch.setattr(
    sys,
    "argv",
    [
      *("export_hf.py", f"--workdir={run.workdir}"),
      *(f"--out={tmp_path / 'out'}", "--dtype=bfloat16", "--check", *more),
      *(f"--push={fake_hub.NAME}", "--dry-run"),
    ],
  )
  with fake_hub.opened(monkeypatch) as hub:
    export.main()
  assert hub.files is None
  said = " ".join(capsys.readouterr().out.split())
  assert "vLLM, SGLang, stop ids: same. generation_config.json: [2, 4]." in said
  assert "sft_jax, replies: " in said
  assert "To me/model, which is new, so private, as me" in said
  assert re.search(r"model\.safetensors \d[\d,]+ bytes", said)
  card = ModelCard((tmp_path / "out" / "README.md").read_text())
  assert (card.data.license, card.data.base_model) == ("unknown", None)
  assert "| rows.jsonl | 16 | 16 |" in card.text
  assert "| vLLM, SGLang | stop ids | same |" in card.text
  assert str(tmp_path.parent) not in card.text.partition("## How it")[0]
  if more:
    assert "model-float32.gguf" in said
    made = (tmp_path / "out-gguf" / "Modelfile").read_text()
    assert made.startswith("FROM ./model-float32.gguf\n")
  tensors = load_file(tmp_path / "out" / "model.safetensors")
  assert {x.dtype.name for x in tensors.values()} == {"bfloat16"}


def test_a_run_without_a_checkpoint_is_named(run, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  workdir.mkdir()
  config = (run.workdir / "config.json").read_text()
  (workdir / "config.json").write_text(config)
  monkeypatch.setattr(
    sys,
    "argv",
    ["export_hf.py", f"--workdir={workdir}", f"--out={tmp_path / 'out'}"],
  )
  with pytest.raises(ValueError, match="no checkpoint"):
    export.main()
