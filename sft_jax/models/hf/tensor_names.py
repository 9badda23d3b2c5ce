"""Names of tensors in the files of families.

    {module of ours: module of theirs}, see `families.Family.names`

`{}` is the layer, a second one the expert.
"""


def _layers(
  text: str, ours: str = "", theirs: str = "", at: str = "model.layers.{}."
) -> dict[str, str]:
  """A table from 'a: b, c: d', of modules within blocks `ours` and `theirs`."""
  pairs = (line.split(": ") for line in " ".join(text.split()).split(", "))
  return {f"layers/{ours}{a}": f"{at}{theirs}{b}" for a, b in pairs}


_PROJ = "gate: gate_proj, up: up_proj, down: down_proj"
_ATTENTION = """q: q_proj, k: k_proj, v: v_proj, o: o_proj,
  q_norm: q_norm, k_norm: k_norm"""
_SHARING = "q: q_proj, o: o_proj, q_norm: q_norm"
_GATE_UP = "mlp/gate: mlp.gate_up_proj, mlp/up: mlp.gate_up_proj"
_SPARSE = {
  **{"embed": "model.embed_tokens", "final_norm": "model.norm"},
  "head": "lm_head",
  **_layers("attn_norm: input_layernorm, mlp_norm: post_attention_layernorm"),
  **_layers(_ATTENTION, "attn/", "self_attn."),
}

LLAMA = _SPARSE | _layers(_PROJ, "mlp/", "mlp.")
POST_NORM = LLAMA | _layers("""
  attn_post_norm: post_attention_layernorm,
  mlp_norm: pre_feedforward_layernorm,
  mlp_post_norm: post_feedforward_layernorm""")
GEMMA4 = {
  **POST_NORM,
  **_layers(_ATTENTION, "global_attn/", "self_attn."),
  **_layers(_SHARING, "reuse_attn/", "self_attn."),
  **_layers(_SHARING, "reuse_global_attn/", "self_attn."),
  **_layers(_PROJ, "wide_mlp/", "mlp."),
  "per_layer/embed": "model.embed_tokens_per_layer",
  "per_layer/project": "model.per_layer_model_projection",
  "per_layer/norm": "model.per_layer_projection_norm",
  **_layers("""per_layer_gate: per_layer_input_gate,
    per_layer_out: per_layer_projection,
    per_layer_norm: post_per_layer_input_norm"""),
  **_layers("""layer_scalar: layer_scalar,
    mlp_own_norm: post_feedforward_layernorm_1,
    moe_norm: pre_feedforward_layernorm_2,
    moe_post_norm: post_feedforward_layernorm_2, moe/router: router.proj,
    moe/router_norm/scale: router.scale,
    moe/per_expert_scale: router.per_expert_scale,
    moe/gate: experts.gate_up_proj, moe/up: experts.gate_up_proj,
    moe/down: experts.down_proj"""),
}
FUSED = LLAMA | _layers(f"""{_GATE_UP}, attn/q: self_attn.qkv_proj,
  attn/k: self_attn.qkv_proj, attn/v: self_attn.qkv_proj""")
GLM4 = LLAMA | _layers(f"""{_GATE_UP}, attn_post_norm: post_self_attn_layernorm,
  mlp_post_norm: post_mlp_layernorm""")
HUNYUAN = LLAMA | _layers("""
  attn/q_norm: self_attn.query_layernorm,
  attn/k_norm: self_attn.key_layernorm""")
APERTUS = LLAMA | _layers("""attn_norm: attention_layernorm,
  mlp_norm: feedforward_layernorm, mlp/act: mlp.act_fn""")

_W123 = "gate: w1, up: w3, down: w2"
_EXPERTS_W123 = "gate: experts.{}.w1, up: experts.{}.w3, down: experts.{}.w2"
LFM2 = {
  **(LLAMA | {"final_norm": "model.embedding_norm"}),
  **_layers("""attn_norm: operator_norm, attn/o: self_attn.out_proj,
    attn/q_norm: self_attn.q_layernorm, attn/k_norm: self_attn.k_layernorm,
    conv/in: conv.in_proj, conv/conv: conv.conv, conv/out: conv.out_proj,
    mlp_norm: ffn_norm"""),
  **_layers(_W123, "mlp/", "feed_forward."),
}
LFM2_MOE = LFM2 | _layers(
  f"router: gate, router/correction: expert_bias, {_EXPERTS_W123}",
  *("moe/", "feed_forward."),
)

QWEN3_5 = LLAMA | _layers("""
  delta: linear_attn, delta/conv: linear_attn.conv1d,
  delta/norm: linear_attn.norm, delta/out: linear_attn.out_proj,
  delta/qkv: linear_attn.in_proj_qkv, delta/z: linear_attn.in_proj_z,
  delta/b: linear_attn.in_proj_b, delta/a: linear_attn.in_proj_a,
  delta/qkvz: linear_attn.in_proj_qkvz, delta/ba: linear_attn.in_proj_ba""")
OLMO_HYBRID = QWEN3_5 | _layers("""
  attn_post_norm: post_attention_layernorm,
  mlp_post_norm: post_feedforward_layernorm,
  delta/q: linear_attn.q_proj, delta/k: linear_attn.k_proj,
  delta/v: linear_attn.v_proj, delta/z: linear_attn.g_proj,
  delta/b: linear_attn.b_proj, delta/a: linear_attn.a_proj,
  delta/norm: linear_attn.o_norm, delta/out: linear_attn.o_proj""")
_MAMBA = LLAMA | _layers("""
  mamba: mamba, mamba/in: mamba.in_proj, mamba/conv: mamba.conv1d,
  mamba/norm: mamba.norm, mamba/out: mamba.out_proj""")
BAMBA = {
  **(_MAMBA | {"final_norm": "model.final_layernorm"}),
  **_layers("mlp_norm: pre_ff_layernorm"),
  **_layers(_PROJ, "mlp/", "feed_forward."),
}
_IN_OUT = "gate: input_linear, up: input_linear, down: output_linear"
GRANITE_HYBRID = {
  **_MAMBA,
  **_layers(f"router: router.layer, {_IN_OUT}", "moe/", "block_sparse_moe."),
  **_layers(_IN_OUT, "mlp/", "shared_mlp."),
  **_layers(_IN_OUT, "moe/shared/", "shared_mlp."),
}

QWEN_MOE = LLAMA | _layers(
  """router: gate, gate: experts.{}.gate_proj, up: experts.{}.up_proj,
  down: experts.{}.down_proj""",
  *("moe/", "mlp."),
)
_CORRECTION = "moe/router/correction"
DEEPSEEK = QWEN_MOE | _layers(_PROJ, "moe/shared/", "mlp.shared_experts.")
ERNIE_MOE = DEEPSEEK | _layers(
  f"{_CORRECTION}: mlp.moe_statics.e_score_correction_bias"
)
LATENT = DEEPSEEK | _layers(
  """q_down: q_a_proj, q_down_norm: q_a_layernorm, q_up: q_b_proj,
  kv_down: kv_a_proj_with_mqa, kv_norm: kv_a_layernorm, kv_up: kv_b_proj""",
  *("attn/", "self_attn."),
)
QWEN_HYBRID_MOE = {
  **(QWEN3_5 | QWEN_MOE),
  **_layers(_PROJ, "moe/shared/", "mlp.shared_expert."),
  **_layers("moe/shared/share: mlp.shared_expert_gate"),
}
NEMOTRON_H = {
  **{"embed": "model.embeddings", "final_norm": "model.norm_f"},
  "head": "lm_head",
  **_layers("""attn_norm: norm, attn/q: mixer.q_proj, attn/k: mixer.k_proj,
    attn/v: mixer.v_proj, attn/o: mixer.o_proj, mamba: mixer,
    mamba/in: mixer.in_proj, mamba/conv: mixer.conv1d,
    mamba/norm: mixer.norm, mamba/out: mixer.out_proj"""),
  **_layers("up: up_proj, down: down_proj", "mlp/", "mixer."),
  **_layers(
    "up: up_proj, down: down_proj", "moe/shared/", "mixer.shared_experts."
  ),
  **_layers(
    "router: gate, up: experts.{}.up_proj, down: experts.{}.down_proj",
    *("moe/", "mixer."),
  ),
}
MIXTRAL = _SPARSE | _layers(
  f"router: gate, {_EXPERTS_W123}", "moe/", "block_sparse_moe."
)
MINIMAX = MIXTRAL | _layers(
  f"{_CORRECTION}: block_sparse_moe.e_score_correction_bias"
)
GPT_OSS = _SPARSE | _layers("""attn: self_attn, moe/router: mlp.router,
  moe/gate: mlp.experts.gate_up_proj, moe/up: mlp.experts.gate_up_proj,
  moe/down: mlp.experts.down_proj""")
GPT2 = {
  **{"embed": "transformer.wte", "positions": "transformer.wpe"},
  **{"final_norm": "transformer.ln_f", "head": "lm_head"},
  **_layers(
    """attn_norm: ln_1, attn/q: attn.c_attn, attn/k: attn.c_attn,
    attn/v: attn.c_attn, attn/o: attn.c_proj, mlp_norm: ln_2,
    mlp/up: mlp.c_fc, mlp/down: mlp.c_proj""",
    at="transformer.h.{}.",
  ),
}
