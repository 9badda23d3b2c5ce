"""`sft-jax merge` from its words: folders, methods, the greedy soup."""

import shutil

import numpy as np
import pytest

import tiny
from sft_jax.commands import export
from sft_jax.models.hf import safetensors_files as files


def tensors_of(folder):
  return {k: x.read() for k, x in files.open_tensors(folder).items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A tiny model, and it with noise of growing size: near, near, far."""
  folder = tmp_path_factory.mktemp("models")
  tiny.model_folder(folder / "base")
  tensors = tensors_of(folder / "base")
  for i, (name, size) in enumerate({"a": 0.01, "b": 0.01, "far": 1.0}.items()):
    rng = np.random.default_rng(i)
    shutil.copytree(folder / "base", folder / name)
    noisy = {
      key: (x + size * rng.normal(size=x.shape)).astype(x.dtype)
      for key, x in tensors.items()
    }
    files.save_tensors(folder / name / "model.safetensors", noisy)
  tiny.rows_file(folder / "rows.jsonl")
  return folder


def test_a_task_vector_from_its_words(models, tmp_path):
  out = tmp_path / "merged"
  words = f"--method=arithmetic --weights 0.5 --models {models}/a"
  export.merge([*words.split(), f"--base={models}/base", f"--out={out}"])
  base, a, merged = map(tensors_of, (models / "base", models / "a", out))
  for name, x in merged.items():
    np.testing.assert_allclose(x, (base[name] + a[name]) / 2, atol=1e-6)


def test_the_greedy_soup_leaves_out_what_makes_it_worse(
  models, tmp_path, capsys
):
  out = tmp_path / "merged"
  names = [f"{models}/{name}" for name in ("far", "a", "b")]
  rows = models / "rows.jsonl"
  export.merge([f"--greedy={rows}", "--models", *names, f"--out={out}"])
  said = capsys.readouterr().out
  assert "far" in said
  assert "left out" in next(x for x in said.splitlines() if "/far:" in x)
  assert (out / "model.safetensors").exists()
