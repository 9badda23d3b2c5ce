"""Laws of models some of whose layers are no attention, on the goldens.

That they equal the reference, a pack its documents, and adapters over devices
the merged model, is in `test_parity`; each layer's own boundaries are in
`layers/`.
"""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

import sft_jax
import tiny
from sft_jax.models.hf import load_save

GOLDENS = Path(__file__).parent / "goldens"
CASES = ("lfm2", "qwen3_5", "granitemoehybrid", "gemma4_text_shared")
CASES += ("olmo_hybrid", "nemotron_h")
EACH = pytest.mark.parametrize("case", CASES)

TOKENS = np.random.default_rng(0).integers(1, 61, (4, 16)).astype(np.int32)
# A document of one token, two that end in the window of a convolution, padding.
SEGMENTS = np.array([[1] * 6 + [2] + [3] * 2 + [4] * 4 + [0] * 3] * 4, np.int32)


@functools.cache
def load(case):
  """A model, and its functions compiled once for all tests."""
  model, params = load_save.load_pretrained(GOLDENS / case)
  hidden, decode = jax.jit(model.hidden), jax.jit(model.decode)
  return model._replace(hidden=hidden, decode=decode), params


@EACH
def test_no_bit_passes_into_another_document_or_back(case):
  model, params = load(case)
  hidden = lambda tokens: np.asarray(
    model.hidden(params, tokens, None, SEGMENTS)
  )
  before = hidden(TOKENS)
  for number in range(5):
    own = np.flatnonzero(SEGMENTS[0] == number)
    first, last = own[0], own[-1]
    changed = TOKENS.copy()
    changed[:, [first, last]] = changed[:, [first, last]] % 60 + 1
    moved = np.abs(hidden(changed) - before).max((0, 2))
    assert np.flatnonzero(moved).tolist() == own.tolist()
    if number == 0 or first == last:
      continue  # What padding holds, nobody reads.
    changed[:, first] = TOKENS[:, first]
    moved = np.abs(hidden(changed) - before).max((0, 2))
    assert np.flatnonzero(moved).tolist() == [last]


@EACH
def test_decoding_is_the_full_pass_wherever_padding_lies(case):
  """Prompts of unequal lengths at the left, the right and with a hole; then
  token by token; then a new document in the same rows."""
  model, params = load(case)
  total, width, rows = 12, 8, 4
  tokens = TOKENS[:, :total]
  want = model.hidden(params, tokens)
  places = [[0, 1, 2, 3, 4], [6, 7], range(width), [1, 2, 6]]
  held = np.array([len(place) for place in places])
  prompt = np.zeros((rows, width), np.int32)
  positions = np.full((rows, width), -1, np.int32)
  for row, place in enumerate(places):
    prompt[row, list(place)] = tokens[row, : len(place)]
    positions[row, list(place)] = np.arange(len(place))
  cache = model.init_cache(rows, total)
  for _ in range(2):
    hidden, cache = model.decode(params, prompt, positions, cache)
    for row, place in enumerate(places):
      got, n = hidden[row, np.array(place)], len(place)
      np.testing.assert_allclose(got, want[row, :n], atol=2e-5)
    at = held.copy()
    while (at < total).any():
      live = at < total
      now = np.where(live, at, -1)[:, None].astype(np.int32)
      step = tokens[np.arange(rows), np.minimum(at, total - 1)][:, None]
      hidden, cache = model.decode(params, step, now, cache)
      for row in np.flatnonzero(live):
        np.testing.assert_allclose(
          hidden[row, 0], want[row, at[row]], atol=2e-5
        )
      at += live
  nothing = np.full((rows, 1), -1, np.int32)
  _, after = model.decode(params, prompt[:, :1], nothing, cache)
  for name, x in cache.items():
    np.testing.assert_array_equal(after[name], x, err_msg=name)


def test_heads_of_two_shapes_are_cached_in_few_bits():
  """And layers that share keys and values have no slots of their own."""
  model, params = load("gemma4_text_shared")
  cache = model.init_cache(4, 16, int8=True)
  assert cache["k"].shape == (2, 4, 2, 16, 6)
  assert cache["global_k"].shape == (1, 4, 2, 16, 12)
  assert cache["global_v"].dtype == np.int8
  positions = np.broadcast_to(np.arange(16), (4, 16))
  got, _ = model.decode(params, TOKENS, positions, cache)
  gap = np.asarray(got - model.hidden(params, TOKENS))
  assert 0 < np.sqrt(np.mean(gap**2)) < 0.05 * np.std(got)


@pytest.mark.slow
def test_a_run_trains_a_folder_and_writes_one(tmp_path):
  """Packed rows; what is written is loaded and says what was trained."""
  shape = {
    **{"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"},
    **{"layer_types": ["linear_attention", "full_attention"]},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
  }
  folder = tiny.model_folder(tmp_path / "model", tiny.SHAPE | shape)
  rows = tiny.rows_file(tmp_path / "rows.jsonl")
  records = []
  config = tiny.config(
    tmp_path, folder, rows, steps=12, optim__learning_rate=1e-2
  )
  sft_jax.train(config, on_record=records.append)
  losses = [record["loss/nats_per_token"] for record in records]
  assert losses[-1] < 0.6 * losses[0]
  model, params = load_save.load_pretrained(tmp_path / "run" / "export")
  assert [kind.mixer for kind in model.config.layers] == ["delta", "attn"]
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
