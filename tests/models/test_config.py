"""config.json: both generations read alike; what is not done is refused."""

import dataclasses
import json
import math

import pytest

from sft_jax.models.config import (
  FIELDS,
  LayerKind,
  config_from_fields,
  parse_config,
  read_config,
)
from sft_jax.models.families import FAMILIES
from sft_jax.models.hf.family_fields import FULL, SLIDING
from sft_jax.models.rope import Rope
from wild_configs import WILD

BASE = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "vocab_size": 100,
  "num_hidden_layers": 2,
  "hidden_size": 32,
  "intermediate_size": 64,
  "num_attention_heads": 4,
  "max_position_embeddings": 128,
  "rms_norm_eps": 1e-5,
}
LLAMA3 = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}


def test_both_generations_of_the_file_mean_the_same():
  old = parse_config(
    BASE
    | {
      "torch_dtype": "bfloat16",
      "rope_theta": 500.0,
      "rope_scaling": {"rope_type": "llama3"} | LLAMA3,
    }
  )
  new = parse_config(
    BASE
    | {
      "dtype": "bfloat16",
      "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0} | LLAMA3,
    }
  )
  assert old == new
  assert old.kinds == (
    LayerKind(None, Rope(500.0, "llama3", 8.0, 1.0, 4.0, 64)),
  )


def test_defaults_of_old_llama_files():
  config = parse_config(BASE)
  assert config.num_kv_heads == 4
  assert config.head_dim == 8
  assert config.layers == (LayerKind(None, Rope(10_000.0)),) * 2
  assert not config.tie_embeddings


def test_families_are_fields():
  kv = {"num_key_value_heads": 2, "head_dim": 8}
  arch = lambda name: {"architectures": [f"{name}ForCausalLM"]}
  llama = parse_config(BASE | kv)
  qwen2 = parse_config(BASE | kv | arch("Qwen2") | {"model_type": "qwen2"})
  qwen3 = parse_config(BASE | kv | arch("Qwen3") | {"model_type": "qwen3"})
  assert qwen2 == dataclasses.replace(llama, family="qwen2", qkv_bias=True)
  assert qwen3 == dataclasses.replace(llama, family="qwen3", qk_norm="head")


def test_the_raw_file_is_kept():
  raw = BASE | {"pad_token_id": 7}
  assert parse_config(raw).raw == raw


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"model_type": "gpt_neox"}, "model_type='gpt_neox'"),
    ({"model_type": None}, "model_type=None"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "Classification"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ({"hidden_size": None}, "hidden_size=None"),
    ({"vocab_size": "100"}, "vocab_size='100'"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ({"head_dim": 7}, "head_dim=7"),
    ({"rope_scaling": {"type": "ntk", "factor": 4.0}}, "'ntk'"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "x": 1}}, "x=1"),
    ({"rope_scaling": {"type": "linear"}}, "factor=None"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq"),
    ({"rope_scaling": 2.0}, "rope_scaling=2.0"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (
      {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}},
      "partial_rotary_factor=0.5",
    ),
    ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "rope_theta"),
    (
      {
        "rope_parameters": {"rope_theta": 1e4},
        "rope_scaling": {"type": "linear", "factor": 2.0},
      },
      "rope_scaling",
    ),
  ],
)
def test_what_is_not_implemented_is_refused_by_name(change, named):
  with pytest.raises(ValueError, match=named) as error:
    parse_config(BASE | change, where="some/config.json")
  assert "some/config.json" in str(error.value)
  assert "expected" in str(error.value)


def test_fields_that_the_reference_does_not_read_are_listed():
  """Of another family, of another tool, of code that is never run."""
  odd = {
    **{"_name_or_path": "x", "unsloth_fixed": True, "num_experts": 8},
    **{"sliding_window": 64, "auto_map": {"AutoModel": "x.Y"}},
    "transformers.js_config": {"dtype": "q4"},
  }
  config = parse_config(BASE | odd)
  assert config == parse_config(BASE)
  (note,) = config.notes
  assert note.startswith("config.json: not read: 'unsloth_fixed', ")
  for name in odd.keys() - {"_name_or_path"}:
    assert f"'{name}'" in note


@pytest.mark.parametrize("name", WILD)
def test_published_files_are_read(name):
  config = parse_config(WILD[name])
  assert len(config.layers) == config.num_layers
  assert config.raw["model_type"] == config.family


@pytest.mark.parametrize("name", WILD)
def test_published_files_mean_what_transformers_reads(name, tmp_path):
  transformers = pytest.importorskip("transformers", reason="live oracle")
  (tmp_path / "config.json").write_text(json.dumps(WILD[name]))
  theirs = transformers.AutoConfig.from_pretrained(tmp_path).get_text_config()
  ours, head = parse_config(WILD[name]), theirs.hidden_size
  head //= theirs.num_attention_heads
  if theirs.is_heterogeneous:
    assert [ours.kv_shape(kind.mixer) for kind in ours.layers] == [
      (one.num_key_value_heads, one.head_dim) for one in theirs.per_layer_config
    ]
    theirs.allow_global_per_layer_attribute_access = True
  heads = theirs.num_attention_heads
  assert (
    *(ours.vocab_size, ours.d_model, ours.num_layers, ours.num_heads),
    *(ours.num_kv_heads, ours.head_dim, ours.max_positions),
  ) == (
    *(theirs.vocab_size, theirs.hidden_size, theirs.num_hidden_layers, heads),
    getattr(theirs, "num_key_value_heads", heads),
    getattr(theirs, "head_dim", None) or head,
    theirs.max_position_embeddings,
  )
  types = getattr(theirs, "layer_types", None)
  if types:
    window = [kind.window is not None for kind in ours.layers]
    assert window == [kind == SLIDING for kind in types]
  rope = getattr(theirs, "rope_parameters", None)
  if rope:
    found = {kind.rope for kind in ours.layers} - {None}
    rope = rope if FULL in rope else {FULL: rope}
    want = {(one["rope_theta"], one["rope_type"]) for one in rope.values()}
    want = {(theta, kind) for theta, kind in want if theta is not None}
    assert {(one.theta, one.type) for one in found} == {
      (theta, "default" if kind == "mrope" else kind) for theta, kind in want
    }


def test_the_fields_of_transformers_are_those_stored():
  pytest.importorskip("transformers", reason="live oracle")
  import make_config_fields

  assert make_config_fields.all_fields() == FIELDS


NOT_VALUES = (
  *(None, True, 0, -1, 0.5, 10**12, 10**400, float("nan"), float("inf")),
  *("", "\n\x1b[2J\ud800", "y" * 10_000, [[]], [1] * 7, [None], {}),
  *({"rope_theta": -1}, {"rope_type": []}, {"type": "yarn"}),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_a_field_holds_is_read_or_refused_in_one_line(family):
  fields = {*folder(family), *FIELDS[family], *("rope_scaling", "rope_theta")}
  fields |= {"text_config", "quantization_config", "layer_types"}
  for field in sorted(fields):
    for value in NOT_VALUES:
      try:
        parse_config(folder(family) | {field: value})
      except ValueError as error:
        message = str(error)
        assert message.startswith("config.json: ")
        assert len(message) < 1000
        assert message.isprintable()


@pytest.mark.parametrize(
  "text",
  ["[" * 100_000, '{"a":' * 100_000, "\xff", '{"vocab_size": 1' + "0" * 9999],
)
def test_a_file_that_is_no_json_is_named(text, tmp_path):
  (tmp_path / "config.json").write_text(text, encoding="latin-1")
  with pytest.raises(ValueError, match=r"config\.json: not JSON"):
    read_config(tmp_path)


def test_a_new_model_is_written_as_transformers_writes_it():
  config = config_from_fields(
    "qwen3",
    vocab_size=64,
    num_layers=2,
    d_model=40,
    d_ff=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=32,
  )
  again = parse_config(json.loads(json.dumps(config.raw)))
  assert again == config
  assert config.init_std == pytest.approx(0.1)


def folder(family, **changes):
  """A config.json of a family, as its authors might have written it."""
  name = FAMILIES[family].architecture
  return BASE | {
    "architectures": [name],
    "model_type": family,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    **changes,
  }


def windows(config):
  return [kind.window for kind in config.layers]


@pytest.mark.parametrize(
  ("family", "changes", "want"),
  [
    ("llama", {}, [None] * 6),
    ("mistral", {}, [4096] * 6),
    ("mistral", {"sliding_window": None}, [None] * 6),
    ("phi3", {"sliding_window": 9}, [9] * 6),
    ("gemma2", {"sliding_window": 9}, [9, None] * 3),
    ("gemma3_text", {"sliding_window": 9}, [9] * 5 + [None]),
    (
      "gemma3_text",
      {"sliding_window": 9, "sliding_window_pattern": 3},
      [9, 9, None] * 2,
    ),
    ("olmo3", {"sliding_window": 9}, [9, 9, 9, None, 9, 9]),
    ("qwen2", {"sliding_window": 9}, [None] * 6),
    (
      "qwen3",
      {
        "sliding_window": 9,
        "use_sliding_window": True,
        "max_window_layers": 4,
      },
      [None] * 4 + [9, 9],
    ),
    (
      "smollm3",
      {"use_sliding_window": True, "sliding_window": 9},
      [None, None, None, 9, None, None],
    ),
  ],
)
def test_windows_without_layer_types_are_those_of_the_reference(
  family, changes, want
):
  assert windows(parse_config(folder(family, **changes))) == want


def test_layer_types_win_where_the_family_has_them():
  types = ["full_attention"] * 5 + ["sliding_attention"]
  given = {"layer_types": types, "sliding_window": 9}
  config = parse_config(folder("gemma2", **given))
  assert windows(config) == [None] * 5 + [9]
  with pytest.raises(ValueError, match="layer_types"):
    parse_config(folder("mistral", **given))


def test_gemma3_has_two_ropes_in_either_form():
  scaling = {"rope_type": "linear", "factor": 8.0}
  old = parse_config(folder("gemma3_text", rope_scaling=scaling))
  new = parse_config(
    folder(
      "gemma3_text",
      rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": scaling | {"rope_theta": 1e6},
      },
    )
  )
  assert old == new
  assert [kind.rope.theta for kind in old.kinds] == [1e4, 1e6]
  assert [kind.rope.factor for kind in old.kinds] == [1.0, 8.0]


def test_smollm3_skips_the_rope_of_every_fourth_layer():
  config = parse_config(folder("smollm3"))
  turns = [kind.rope is not None for kind in config.layers]
  assert turns == [True, True, True, False, True, True]
  assert len(config.kinds) == 2


def test_yarn_and_longrope_scale_by_their_papers():
  yarn = {"rope_type": "yarn", "factor": 4.0}
  yarn["original_max_position_embeddings"] = 32
  config = parse_config(BASE | {"rope_scaling": yarn})
  assert config.kinds[0].rope.scale == pytest.approx(0.1 * math.log(4) + 1)
  longrope = {
    "type": "su",
    "short_factor": [1.0] * 3,
    "long_factor": [2.0] * 3,
  }
  outside = {
    "original_max_position_embeddings": 32,
    "partial_rotary_factor": 0.75,
    "rope_scaling": longrope,
  }
  (kind,) = parse_config(folder("phi3", **outside)).kinds
  assert kind.rope.type == "longrope"
  assert kind.rope.fraction == 0.75
  want = math.sqrt(1 + math.log(128 / 32) / math.log(32))
  assert kind.rope.scale == pytest.approx(want)


@pytest.mark.parametrize(
  ("family", "changes", "named"),
  [
    ("qwen3", {"head_dim": None}, "head_dim"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation"),
    ("gemma2", {"use_bidirectional_attention": True}, "bidirectional"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_soft"),
    ("gemma4_text", {"num_kv_shared_layers": 6}, "num_kv_shared_layers"),
    ("gemma4_text", {"vocab_size_per_layer_input": 9}, "per_layer_input"),
    ("gemma4_text", {"enable_moe_block": True}, "num_experts"),
    ("gemma4_text", {"use_bidirectional_attention": "all"}, "bidirectional"),
    ("gemma4_text", {"layer_types": [FULL, SLIDING] * 3}, "of the last"),
    ("gemma4_text", {"rope_theta": 1e4}, "rope_parameters of each type"),
    (
      "gemma4_text",
      {"per_layer_config": {"5": {"head_dim": 8, "sliding_window": 3}}},
      "per_layer_config",
    ),
    (
      "llama",
      {"rope_parameters": {"llama_4_scaling_beta": 0.1}},
      "llama_4_scaling_beta",
    ),
    ("mistral", {"layer_types": ["chunked_attention"] * 6}, "chunked"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("phi3", {"partial_rotary_factor": 0.9}, "partial_rotary_factor"),
    ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
    ("gpt2", {"rope_scaling": {"type": "linear"}}, "rope_scaling"),
  ],
)
def test_what_a_family_does_not_do_is_refused_by_name(family, changes, named):
  with pytest.raises(ValueError, match=named):
    parse_config(folder(family, **changes))


GLM4 = BASE | {
  **{"model_type": "glm4", "architectures": ["Glm4ForCausalLM"]},
  "num_key_value_heads": 2,
}
EXAONE4 = GLM4 | {
  **{"model_type": "exaone4", "architectures": ["Exaone4ForCausalLM"]},
  **{"sliding_window": 8, "num_hidden_layers": 4},
}
HUNYUAN = GLM4 | {
  "model_type": "hunyuan_v1_dense",
  "architectures": ["HunYuanDenseV1ForCausalLM"],
}

OLMO_HYBRID = BASE | {
  **{"model_type": "olmo_hybrid", "num_hidden_layers": 4},
  "architectures": ["OlmoHybridForCausalLM"],
}
NEMOTRON_H = BASE | {
  **{"model_type": "nemotron_h", "num_hidden_layers": None},
  **{"num_key_value_heads": 2, "hybrid_override_pattern": "ME*-"},
  "architectures": ["NemotronHForCausalLM"],
}


def test_fields_that_families_read_in_their_own_way():
  """As published files have them, and as the reference reads them."""
  (glm,) = parse_config(GLM4 | {"head_dim": 8}).kinds
  assert glm.rope == Rope(10_000.0, fraction=0.5)
  (glm,) = parse_config(
    GLM4 | {"head_dim": 8, "partial_rotary_factor": 0.25}
  ).kinds
  assert glm.rope == Rope(10_000.0, fraction=0.25)
  # Full layers beside windows have no positions; by a pattern, or by name.
  local, full = LayerKind(8, Rope(10_000.0)), LayerKind(None, None)
  assert parse_config(EXAONE4).layers == (local, local, local, full)
  named = {"sliding_window_pattern": "LG", "layer_types": [SLIDING, FULL] * 2}
  assert parse_config(EXAONE4 | named).layers == (local, full) * 2
  none = parse_config(EXAONE4 | {"sliding_window": None})
  assert none.layers == (LayerKind(None, Rope(10_000.0)),) * 4
  # Heads and widths follow from others; a base that is null is no rope.
  olmo = parse_config(OLMO_HYBRID)
  sizes = (olmo.mixer_groups, olmo.mixer_heads)
  assert (*sizes, olmo.mixer_state, olmo.mixer_width) == (4, 4, 6, 12)
  assert [kind.mixer for kind in olmo.layers] == ["delta"] * 3 + ["attn"]
  assert olmo.kinds[0].rope == Rope(10_000.0)
  assert (olmo.mixer_beta, olmo.mixer_norm_eps) == (2.0, 1e-5)
  for null in (
    {"rope_theta": None},
    {"rope_parameters": {"rope_theta": None, "rope_type": "default"}},
  ):
    assert parse_config(OLMO_HYBRID | null).kinds == (full,)
  # Layers by letters, or by name; their number follows.
  nemotron = parse_config(NEMOTRON_H)
  assert nemotron.sorts == (("mamba",), ("moe",), ("attn",), ("mlp",))
  assert (nemotron.d_ff, nemotron.d_ff_dense) == (7688, 64)
  assert nemotron.kinds == (full,)
  dense = parse_config(
    NEMOTRON_H
    | {"layers_block_type": ["mamba", "mlp"], "hybrid_override_pattern": "*"}
  )
  assert dense.sorts == (("mamba",), ("mlp",))
  assert (dense.num_layers, dense.num_experts, dense.d_ff) == (2, 0, 64)
  one = {"linear_allow_neg_eigval": False, "linear_key_head_dim": 3}
  olmo = parse_config(OLMO_HYBRID | one)
  assert (olmo.mixer_beta, olmo.mixer_width) == (1.0, 6)
  scaling = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
  old = {"rope_theta": 10_000.0, "rope_scaling": scaling}
  (hunyuan,) = parse_config(HUNYUAN | old).kinds
  assert hunyuan.rope == Rope(10_000.0, "ntk", 1000.0)
  # transformers writes no overrides of layers whose heads are alike.
  alike = parse_config(folder("gemma4_text", per_layer_config={}))
  assert [alike.kv_shape(kind.mixer) for kind in alike.kinds] == [(2, 8)] * 2


@pytest.mark.parametrize(
  ("raw", "named"),
  [
    (HUNYUAN | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    (GLM4 | {"rope_scaling": {"type": "linear", "alpha": 2.0}}, "alpha"),
    (NEMOTRON_H | {"hybrid_override_pattern": "MX"}, "layer_types"),
    (NEMOTRON_H | {"num_hidden_layers": 3}, "layer_types"),
    (NEMOTRON_H | {"mamba_d_conv": 3}, "mamba_d_conv=3"),
    (NEMOTRON_H | {"moe_latent_size": 8}, "moe_latent_size=8"),
    (NEMOTRON_H | {"mlp_bias": True}, "mlp_bias=True"),
    (NEMOTRON_H | {"time_step_limit": [0.0, 1.0]}, "time_step_limit"),
    (EXAONE4 | {"sliding_window_pattern": "LG"}, "sliding_window_pattern='LG'"),
    (
      EXAONE4
      | {
        "model_type": "cohere2",
        "architectures": None,
        "sliding_window": None,
      },
      "sliding_window=None",
    ),
  ],
)
def test_what_families_do_not_have_is_refused_by_name(raw, named):
  with pytest.raises(ValueError, match=named):
    parse_config(raw)
