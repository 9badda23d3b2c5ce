"""What families call their tensors: module of ours: module of theirs.

`{}` stands for the layer, a second one for the expert. Ours that share one of
theirs lie in it side by side, in the order of the table.
"""

LLAMA = {
  "embed": "model.embed_tokens",
  "final_norm": "model.norm",
  "head": "lm_head",
  "layers/attn_norm": "model.layers.{}.input_layernorm",
  "layers/attn/q": "model.layers.{}.self_attn.q_proj",
  "layers/attn/k": "model.layers.{}.self_attn.k_proj",
  "layers/attn/v": "model.layers.{}.self_attn.v_proj",
  "layers/attn/o": "model.layers.{}.self_attn.o_proj",
  "layers/attn/q_norm": "model.layers.{}.self_attn.q_norm",
  "layers/attn/k_norm": "model.layers.{}.self_attn.k_norm",
  "layers/mlp_norm": "model.layers.{}.post_attention_layernorm",
  "layers/mlp/gate": "model.layers.{}.mlp.gate_proj",
  "layers/mlp/up": "model.layers.{}.mlp.up_proj",
  "layers/mlp/down": "model.layers.{}.mlp.down_proj",
}
POST_NORM = LLAMA | {
  "layers/attn_post_norm": "model.layers.{}.post_attention_layernorm",
  "layers/mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
  "layers/mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
}
FUSED = LLAMA | {
  "layers/attn/q": "model.layers.{}.self_attn.qkv_proj",
  "layers/attn/k": "model.layers.{}.self_attn.qkv_proj",
  "layers/attn/v": "model.layers.{}.self_attn.qkv_proj",
  "layers/mlp/gate": "model.layers.{}.mlp.gate_up_proj",
  "layers/mlp/up": "model.layers.{}.mlp.gate_up_proj",
}


def experts(block: str, **names: str) -> dict[str, str]:
  """Those of Llama, with the modules of `block` in the place of the MLP."""
  return {k: v for k, v in LLAMA.items() if "/mlp/" not in k} | {
    f"layers/moe/{ours}": f"model.layers.{{}}.{block}.{theirs}"
    for ours, theirs in names.items()
  }


GPT2 = {
  "embed": "transformer.wte",
  "positions": "transformer.wpe",
  "final_norm": "transformer.ln_f",
  "head": "lm_head",
  "layers/attn_norm": "transformer.h.{}.ln_1",
  "layers/attn/q": "transformer.h.{}.attn.c_attn",
  "layers/attn/k": "transformer.h.{}.attn.c_attn",
  "layers/attn/v": "transformer.h.{}.attn.c_attn",
  "layers/attn/o": "transformer.h.{}.attn.c_proj",
  "layers/mlp_norm": "transformer.h.{}.ln_2",
  "layers/mlp/up": "transformer.h.{}.mlp.c_fc",
  "layers/mlp/down": "transformer.h.{}.mlp.c_proj",
}
