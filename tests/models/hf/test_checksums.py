"""Whatever file of an export is damaged, loading says which."""

import shutil
from pathlib import Path

import pytest

import tiny
from sft_jax.checkpointing import export
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from sft_jax.models.hf import checksums, load_save


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
  place = tmp_path_factory.mktemp("exported")
  folder = tiny.model_folder(place / "model")
  model, params = load_save.load_pretrained(folder)
  export.save_pretrained(
    place / "out",
    model,
    params,
    load_tokenizer(folder),
    max_shard_bytes=200_000,
  )
  return place / "out"


def test_every_file_is_under_a_digest(exported):
  lines = (exported / checksums.NAME).read_text().splitlines()
  named = {line.split("  ")[1] for line in lines}
  assert named == {p.name for p in exported.iterdir()} - {checksums.NAME}
  assert sum(name.endswith(".safetensors") for name in named) > 1
  checksums.check(exported)


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_damage_of_any_file_is_named(tmp_path, exported, how):
  for file in sorted(exported.iterdir()):
    folder = Path(shutil.copytree(exported, tmp_path / file.name))
    raw = bytearray(file.read_bytes())
    if how == "flip":
      raw[len(raw) // 3] ^= 0x04
    elif how == "truncate":
      raw = raw[: len(raw) // 2]
    path = folder / file.name
    path.unlink()
    if how != "delete":
      path.write_bytes(raw)
    elif file.name == checksums.NAME:
      continue  # Without digests a folder is like any other.
    with pytest.raises(ValueError, match=r"expected|missing"):
      load_save.load_pretrained(folder)
