"""What several families fix, default to and read from their config.json."""

from sft_jax.models.family import Json, Read

ACTIVATIONS = {
  "silu": "silu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
}
ACT = {"hidden_act": Read(("activation",), "silu", ACTIVATIONS)}
BIAS = {"attention_bias": Read(("qkv_bias", "o_bias"), False)}
MLP_BIAS = {"mlp_bias": Read(("mlp_bias",), False)}
MHA = {"num_key_value_heads": lambda raw: raw["num_attention_heads"]}
WINDOW_SWITCH = frozenset(
  {"use_sliding_window", "max_window_layers", "layer_types"}
)
HEAD_DIM = frozenset({"head_dim"})
# The balance loss is a matter of pretraining; see `moe`.
BALANCE_LOSS = frozenset({"output_router_logits", "router_aux_loss_coef"})


def _inverse_root(x: float) -> float:
  return x**-0.5


GEMMA_TRAITS: Json = {"norm_offset": 1.0, "scale_embeddings": True}
GEMMA_READS = BIAS | {
  "hidden_activation": Read(
    ("activation",), "gelu_pytorch_tanh", {"gelu_pytorch_tanh": "gelu_tanh"}
  ),
  "query_pre_attn_scalar": Read(("attn_scale",), 256, _inverse_root),
  "final_logit_softcapping": Read(("logit_softcap",)),
}
NOT_BIDIRECTIONAL = {"use_bidirectional_attention": (False, None)}
