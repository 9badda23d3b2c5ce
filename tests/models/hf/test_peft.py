"""PEFT folders: peft computes what we compute, and we what peft trained."""

import dataclasses
import functools
import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sft_jax.common import trees
from sft_jax.models import transformer
from sft_jax.models.config import read_config
from sft_jax.models.hf import load_save, peft_load, peft_save
from sft_jax.models.lora import lora, merge

GOLDENS = Path(__file__).parents[1] / "goldens"
VARIANTS = {
  "plain": {},
  "patterns": {
    "targets": ("attn/(q|v)/", "mlp/"),
    "rank_pattern": (("attn/v", 5), ("mlp/", 2)),
    "alpha_pattern": (("mlp/down", 2.0),),
    "rslora": True,
  },
  "dora": {"dora": True},
  "pissa": {"init": "pissa", "rslora": True},
  "whole": {"targets": "attention", "also_train": ("norm", "embed/", "up/")},
  "rows": {"targets": "attention", "token_rows": (3, 17, 60)},
}
# Of models with experts.
EXPERTS = {
  "all": {},
  "some": {
    "targets": ("attn/q/", "moe/up/"),
    "rank_pattern": (("moe/up", 2),),
    "rslora": True,
  },
  "ranks": {
    "targets": ("moe/",),
    "rank_pattern": (("moe/gate", 5),),
    "alpha_pattern": (("moe/down", 2.0),),
  },
  "pissa": {"init": "pissa"},
  # PEFT refuses the last projection of Nemotron-H's Mamba-2.
  "accepted": {"targets": ("attn/", "mamba/in/", "mlp/", "moe/")},
}
pytestmark = [
  # PEFT still reads a name that transformers is about to drop.
  pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*"),
  pytest.mark.filterwarnings("ignore::FutureWarning:peft.*"),
]


@functools.cache
def load(name, case="qwen3"):
  """A model and parameters that were trained far from their start."""
  settings = (VARIANTS | EXPERTS)[name]
  adapters = lora.LoraConfig(rank=3, alpha=5.0, **settings)
  model, params = load_save.load_pretrained(GOLDENS / case, lora=adapters)
  rng = np.random.default_rng(1)
  move = lambda path, x: (
    x + rng.normal(0, 0.1, x.shape).astype(np.float32)
    if adapters.trains(path)
    else x
  )
  return model, trees.map_paths(move, params)


@functools.cache
def tokens(case="qwen3"):
  with np.load(GOLDENS / case / "golden.npz", allow_pickle=False) as file:
    return file["tokens"]


def logits(model, params, case="qwen3"):
  function = lambda p: model.logits(p, model.hidden(p, tokens(case)))
  return np.asarray(jax.jit(function)(params))


def base_model(case="qwen3"):
  torch = pytest.importorskip("torch", reason="live oracle: needs torch")
  pytest.importorskip("peft", reason="live oracle: needs peft")
  transformers = pytest.importorskip("transformers", reason="live oracle")
  return transformers.AutoModelForCausalLM.from_pretrained(
    GOLDENS / case, dtype=torch.float32
  )


def logits_of(theirs, case="qwen3"):
  import torch

  with torch.no_grad():
    return theirs.eval()(torch.tensor(tokens(case)).long()).logits.numpy()


@pytest.mark.parametrize("name", VARIANTS)
def test_peft_computes_the_same_from_our_adapter(name, tmp_path):
  base = base_model()
  import peft as theirs

  model, params = load(name)
  peft_save.save_adapter(tmp_path, model, params, base="base")
  start = logits_of(base)
  with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)  # Keys missing or unknown.
    adapted = theirs.PeftModel.from_pretrained(base, tmp_path)
  want = logits(model, params)
  np.testing.assert_allclose(logits_of(adapted), want, atol=1e-4)
  assert np.abs(want - start).max() > 1


@pytest.mark.parametrize("name", VARIANTS)
def test_what_we_write_we_read(name, tmp_path):
  """The same kernels from the folder; PiSSA comes back at twice the rank."""
  model, params = load(name)
  peft_save.save_adapter(tmp_path, model, params, base="base")
  found = peft_load.load_adapter(tmp_path, model.config)
  assert all(map(found.lora.trains, found.leaves))
  again, fresh = load_save.load_pretrained(GOLDENS / "qwen3", lora=found.lora)
  placed = peft_load.place_adapter(fresh, found.leaves)
  want = merge.merge(params, model.lora).params
  got = merge.merge(placed, again.lora).params
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want
  )
  if name != "pissa":
    want, _ = trees.partition(params, model.lora.trains)
    got, _ = trees.partition(placed, found.lora.trains)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", ["plain", "dora"])
def test_modules_that_hold_several_kernels(name, tmp_path):
  """Phi-3: q, k and v in one module, gate and up in another; there and back."""
  base = base_model("phi3")
  import peft as theirs

  model, params = load(name, "phi3")
  peft_save.save_adapter(tmp_path, model, params, base="base")
  want = logits(model, params, "phi3")
  adapted = theirs.PeftModel.from_pretrained(base, tmp_path)
  np.testing.assert_allclose(logits_of(adapted, "phi3"), want, atol=1e-4)
  found = peft_load.load_adapter(tmp_path, model.config)
  assert found.leaves["layers/attn/q/lora_a"].shape[-1] == 9
  again, fresh = load_save.load_pretrained(GOLDENS / "phi3", lora=found.lora)
  placed = peft_load.place_adapter(fresh, found.leaves)
  np.testing.assert_allclose(logits(again, placed, "phi3"), want, atol=1e-4)


# The names of every other family, once each.
FAMILIES = (
  *("glm4", "seed_oss", "exaone4", "ernie4_5", "hunyuan_v1_dense", "cohere2"),
  *("apertus", "olmoe", "minimax_m2", "lfm2_moe", "granitemoehybrid_moe"),
  *("glm4_moe", "ernie4_5_moe", "deepseek_v2", "glm4_moe_lite"),
  *("qwen3_next", "qwen3_5_moe", "olmo_hybrid"),
  *("gemma4_text", "gemma4_text_moe", "gemma4_text_shared"),
)


@pytest.mark.parametrize(
  ("case", "name"),
  [
    (case, name)
    for case in ("mixtral", "qwen3_moe", "gpt_oss")
    for name in EXPERTS
    if name != "accepted"
  ]
  + [("deepseek_v3", "all")]
  + [pytest.param("nemotron_h", "accepted", marks=pytest.mark.slow)]
  + [pytest.param(case, "all", marks=pytest.mark.slow) for case in FAMILIES],
)
def test_adapters_of_experts(case, name, tmp_path):
  """Of all experts at once, as transformers 5 holds them."""
  base = base_model(case)
  import peft as theirs

  model, params = load(name, case)
  peft_save.save_adapter(tmp_path, model, params, base="base")
  want, start = logits(model, params, case), logits_of(base, case)
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # Keys missing or unknown.
    # It looks for the patterns among modules, though it obeys them.
    warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern")
    warnings.filterwarnings("ignore", category=FutureWarning)
    adapted = theirs.PeftModel.from_pretrained(base, tmp_path)
  np.testing.assert_allclose(logits_of(adapted, case), want, atol=1e-4)
  assert np.abs(want - start).max() > 0.1
  found = peft_load.load_adapter(tmp_path, model.config)
  again, fresh = load_save.load_pretrained(GOLDENS / case, lora=found.lora)
  params = peft_load.place_adapter(fresh, found.leaves)
  np.testing.assert_allclose(logits(again, params, case), want, atol=1e-4)


def test_experts_that_were_trained_whole_are_refused(tmp_path):
  adapters = lora.LoraConfig(
    rank=2, alpha=2.0, targets="attention", also_train=("moe/down/",)
  )
  model, params = load_save.load_pretrained(GOLDENS / "mixtral", lora=adapters)
  with pytest.raises(ValueError, match=r"moe/down .* trained whole"):
    peft_save.save_adapter(tmp_path, model, params, base="base")


def trained_by_peft(base, config, folder):
  """A model with PEFT's adapters, far from their start; saved to the folder."""
  import peft as theirs
  import torch

  torch.manual_seed(0)
  adapted = theirs.get_peft_model(base, config)
  with torch.no_grad():
    for p in adapted.parameters():
      if p.requires_grad:
        p.add_(0.1 * torch.randn_like(p))
  adapted.save_pretrained(folder)
  return adapted


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_we_compute_the_same_from_an_adapter_of_peft(kind, tmp_path):
  base = base_model()
  import peft as theirs

  config = theirs.LoraConfig(
    r=4,
    lora_alpha=6,
    target_modules=["q_proj", "down_proj"],
    rank_pattern={"down_proj": 2},
    alpha_pattern={"layers.[01].mlp.down_proj": 3},
    use_rslora=kind == "plain",
    use_dora=kind == "dora",
    lora_dropout=0.1,
    modules_to_save=["model.norm"],
    task_type="CAUSAL_LM",
  )
  adapted = trained_by_peft(base, config, tmp_path)
  want = logits_of(adapted)
  found = peft_load.load_adapter(tmp_path, read_config(GOLDENS / "qwen3"))
  assert found.lora.dropout == 0.1
  assert found.lora.also_train == ("^final_norm/scale$",)
  model, fresh = load_save.load_pretrained(GOLDENS / "qwen3", lora=found.lora)
  params = peft_load.place_adapter(fresh, found.leaves)
  np.testing.assert_allclose(logits(model, params), want, atol=1e-4)


def test_an_adapter_folder_has_the_names_of_peft(tmp_path):
  model, params = load("plain")
  peft_save.save_adapter(tmp_path, model, params, base="some/base")
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert (config["r"], config["lora_alpha"]) == (3, 5)
  assert config["base_model_name_or_path"] == "some/base"
  assert config["target_modules"] == sorted(
    f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")
  )
  tensors = load_file(tmp_path / "adapter_model.safetensors")
  name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
  want = params["layers"]["mlp"]["down"]["lora_a"][1].T
  np.testing.assert_array_equal(tensors[name], want)
  assert len(tensors) == 2 * 7 * 2


# -- What is refused -----------------------------------------------------------


def tampered(tmp_path, settings=None, change=None):
  """An adapter folder with other settings or tensors, read again."""
  model, params = load("plain")
  peft_save.save_adapter(tmp_path, model, params, base="base")
  path = tmp_path / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | (settings or {})))
  tensors = load_file(tmp_path / "adapter_model.safetensors")
  if change:
    change(tensors)
  save_file(tensors, tmp_path / "adapter_model.safetensors")
  return peft_load.load_adapter(tmp_path, model.config)


@pytest.mark.parametrize(
  "settings",
  [
    {"peft_type": "IA3"},
    {"bias": "all"},
    {"init_lora_weights": "pissa"},
    {"layers_to_transform": [0]},
    {"layer_replication": [[0, 2]]},
    {"some_new_switch": True},
  ],
)
def test_settings_that_mean_other_arithmetic_are_refused(tmp_path, settings):
  (name,) = settings
  with pytest.raises(ValueError, match=f"adapter_config.json: {name}="):
    tampered(tmp_path, settings)


def test_every_field_of_pefts_configuration_is_read_or_refused(tmp_path):
  """Walks peft's dataclass: what is not understood is named, never ignored."""
  theirs = pytest.importorskip("peft", reason="live oracle: needs peft")
  fields = {field.name for field in dataclasses.fields(theirs.LoraConfig)}
  plain = theirs.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM").to_dict()
  known = json.loads(json.dumps(plain, default=list))
  tampered(tmp_path, {k: x for k, x in known.items() if k != "target_modules"})
  # What says nothing of the arithmetic, or is compared with the tensors.
  silent = {
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "use_dora", "modules_to_save", "ensure_weight_tying"),
    *("target_parameters", "trainable_token_indices", "target_modules"),
    *("exclude_modules", "task_type", "peft_version", "eva_config"),
    *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    *("megatron_core", "qalora_group_size", "fan_in_fan_out", "layers_pattern"),
    *("runtime_config",),
  }
  for name in sorted(fields - silent):
    with pytest.raises(ValueError, match=f"adapter_config.json: {name}="):
      tampered(tmp_path, {name: "odd"})
  for settings in (
    {"trainable_token_indices": [3]},
    {"target_parameters": ["q_norm.weight"]},
  ):
    with pytest.raises(ValueError, match=next(iter(settings))):
      tampered(tmp_path, settings)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
@pytest.mark.parametrize("tie", [False, True])
def test_an_embedding_trained_apart_from_its_tied_head_is_refused(
  tie, tmp_path
):
  """peft leaves the head as it was; tied, it computes what we do."""
  base = base_model()
  import peft as theirs
  import torch

  config = theirs.LoraConfig(
    r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"],
    ensure_weight_tying=tie,
  )  # fmt: skip
  adapted = theirs.get_peft_model(base, config)
  torch.manual_seed(0)
  for name, p in adapted.named_parameters():
    if "modules_to_save" in name:
      p.data += 0.1 * torch.randn_like(p)
  adapted.save_pretrained(tmp_path)
  config = read_config(GOLDENS / "qwen3")
  if not tie:
    with pytest.raises(ValueError, match="apart from the head"):
      peft_load.load_adapter(tmp_path, config)
    return
  found = peft_load.load_adapter(tmp_path, config)
  model, fresh = load_save.load_pretrained(GOLDENS / "qwen3", lora=found.lora)
  got = logits(model, peft_load.place_adapter(fresh, found.leaves))
  np.testing.assert_allclose(got, logits_of(adapted), atol=1e-4)


def test_rows_that_peft_trained_alone_are_read(tmp_path):
  base = base_model()
  import peft as theirs
  import torch

  config = theirs.LoraConfig(
    r=3, target_modules=["q_proj"], trainable_token_indices=[17, 5]
  )
  adapted = theirs.get_peft_model(base, config)
  torch.manual_seed(0)
  for p in adapted.parameters():
    if p.requires_grad:
      p.data += 0.1 * torch.randn_like(p)
  adapted.save_pretrained(tmp_path)
  found = peft_load.load_adapter(tmp_path, read_config(GOLDENS / "qwen3"))
  assert found.lora.token_rows == (5, 17)
  model, fresh = load_save.load_pretrained(GOLDENS / "qwen3", lora=found.lora)
  got = logits(model, peft_load.place_adapter(fresh, found.leaves))
  np.testing.assert_allclose(got, logits_of(adapted), atol=1e-4)


QUERY = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
  ("settings", "change", "message"),
  [
    ({}, lambda t: t.pop(QUERY.format("A")), "not in every layer"),
    ({"r": 4}, None, "one rank in all layers"),
    ({"use_dora": True}, None, r"expected \['a', 'b', 'm'\]"),
    ({"alpha_pattern": {"layers.0.mlp.up_proj": 9}}, None, "one rank in all"),
    ({}, lambda t: t.update(odd=np.zeros(1)), "1 tensors are unknown: .'odd'"),
  ],
)
def test_tensors_that_do_not_fit_are_refused(
  tmp_path, settings, change, message
):
  with pytest.raises(ValueError, match=message):
    tampered(tmp_path, settings, change)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"no adapter_config\.json"):
    peft_load.load_adapter(tmp_path, load("plain")[0].config)


def test_leaves_that_are_not_the_models_are_refused():
  model, params = load("plain")
  with pytest.raises(ValueError, match=r"lora\.path: layers/attn/q/lora_a is"):
    peft_load.place_adapter(
      params, {"layers/attn/q/lora_a": np.zeros((2, 3, 4))}
    )
  del model


def test_without_adapters_there_is_no_adapter_folder(tmp_path):
  model, params = load("plain")
  bare = transformer.build(model.config)
  with pytest.raises(ValueError, match="no adapters"):
    peft_save.save_adapter(tmp_path / "out", bare, params, base="base")


# PEFT looks for the pattern among modules, though it obeys it.
@pytest.mark.filterwarnings("ignore:The following rank_pattern")
@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("targets", [("gate_up", "down"), ("down",)])
def test_we_compute_the_same_from_peft_s_adapter_of_experts(
  case, targets, tmp_path
):
  base = base_model(case)
  import peft as theirs

  config = theirs.LoraConfig(
    r=4,
    lora_alpha=6,
    target_modules=["q_proj"],
    target_parameters=[f"mlp.experts.{target}_proj" for target in targets],
    rank_pattern={"mlp.experts.down_proj": 2},
    task_type="CAUSAL_LM",
  )
  adapted = trained_by_peft(base, config, tmp_path)
  want = logits_of(adapted, case)
  found = peft_load.load_adapter(tmp_path, read_config(GOLDENS / case))
  model, fresh = load_save.load_pretrained(GOLDENS / case, lora=found.lora)
  params = peft_load.place_adapter(fresh, found.leaves)
  np.testing.assert_allclose(logits(model, params, case), want, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern")
@pytest.mark.parametrize(
  "settings",
  [
    # The experts alone, as peft reads these names.
    {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]},
    {
      "target_modules": ["o_proj"],
      "target_parameters": [
        "shared_experts.up_proj.weight",
        "experts.down_proj",
      ],
      "rank_pattern": {"shared_experts.up_proj.weight": 2},
    },
    # Of shared experts and of the first, dense layer.
    {"target_modules": [], "target_parameters": ["down_proj.weight"]},
  ],
)
def test_we_compute_the_same_where_peft_tells_experts_apart(settings, tmp_path):
  base = base_model("deepseek_v3")
  import peft as theirs

  config = theirs.LoraConfig(
    r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings
  )
  adapted = trained_by_peft(base, config, tmp_path)
  want = logits_of(adapted, "deepseek_v3")
  folder = GOLDENS / "deepseek_v3"
  found = peft_load.load_adapter(tmp_path, read_config(folder))
  model, fresh = load_save.load_pretrained(folder, lora=found.lora)
  params = peft_load.place_adapter(fresh, found.leaves)
  got = logits(model, params, "deepseek_v3")
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_what_is_named_like_an_expert_is_a_parameter_to_peft(tmp_path):
  """A target module of such a name would be the experts to it."""
  model, params = load("all", "deepseek_v3")
  peft_save.save_adapter(tmp_path, model, params, base="base")
  settings = json.loads((tmp_path / peft_save.CONFIG).read_text("utf-8"))
  ends = ("gate_proj", "up_proj", "down_proj")
  assert not any(x.endswith(ends) for x in settings["target_modules"])
  assert set(settings["target_parameters"]) == {
    *("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    *(f"mlp.{x}.weight" for x in ends),
    *(f"mlp.shared_experts.{x}.weight" for x in ends),
  }
  adapters = lora.LoraConfig(
    rank=2, alpha=2.0, targets=("moe/shared/",), dora=True
  )
  model, params = load_save.load_pretrained(
    GOLDENS / "deepseek_v3", lora=adapters
  )
  with pytest.raises(ValueError, match=r"shared_experts\..* nor dropout"):
    peft_save.save_adapter(tmp_path, model, params, base="base")


@pytest.mark.parametrize("case", ["qwen3", "mixtral"])
def test_parameters_that_are_no_experts_are_refused(case, tmp_path):
  name = "plain" if case == "qwen3" else "some"
  model, params = load(name, case)
  peft_save.save_adapter(tmp_path, model, params, base="base")
  path = tmp_path / peft_save.CONFIG
  settings = json.loads(path.read_text("utf-8"))
  settings["target_parameters"] = ["self_attn.q_norm.weight"]
  path.write_text(json.dumps(settings), "utf-8")
  with pytest.raises(ValueError, match=r"holds 'self_attn.q_norm.weight'"):
    peft_load.load_adapter(tmp_path, model.config)


@pytest.mark.parametrize(
  ("name", "declared", "message"),
  [
    ("ranks", ["mlp.experts.down_proj"], "tensors are unknown"),
    ("some", ["experts.gate_up_proj", "experts.down_proj"], "shapes .None"),
  ],
)
def test_stacks_are_those_that_are_declared(name, declared, message, tmp_path):
  model, params = load(name, "mixtral")
  peft_save.save_adapter(tmp_path, model, params, base="base")
  path = tmp_path / peft_save.CONFIG
  settings = json.loads(path.read_text("utf-8"))
  path.write_text(
    json.dumps(settings | {"target_parameters": declared}), "utf-8"
  )
  with pytest.raises(ValueError, match=message):
    peft_load.load_adapter(tmp_path, model.config)
