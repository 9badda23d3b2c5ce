"""An export by two processes that hold half of the parameters each."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from sft_jax.models.hf import load_save
from sft_jax.models.hf.safetensors_files import CHECKSUMS

ROOT = Path(__file__).parents[2]

# What each process runs: load sharded over both, export, load, export again.
PROGRAM = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
model_folder, out, address, index = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(index))
from sft_jax.checkpointing import export
from sft_jax.common import sharding
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from sft_jax.models.hf import load_save as hf
assert (jax.device_count(), jax.local_device_count()) == (4, 2)
mesh = sharding.make_mesh(data=1, fsdp=4, tensor=1)
place = lambda shapes: sharding.param_shardings(shapes, mesh)
model, params = hf.load_pretrained(model_folder, shardings=place)
assert not params["layers"]["mlp"]["up"]["kernel"].is_fully_addressable
if index == "1":  # What the second writes must stay unwritten.
  hf.files.write_json = hf.shutil.copyfile = None
asked = load_tokenizer(model_folder)
print(export.save_pretrained(
  out, model, params, asked, max_shard_bytes=100_000, shardings=place
))
"""


@pytest.mark.slow
def test_two_processes_write_what_one_would(tmp_path):
  folder = tiny.model_folder(tmp_path / "model")
  model, params = load_save.load_pretrained(folder)
  load_save.save_pretrained(
    tmp_path / "one",
    model,
    params,
    load_tokenizer(folder),
    max_shard_bytes=100_000,
  )
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
  }
  processes = [
    subprocess.Popen(
      [
        *(sys.executable, "-c", PROGRAM),
        *(str(folder), str(tmp_path / "two"), address, str(index)),
      ],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]
  try:
    said = [process.communicate(timeout=120)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, text in zip(processes, said, strict=True):
    assert process.returncode == 0, text
    assert "logits within" in text
  one, two = (
    {
      p.name: p.read_bytes()
      for p in (tmp_path / name).iterdir()
      if p.name != CHECKSUMS
    }
    for name in ("one", "two")
  )
  assert sum(name.endswith(".safetensors") for name in one) > 2
  assert one == two
