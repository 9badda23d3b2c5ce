"""tools/plan.py, as it is called."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft_jax.commands import plan as tool

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
  "name",
  [
    str(path.parent.relative_to(tool.SHAPES))
    for path in tool.SHAPES.rglob("config.json")
  ],
)
def test_shapes_of_public_models_are_read(name):
  """By the names they have on the hub, and with nothing downloaded."""
  found = tool.find_shape(name)
  assert found.num_layers > 10


def test_a_plan_with_other_devices_than_here():
  """The demo on two devices, in a process of its own."""
  count = "--xla_force_host_platform_device_count=8"
  flags = os.environ["XLA_FLAGS"].replace(count, "")
  done = subprocess.run(
    [
      *(sys.executable, "tools/plan.py", "--config=configs/base.py"),
      *("--topology=cpu:2", "--config.model.path=Qwen/Qwen3-0.6B"),
      *("--config.data.seq_len=64", "--config.batch_size=2"),
    ],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert "596.05 M trained" in done.stdout
  assert "2 x this processor" in done.stdout
  assert "fits" in done.stdout
  assert "tokens/s" in done.stdout
