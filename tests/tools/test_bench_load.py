"""The loader's memory: the parameters, and little beside them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bench_load

TOOL = Path(bench_load.__file__)


@pytest.mark.skipif(
  not Path("/proc/self/status").exists(), reason="reads Linux's /proc"
)
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
def test_loading_needs_the_parameters_and_little_more(param_dtype, tmp_path):
  bench_load.write(tmp_path / "model", 200_000_000, 3, "bfloat16")
  sizes = [file.stat().st_size for file in tmp_path.rglob("*.safetensors")]
  assert len(sizes) > 2
  out = subprocess.run(
    [
      *(sys.executable, TOOL, f"--load={tmp_path / 'model'}"),
      f"--param_dtype={param_dtype}",
    ],
    check=True,
    capture_output=True,
    text=True,
    cwd=TOOL.parents[1],
    env={**os.environ, "PYTHONPATH": str(TOOL.parents[2])},
  ).stdout
  found = json.loads(out.splitlines()[-1])
  width = {"bfloat16": 2, "float32": 4}[param_dtype] // 2
  assert found["params"] == pytest.approx(sum(sizes) * width, rel=0.01)
  # On a CPU the parameters themselves are in this memory.
  assert found["params"] * 0.9 < found["peak"]
  # A shard beside them, and 32 MB for what the kernel and the allocator round
  # up; a second copy of either the parameters or the shards is far above it.
  assert found["peak"] < found["params"] + max(sizes) + 32e6
