"""Launch files: read by their formats, with flags that the program has."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import sft_jax

FOLDER = Path(__file__).parents[1] / "examples" / "launch"
FILES = sorted(FOLDER.iterdir())


def test_the_page_names_them_all():
  page = (FOLDER.parents[1] / "docs" / "pods.md").read_text("utf-8")
  assert len(FILES) == 6
  for file in FILES:
    assert file.name in page


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_launch_file(file):
  text = file.read_text("utf-8")
  config: ConfigDict = sft_jax.default_config()
  keys = dict(re.findall(r"--config\.([\w.]+)=(\S+)", text))
  for key in keys:
    config.update_from_flattened_dict({key: config_value(config, key)})
  if file.suffix in (".sh", ".sbatch"):
    subprocess.run(["bash", "-n", file], check=True)
  if file.suffix == ".yaml":
    yaml = pytest.importorskip("yaml")
    read = yaml.safe_load(text)
    if read.get("kind") == "JobSet":
      (job,) = read["spec"]["replicatedJobs"]
      # `data` goes across slices.
      assert int(keys["mesh.data"]) % job["replicas"] == 0
      assert job["template"]["spec"]["completions"] == 16  # 64 chips by 4.
  if file.name == "Dockerfile":
    for name in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
      for source in name.split():
        assert (FOLDER.parents[1] / source).exists(), source


_RAY = """
import sys, types

def nodes():
  kinds = ({"CPU": 8.0}, {"GPU": 8.0}, {"TPU": 4.0}, {"GPU": 8.0})
  return [
    {"NodeID": f"n{i}", "Alive": i != 3, "Resources": resources,
     "NodeManagerAddress": f"10.0.0.{i}"}
    for i, resources in reversed(list(enumerate(kinds)))
  ]

class remote:
  def __init__(self, function):
    self.function = function
  def options(self, **options):
    print(options, flush=True)
    return self
  def remote(self, arguments):
    return self.function(arguments)

ray = types.ModuleType("ray")
ray.init, ray.nodes, ray.remote, ray.get = lambda: None, nodes, remote, list
strategies = types.ModuleType("ray.util.scheduling_strategies")
strategies.NodeAffinitySchedulingStrategy = lambda node, soft: (node, soft)
sys.modules |= {"ray": ray, "ray.util.scheduling_strategies": strategies}
sys.argv = ["ray_job.py", "--config=c.py"]
exec(open(%r).read())
"""


def test_a_ray_job_starts_a_process_on_each_host(tmp_path):
  """With a stand-in for Ray, and for the program: what is started where."""
  program = tmp_path / "sft-jax"
  program.write_text(
    '#!/bin/sh\necho "$@"\ncase "$@" in *process=1) exit 75; esac'
  )
  program.chmod(0o755)
  done = subprocess.run(
    [sys.executable, "-c", _RAY % str(FOLDER / "ray_job.py")],
    env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    capture_output=True,
    text=True,
    check=False,
  )
  who = "--config=c.py --coordinator=10.0.0.1:8476 --processes=2 --process="
  first, one, second, two = done.stdout.splitlines()
  assert (one, two) == (who + "0", who + "1"), done.stderr
  assert "'n1', False" in first
  assert "'num_gpus': 8.0" in first
  assert "'resources': {'TPU': 4.0}" in second
  assert done.returncode == 75


def config_value(config: ConfigDict, key: str):
  """The default of a key; KeyError where there is none."""
  for part in key.split("."):
    config = config[part]
  return config
