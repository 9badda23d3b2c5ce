"""The whole self-check on eight devices: it holds, and sabotage fails it."""

import jax.numpy as jnp
import pytest

import tiny
from sft_jax.commands import selfcheck as tool
from sft_jax.models.attention import attention


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  folder = tmp_path_factory.mktemp("selfcheck")
  return tiny.model_folder(folder / "model"), tiny.rows_file(
    folder / "rows.jsonl"
  )


def check(tmp_path, folders, **changes):
  config = tiny.config(tmp_path, *folders, batch_size=16, **changes)
  return {one.law: one for one in tool.check(config, print)}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_every_law_holds_on_a_mesh(tmp_path, folders, rank):
  mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
  found = check(tmp_path, folders, lora__rank=rank, **mesh)
  assert all(one.passed for one in found.values()), found
  laws = " ".join(found)
  for word in (
    *("documents apart", "no look ahead", "packed = alone", "rows shuffled"),
    *("cut in 2", "cut in 4", "remat full", "slices"),
    *("one device", "stop token", "export: logits"),
  ):
    assert word in laws
  assert sum(law.startswith("remat") for law in found) >= 4  # Two each.
  # Of the first four batches of 16 rows in few packs.
  read = found["stop token trained: documents without"].detail
  assert int(read.split()[0]) >= 16


@pytest.mark.slow
def test_a_patched_mask_fails_it(tmp_path, folders, monkeypatch):
  mask = attention.mask_bias

  def leaking(q_positions, kv_positions, q_segments, kv_segments, *window):
    ones = [(x > 0).astype(jnp.int32) for x in (q_segments, kv_segments)]
    return mask(q_positions, kv_positions, *ones, *window)

  monkeypatch.setattr(attention, "mask_bias", leaking)
  found = check(tmp_path, folders)
  broken = {law for law, one in found.items() if not one.passed}
  assert "documents apart: hidden states" in broken
  assert "packed = alone: gradient" in broken
  # What a leak leaves as it is.
  assert not any(law.startswith(("export", "stop")) for law in broken)
