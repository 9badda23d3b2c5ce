"""The built wheel is whole: it trains on the demo from an empty folder."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
  """A folder that holds what `pip install .` puts into site-packages."""
  folder = tmp_path_factory.mktemp("site")
  source = tmp_path_factory.mktemp("source")  # A build leaves files behind.
  skip = shutil.ignore_patterns("__pycache__")
  shutil.copytree(ROOT / "sft_jax", source / "sft_jax", ignore=skip)
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copyfile(ROOT / name, source / name)
  install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
  done = subprocess.run(
    [*install, f"--target={folder}", str(source)],
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode and "No matching distribution" in done.stderr:
    pytest.skip("the build's own requirements cannot be had here")
  assert done.returncode == 0, done.stderr[-2000:]
  return folder


def run(installed: Path, folder: Path, *words: str) -> str:
  """The output of `sft-jax words`, of the wheel, in `folder`."""
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, str(installed / "bin" / "sft-jax"), *words],
    cwd=folder,
    env=environment | {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
  return done.stdout


@pytest.mark.slow
def test_the_wheel_trains_on_the_demo_in_an_empty_folder(installed, tmp_path):
  out = run(
    *(installed, tmp_path, "train", "--config.steps=2"),
    *("--config.optim.warmup_steps=1", "--config.eval.behaviors="),
    *("--config.eval.general_text=", "--config.eval.knowledge="),
    *("--config.selfcheck=off", "--config.data.workers=1"),
  )
  assert "export" in out
  (workdir,) = (tmp_path / "runs").iterdir()
  assert (workdir / "export" / "model.safetensors").exists()
  assert (workdir / "report.html").exists()
  # What is imported is the wheel's, not this checkout's.
  assert str(ROOT / "sft_jax") not in out


@pytest.mark.slow
def test_the_wheel_lists_its_commands(installed, tmp_path):
  assert "inspect" in run(installed, tmp_path, "--help")
  assert (installed / "sft_jax" / "py.typed").exists()
  assert (installed / "sft_jax" / "demo" / "base" / "config.json").exists()


def test_the_console_command_is_declared():
  text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
  assert 'sft-jax = "sft_jax.main:main"' in text
  assert importlib.util.find_spec("sft_jax.main")
