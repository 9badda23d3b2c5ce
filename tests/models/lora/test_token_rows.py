"""Rows that were never trained are found; new ones are added and exported."""

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.common import trees
from sft_jax.models.hf import load_save, peft_save
from sft_jax.models.lora import token_rows
from sft_jax.models.lora.lora import LoraConfig

GOLDENS = Path(__file__).parents[1] / "goldens"
OLD, SIZE = 61, 64
NEW = (61, 62)


def test_rows_that_no_text_has_moved_are_found():
  rng = np.random.default_rng(0)
  table = rng.normal(size=(20_000, 32)).astype(np.float32)
  unused = np.arange(300, 330)
  table[unused] = table[300] + 0.1 * rng.normal(size=(30, 32))
  table[7], table[8] = 0, table[8] * 30
  found = token_rows.untrained(
    lambda i, j: table[i:j], len(table), [1, 7, 8, 305, 19_999]
  )
  assert found.keys() == {7, 8, 305}
  assert found[305] == "its row is near to 29 others"
  assert "norm is 0" in found[7]


def test_new_rows_have_the_mean_or_the_covariance_of_the_old():
  rng = np.random.default_rng(0)
  mix = rng.normal(size=(4, 4))
  table = jnp.asarray(rng.normal(size=(500, 4)) @ mix + 3, jnp.float32)
  grown = token_rows.grow(jax.random.key(0), table, 510, "mean")
  np.testing.assert_array_equal(grown[:500], table)
  want = np.broadcast_to(table.mean(0), (10, 4))
  np.testing.assert_allclose(grown[500:], want, rtol=1e-5)
  new = token_rows.grow(jax.random.key(0), table, 20_500, "matched")[500:]
  np.testing.assert_allclose(new.mean(0), table.mean(0), atol=0.1)
  want = np.cov(np.asarray(table).T)
  np.testing.assert_allclose(
    np.cov(np.asarray(new).T), want, atol=0.05 * np.abs(want).max()
  )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", ["qwen3", "llama"])  # Tied, and not.
@pytest.mark.parametrize("rank", [0, 2])
def test_transformers_and_peft_compute_the_same_with_new_tokens(
  case, rank, tmp_path
):
  """A grown model, trained far from its start: export and adapter."""
  torch = pytest.importorskip("torch", reason="live oracle: needs torch")
  transformers = pytest.importorskip("transformers", reason="live oracle")
  theirs = pytest.importorskip("peft", reason="live oracle: needs peft")
  adapters = LoraConfig(rank, 4.0, token_rows=NEW) if rank else None
  model, params = load_save.load_pretrained(
    GOLDENS / case, vocab_size=SIZE, lora=adapters
  )
  trains = adapters.trains if adapters else lambda path: "embedding" in path
  rng = np.random.default_rng(1)
  params = trees.map_paths(
    lambda path, x: (
      x + 0.1 * rng.normal(size=x.shape).astype(np.float32)
      if trains(path)
      else x
    ),
    params,
  )
  tokens = np.array([[1, 61, 5, 62, 60, 3]])
  want = np.asarray(model.logits(params, model.hidden(params, tokens)))
  assert want.shape[-1] == SIZE

  def logits(other):
    with torch.no_grad():
      return other.eval()(torch.tensor(tokens)).logits.numpy()

  load = lambda path: transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32
  )
  load_save.save_pretrained(tmp_path / "export", model, params, dtype="float32")
  np.testing.assert_allclose(logits(load(tmp_path / "export")), want, atol=1e-4)
  again, back = load_save.load_pretrained(tmp_path / "export")
  got = again.logits(back, again.hidden(back, tokens))
  np.testing.assert_allclose(got, want, atol=1e-4)
  if not rank:
    return
  peft_save.save_adapter(tmp_path / "adapter", model, params, base="base")
  base = load(GOLDENS / case)
  base.resize_token_embeddings(SIZE, mean_resizing=False)
  with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    adapted = theirs.PeftModel.from_pretrained(base, tmp_path / "adapter")
  # Padding is no token: its rows are whatever each side filled in.
  np.testing.assert_allclose(
    logits(adapted)[..., : NEW[-1] + 1], want[..., : NEW[-1] + 1], atol=1e-4
  )
