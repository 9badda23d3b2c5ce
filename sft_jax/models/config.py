"""ModelConfig: a model's sizes and switches, read from its `config.json`.

A family is a set of fields, not a folder of code; `families` is their table.
Whatever is not understood is refused by name: a field that is ignored is a
model that is silently another model.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from sft_jax.models.families import FAMILIES
from sft_jax.models.family import FULL, SLIDING, Json, Read, refuse
from sft_jax.models.known_fields import check_supported
from sft_jax.models.layer_kinds import LayerKind, layer_kinds


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One decoder-only transformer.

  Attributes:
    family: `model_type` of the config.
    vocab_size: V, rows of the embedding.
    num_layers: L.
    d_model: D, width of the residual stream.
    d_ff: F, width of the MLP, or of each expert.
    num_heads: N query heads.
    num_kv_heads: K key/value heads; N is a multiple of K.
    head_dim: H; N * H need not be D.
    max_positions: the context the model was made for, in tokens.
    norm_eps: added to the mean square in the norms.
    tie_embeddings: the unembedding is the embedding.
    layers: the kind of each layer.
    init_std: standard deviation of fresh weights.
    raw: the config.json it came from, for a faithful export.
    activation: of the MLP, 'silu' or 'gelu_tanh'.
    glu_alpha: that of `moe.clipped_swiglu`, which takes its place; None: none.
    glu_limit: that of `moe.clipped_swiglu`.
    gated_mlp: down(act(gate(x)) * up(x)), else down(act(up(x))).
    qkv_bias: q, k and v projections have a bias.
    o_bias: the attention's output projection has a bias.
    mlp_bias: the projections of the MLP have a bias, a router too.
    num_experts: E; 0: an MLP and no router.
    experts_per_token: k.
    norm_topk: the shares of the k add up to one.
    norm: 'rms', or 'layer' with its mean and bias.
    norm_offset: norms multiply by this much more than their scale.
    pre_norm: a norm before attention and MLP.
    post_norm: a norm after each, before the residual is added.
    qk_norm: RMSNorm of q and k before they turn: 'none', over the H of each
      'head', or over 'all' heads at once.
    learned_positions: a vector per position is added to the embedding.
    scale_embeddings: embeddings are multiplied by sqrt(D), rounded to the
      compute dtype.
    embed_scale: embeddings are multiplied by this.
    residual_scale: what a layer adds to the residual is multiplied by this.
    attn_scale: scores are multiplied by this; None: H ** -0.5.
    attn_sinks: every head has a score that takes part in the softmax and
      brings no value.
    attn_softcap: scores are bent into +-cap by cap * tanh(x / cap).
    logit_softcap: logits likewise.
    logit_divisor: logits are divided by this.
  """

  family: str
  vocab_size: int
  num_layers: int
  d_model: int
  d_ff: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_positions: int
  norm_eps: float
  tie_embeddings: bool
  layers: tuple[LayerKind, ...]
  init_std: float
  raw: Json = dataclasses.field(compare=False, repr=False)
  activation: str = "silu"
  glu_alpha: float | None = None
  glu_limit: float = math.inf
  gated_mlp: bool = True
  qkv_bias: bool = False
  o_bias: bool = False
  mlp_bias: bool = False
  num_experts: int = 0
  experts_per_token: int = 0
  norm_topk: bool = True
  norm: str = "rms"
  norm_offset: float = 0.0
  pre_norm: bool = True
  post_norm: bool = False
  qk_norm: str = "none"
  learned_positions: bool = False
  scale_embeddings: bool = False
  embed_scale: float = 1.0
  residual_scale: float = 1.0
  attn_scale: float | None = None
  attn_sinks: bool = False
  attn_softcap: float | None = None
  logit_softcap: float | None = None
  logit_divisor: float = 1.0

  @property
  def kinds(self) -> tuple[LayerKind, ...]:
    """The kinds of layer there are; most models have one."""
    return tuple(dict.fromkeys(self.layers))

  @property
  def position_limit(self) -> int | None:
    """Most tokens of one document; None where positions have no table."""
    return self.max_positions if self.learned_positions else None


def read_config(folder: str | Path) -> ModelConfig:
  """Reads `config.json` of a model folder. Raises ValueError; see parse."""
  path = Path(folder) / "config.json"
  if not path.is_file():
    raise ValueError(
      f"{folder}: no config.json; expected a Hugging Face model folder. "
      "Check the path."
    )
  try:
    raw = json.loads(path.read_text(encoding="utf-8"))
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{path}: not JSON ({error}); expected a model's config. "
      "Download the file again."
    ) from error
  if not isinstance(raw, dict):
    raise refuse(path, "top level", type(raw).__name__, "a JSON object")
  return parse_config(raw, where=str(path))


def parse_config(raw: Json, *, where: str = "config.json") -> ModelConfig:
  """Turns the dict of a `config.json` into a ModelConfig.

  Reads the form of transformers 5 (`rope_parameters`, `dtype`) and the older
  one (`rope_theta`, `rope_scaling`, `torch_dtype`).

  Raises:
    ValueError: a missing field, an architecture or a value that is not
      implemented, or a field that is unknown; the message names it.
  """
  original, name = raw, raw.get("model_type")
  if name not in FAMILIES:
    raise refuse(where, "model_type", name, f"one of {sorted(FAMILIES)}")
  family = FAMILIES[name]
  check_supported(raw, family, where)
  for missing in family.requires:
    if raw.get(missing) is None:
      raise refuse(where, missing, None, "a value; it has no usual one")
  raw = raw | {
    ours: raw[theirs]
    for ours, theirs in family.aliases.items()
    if theirs in raw
  }

  def get(field: str, default: Any = None) -> Any:
    default = family.defaults.get(field, default)
    if callable(default):
      return default(raw) if raw.get(field) is None else raw[field]
    return raw.get(field, default)

  def need(field: str) -> int:
    value = get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise refuse(where, field, value, "a positive integer")
    return value

  d_model, num_heads = need("hidden_size"), need("num_attention_heads")
  if raw.get("head_dim") is not None:
    head_dim = need("head_dim")
  elif d_model % num_heads:
    raise refuse(where, "head_dim", None, "a positive integer")
  else:
    head_dim = d_model // num_heads
  if head_dim % 2:
    raise refuse(where, "head_dim", head_dim, "an even number, for RoPE")
  num_kv_heads = need("num_key_value_heads")
  if num_heads % num_kv_heads:
    raise refuse(
      where,
      "num_key_value_heads",
      num_kv_heads,
      f"a divisor of num_attention_heads={num_heads}",
    )
  fields = dict(family.traits)
  for field, read in family.reads.items():
    value = _read(raw, field, read, where)
    fields |= dict.fromkeys(read.into, value)
  if family.experts:
    fields["num_experts"] = need("num_local_experts")
    fields["experts_per_token"] = k = need("num_experts_per_tok")
    if k > fields["num_experts"]:
      expected = f"at most num_experts={fields['num_experts']}"
      raise refuse(where, "num_experts_per_tok", k, expected)
  num_layers = need("num_hidden_layers")
  return ModelConfig(
    family=name,
    vocab_size=need("vocab_size"),
    num_layers=num_layers,
    d_model=d_model,
    d_ff=need("intermediate_size"),
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    max_positions=need("max_position_embeddings"),
    norm_eps=float(get("rms_norm_eps", 1e-6)),
    tie_embeddings=bool(get("tie_word_embeddings", False)),
    layers=layer_kinds(raw, family, num_layers, head_dim=head_dim, where=where),
    init_std=float(raw.get("initializer_range", 0.02)),
    raw=dict(original),
    **fields,
  )


def _read(raw: Json, field: str, read: Read, where: str) -> Any:
  """A field of the file as the value of a field of ModelConfig."""
  value = raw.get(field, read.default)
  if read.via is None or value is None:
    return value
  if callable(read.via):
    return read.via(value)
  if value not in read.via:
    raise refuse(where, field, value, f"one of {list(read.via)}")
  return read.via[value]


def config_from_fields(
  family: str,
  *,
  vocab_size: int,
  num_layers: int,
  d_model: int,
  d_ff: int,
  num_heads: int,
  num_kv_heads: int,
  head_dim: int,
  max_positions: int,
  rope_theta: float = 10_000.0,
  tie_embeddings: bool = True,
  init_std: float | None = None,
  bos_token_id: int | None = None,
  eos_token_id: int | list[int] | None = None,
) -> ModelConfig:
  """A config for a model that starts from random weights.

  `init_std` defaults to sqrt(2 / 5D), the "small init" of Nguyen and Salazar
  (2019, "Transformers without Tears"): 0.02 at D = 1024, more when narrower.
  What is not said here is as transformers has it for the family.
  """
  if family not in FAMILIES:
    raise refuse("config", "family", family, f"one of {sorted(FAMILIES)}")
  traits = FAMILIES[family]
  rope = {"rope_theta": rope_theta, "rope_type": "default"}
  raw: Json = {
    "architectures": [traits.architecture],
    "model_type": family,
    "vocab_size": vocab_size,
    "num_hidden_layers": num_layers,
    "hidden_size": d_model,
    "intermediate_size": d_ff,
    "num_attention_heads": num_heads,
    "num_key_value_heads": num_kv_heads,
    "head_dim": head_dim,
    "max_position_embeddings": max_positions,
    "rms_norm_eps": 1e-6,
    "rope_parameters": rope,
    "tie_word_embeddings": tie_embeddings,
    "initializer_range": init_std or math.sqrt(2 / (5 * d_model)),
    "bos_token_id": bos_token_id,
    "eos_token_id": eos_token_id,
    "dtype": "float32",
  }
  if traits.traits.get("learned_positions"):
    del raw["rope_parameters"]
  elif traits.local_rope:
    raw["rope_parameters"] = dict.fromkeys((FULL, SLIDING), rope)
  raw = {traits.aliases.get(name, name): x for name, x in raw.items()}
  raw |= {name: read.default for name, read in traits.reads.items()}
  return parse_config(raw)
