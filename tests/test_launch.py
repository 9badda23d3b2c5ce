"""Launch files: read by their formats, with flags that the program has."""

import re
import subprocess
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import sft_jax

FOLDER = Path(__file__).parents[1] / "examples" / "launch"
FILES = sorted(FOLDER.iterdir())


def test_the_page_names_them_all():
  page = (FOLDER.parents[1] / "docs" / "pods.md").read_text("utf-8")
  assert len(FILES) == 5
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


def config_value(config: ConfigDict, key: str):
  """The default of a key; KeyError where there is none."""
  for part in key.split("."):
    config = config[part]
  return config
