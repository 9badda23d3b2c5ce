"""The text model of a checkpoint of text and images, in and out."""

import filecmp
import json

import numpy as np
import pytest
from safetensors import safe_open

from sft_jax.checkpointing import export
from sft_jax.common import trees
from sft_jax.models.hf import load_save

torch = pytest.importorskip("torch", reason="live oracle: needs torch")
transformers = pytest.importorskip("transformers", reason="live oracle")

TEXT = {
  **{"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40},
  **{"num_hidden_layers": 2, "num_attention_heads": 4},
  **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128},
}
SIGLIP = {
  **{"model_type": "siglip_vision_model", "hidden_size": 16},
  **{"intermediate_size": 16, "num_hidden_layers": 1, "image_size": 28},
  **{"num_attention_heads": 2, "patch_size": 14},
}
GEMMA4_VISION = {
  **{"model_type": "gemma4_vision", "hidden_size": 16, "head_dim": 8},
  **{"intermediate_size": 16, "num_hidden_layers": 1, "patch_size": 4},
  **{"num_attention_heads": 2, "num_key_value_heads": 2},
  "position_embedding_size": 16,
}
PIXTRAL = {
  **{"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16},
  **{"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
  **{"patch_size": 14},
}
QWEN2_VISION = {
  **{"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2},
  **{"out_hidden_size": 24, "fullatt_block_indexes": [0]},
}
QWEN3_VISION = {
  **{"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2},
  **{"out_hidden_size": 24, "deepstack_visual_indexes": []},
  "num_position_embeddings": 16,
}
MROPE = {"rope_theta": 1e4, "rope_type": "default"}
CASES = {
  "gemma3": (
    {**TEXT, "sliding_window": 7, "query_pre_attn_scalar": 8},
    {"vision_config": SIGLIP, "mm_tokens_per_image": 4},
    "Gemma3ForCausalLM",
  ),
  "gemma4": (
    {
      **{**TEXT, "sliding_window": 7, "global_head_dim": 12},
      **{"attention_k_eq_v": True, "num_global_key_value_heads": 1},
      "hidden_size_per_layer_input": 0,
    },
    {"vision_config": GEMMA4_VISION},
    "Gemma4ForCausalLM",
  ),
  "mistral3": (
    {**TEXT, "model_type": "mistral", "sliding_window": None},
    {"vision_config": PIXTRAL, "tie_word_embeddings": False},
    "MistralForCausalLM",
  ),
  "qwen2_5_vl": (
    {
      **{k: v for k, v in TEXT.items() if k != "head_dim"},
      "rope_parameters": MROPE | {"mrope_section": [1, 1, 1]},
    },
    {"vision_config": QWEN2_VISION},
    "Qwen2ForCausalLM",
  ),
  "qwen3_vl": (
    {
      **TEXT,
      "rope_parameters": MROPE
      | {"mrope_section": [2, 1, 1], "mrope_interleaved": True},
    },
    {"vision_config": QWEN3_VISION},
    "Qwen3ForCausalLM",
  ),
}
TOKENS = np.random.default_rng(1).integers(5, 40, (2, 24))


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
  """(folder, logits of text, the text class) of a whole checkpoint."""
  text, rest, name = CASES[request.param]
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(
    request.param, text_config=text, **rest
  )
  # Ids within the small vocabulary that no text here uses.
  for field in ("image_token_id", "image_token_index", "video_token_id"):
    if hasattr(config, field):
      setattr(config, field, 60)
  model = transformers.AutoModelForImageTextToText.from_config(config).eval()
  with torch.no_grad():
    for weight in model.parameters():
      weight.normal_(0, 0.2)
    logits = model(torch.tensor(TOKENS)).logits.numpy()
  folder = tmp_path_factory.mktemp(request.param) / "model"
  model.save_pretrained(folder)
  (folder / "preprocessor_config.json").write_text("{}")
  return folder, logits, name


def held(folder):
  """{tensor: bytes}."""
  found = {}
  for path in folder.glob("*.safetensors"):
    with safe_open(path, framework="numpy") as file:
      found |= {k: file.get_tensor(k).tobytes() for k in file.keys()}  # noqa: SIM118
  return found


def logits_of(model, params):
  return np.asarray(model.logits(params, model.hidden(params, TOKENS)))


def test_the_text_model_computes_what_the_whole_does(case, tmp_path):
  """And exported alone it is a model of its own for transformers."""
  folder, want, name = case
  model, params = load_save.load_pretrained(folder)
  notes = "; ".join(model.config.notes)
  assert "its other parts are left out" in notes
  assert "tensors not loaded: " in notes
  np.testing.assert_allclose(logits_of(model, params), want, atol=2e-5)
  export.save_pretrained(tmp_path / "out", model, params)
  alone, loading = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert type(alone).__name__ == name
  assert not any(loading.values()), loading
  with torch.no_grad():
    got = alone(torch.tensor(TOKENS)).logits
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_export_into_changes_the_text_weights_alone(case, tmp_path):
  folder, want, _ = case
  model, params = load_save.load_pretrained(folder)
  export.save_pretrained(tmp_path / "same", model, params, export_into=folder)
  names = [p.name for p in folder.iterdir()]
  _, wrong, errors = filecmp.cmpfiles(
    folder, tmp_path / "same", names, shallow=False
  )
  assert not wrong
  assert not errors
  changed = trees.map_paths(
    lambda path, x: x + 0.5 if path == "layers/mlp/up/kernel" else x, params
  )
  found = export.save_pretrained(
    tmp_path / "out", model, changed, export_into=folder
  )
  assert found.dtype == "float32"
  before, after = held(folder), held(tmp_path / "out")
  assert before.keys() == after.keys()
  odd = {name for name in before if before[name] != after[name]}
  assert len(odd) == 2
  assert all("mlp.up_proj" in name and "visual" not in name for name in odd)
  whole = transformers.AutoModelForImageTextToText.from_pretrained(
    tmp_path / "out"
  )
  with torch.no_grad():
    got = whole(torch.tensor(TOKENS)).logits.numpy()
  np.testing.assert_allclose(got, logits_of(model, changed), atol=5e-5)
  assert np.max(np.abs(got - want)) > 1e-2


def test_export_into_another_model_is_refused(case, tmp_path):
  folder, _, _ = case
  model, params = load_save.load_pretrained(folder)
  raw = json.loads((folder / "config.json").read_text())
  raw["text_config"]["vocab_size"] = 60
  other = tmp_path / "other"
  other.mkdir()
  for file in folder.iterdir():
    (other / file.name).write_bytes(file.read_bytes())
  params["embed"]["embedding"] = params["embed"]["embedding"][:60]
  with pytest.raises(ValueError, match="Pass the parameters of this model"):
    export.save_pretrained(tmp_path / "x", model, params, export_into=other)
  assert not (tmp_path / "x").exists()


def test_the_older_names_are_read_too(case, tmp_path):
  """Before transformers 4.52 the text model had another prefix."""
  folder, want, _ = case
  from safetensors.numpy import load_file, save_file

  old = tmp_path / "old"
  old.mkdir()
  for file in folder.glob("*.json"):
    (old / file.name).write_bytes(file.read_bytes())
  tensors = {}
  for name, x in load_file(folder / "model.safetensors").items():
    name = name.replace("model.language_model.", "language_model.model.")
    name = name.replace("language_model.model.model.", "language_model.model.")
    if name.startswith("lm_head."):
      name = f"language_model.{name}"
    tensors[name] = x
  save_file(tensors, old / "model.safetensors")
  model, params = load_save.load_pretrained(old)
  np.testing.assert_allclose(logits_of(model, params), want, atol=2e-5)
